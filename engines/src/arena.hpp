// The host driver's view of the lanes: plain pointers and sizes. Arguments are checked in step_c.cpp, which calls this.
#pragma once

#include <cstdint>
#include <vector>

#include "host_kernels.hpp"

namespace tstitch {

// The instruction sets this CPU can run, best first.
std::vector<const HostKernels*> supported_kernels();

// The one called `isa`, or the best when that is null. Throws std::invalid_argument when this CPU has no such.
const HostKernels& find_kernels(const char* isa);

// More threads than any CPU has: so many are a mistake, and starting them would fail half-way.
constexpr int MOST_THREADS = 1024;

// `asked`, or all CPUs when that is 0. Throws std::invalid_argument when it is negative or above MOST_THREADS.
int thread_count(int asked);

struct HostArena {
    float* latents;             // [lanes, stride], of which channels * spatial are used
    float* history;             // [HISTORY, lanes, stride]
    float* y;                   // as latents, or null
    const float* rows;          // [lanes, row_count, ROW_SIZE]
    std::int32_t* step;         // [lanes]
    const std::uint64_t* seed;  // [lanes]
    std::int32_t* fault;        // [lanes]
    const float* image;         // as latents, or null
    const float* mask;          // [lanes, stride / channels], or null
    const float* noise;         // as latents, or null
    std::int64_t lanes, row_count, channels, spatial;
    std::int64_t stride;  // elements from one lane to the next; stride / channels in mask
    const HostKernels* kernels;
    int threads;

    std::int64_t elements() const { return channels * spatial; }
    const float* row(std::int32_t lane) const { return rows + (lane * row_count + step[lane]) * ROW_SIZE; }

    std::uint64_t calls = 0;
    std::vector<std::uint64_t> last_used;  // [lanes]: the last call that named the lane

    // Throws std::invalid_argument when something is wrong with the lanes: a slot outside the arena or named twice, a
    // lane at the end of its table or at a row with numbers that can't be right, a spare position (-1) that comes
    // first.
    void check(const std::int32_t* active, std::int64_t batch);

    // Throws std::invalid_argument for a row that uses what is not there: memory that is null, or the model's second
    // half of channels when the model has none.
    void check_rows(const std::int32_t* active, std::int64_t batch, bool learned_given) const;

    // `sample` holds batch, or when `guided` 2 * batch, lanes; so does the timestep array that is not null.
    void prepare(const std::int32_t* active, std::int64_t batch, Dtype dtype, void* sample, float* timestep_float,
                 std::int64_t* timestep_int, bool guided) const;

    // `output` holds lanes of output_channels = channels or 2 * channels, conditional ones first.
    void advance(const std::int32_t* active, std::int64_t batch, Dtype dtype, const void* output,
                 std::int64_t output_channels, bool guided, bool rescale) const;
};

// Throws std::invalid_argument for positions that are neither one of `lanes` nor, but for the first, spare (-1).
void check_active(const std::int32_t* active, std::int64_t batch, std::int64_t lanes);

// The lane whose data a position of the batch is given.
inline std::int32_t lane_at(const std::int32_t* active, std::int64_t at) {
    return active[at] < 0 ? active[0] : active[at];
}

// out[e] = scale * z_e
void normals(const HostKernels& kernels, int threads, float* out, std::int64_t count, std::uint64_t seed,
             std::uint32_t step, float scale);

// One normal costs about as much as twelve noiseless updates.
constexpr std::int64_t NOISE_WORK = 12;

// Below this much work one thread is faster than waking others: about 40 us of it. One unit is one element of a step
// without noise.
constexpr std::int64_t PARALLEL_WORK = 1 << 17;

}  // namespace tstitch
