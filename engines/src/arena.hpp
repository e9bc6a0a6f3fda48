// The host driver's view of the lanes: plain pointers and sizes, checked by the binding (host_driver.cpp).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "host_kernels.hpp"

namespace tstitch {

// The instruction sets this CPU can run, best first.
std::vector<const HostKernels*> supported_kernels();

struct HostArena {
    float* latents;             // [lanes, channels * spatial]
    float* history;             // [2, lanes, channels * spatial]
    const float* rows;          // [lanes, row_count, ROW_SIZE]
    std::int32_t* step;         // [lanes]
    const std::uint64_t* seed;  // [lanes]
    std::int32_t* fault;        // [lanes]
    std::int64_t lanes, row_count, channels, spatial;
    const HostKernels* kernels;
    int threads;

    std::int64_t elements() const { return channels * spatial; }
    const float* row(std::int32_t lane) const { return rows + (lane * row_count + step[lane]) * ROW_SIZE; }

    // Empty, or what is wrong with the lanes: a slot outside the arena, a lane at the end of its table, a row that
    // reads the model's second half of channels when the model has none.
    std::string check(const std::int32_t* active, std::int64_t batch, bool learned_given) const;

    // `sample` holds batch, or when `guided` 2 * batch, lanes; so does the timestep array that is not null.
    void prepare(const std::int32_t* active, std::int64_t batch, Dtype dtype, void* sample, float* timestep_float,
                 std::int64_t* timestep_int, bool guided) const;

    // `output` holds lanes of output_channels = channels or 2 * channels, conditional ones first.
    void advance(const std::int32_t* active, std::int64_t batch, Dtype dtype, const void* output,
                 std::int64_t output_channels, bool guided, bool rescale) const;
};

void initial_noise(const HostKernels& kernels, int threads, float* out, std::int64_t count, std::uint64_t seed,
                   std::uint32_t step, float scale);

// Below this much work one thread is faster than waking others: about 40 us of it. One unit is one element of a step
// without noise.
constexpr std::int64_t PARALLEL_WORK = 1 << 17;

}  // namespace tstitch
