// What the host driver calls: one table of functions per instruction set (host_kernels.cpp is compiled for each).
#pragma once

#include <cstdint>

#include "step.hpp"

namespace tstitch {

enum class Dtype : int { float32, float16, bfloat16 };

// All that `advance` needs to know of one lane. Pointers are to the lane's first element; null where the row has no
// use for the array.
struct LaneStep {
    const float* row;
    float* x;
    const void* cond;
    const void* uncond;   // null: not guided
    const void* learned;  // null: S is the noise scale
    float* store;         // where D goes
    const float* d1;
    const float* d2;
    const float* d3;     // may be the same memory as store
    float* y;            // null: the row neither reads nor writes it
    const float* image;  // null: no inpainting
    const float* mask;   // [spatial], for every channel
    const float* noise;  // z0 of inpainting; null: drawn
    std::int64_t spatial;
    std::uint64_t seed;
    std::uint32_t step;
    std::int64_t guided;  // elements that guidance touches
    float factor;         // the rescale factor on those, 1 = none
};

// [begin, end) are element ranges of one lane; begin is a multiple of CHUNK.
constexpr std::int64_t CHUNK = 8192;

struct HostKernels {
    const char* name;
    bool (*supported)();
    // out = c_in * x, in the output's type
    void (*prepare)(Dtype dtype, const float* x, float c_in, void* out, std::int64_t begin, std::int64_t end);
    // Sums over the guided elements among [begin, end).
    Moments (*moments)(Dtype dtype, const LaneStep& lane, std::int64_t begin, std::int64_t end);
    // Returns false when a new latent is not finite.
    bool (*advance)(Dtype dtype, const LaneStep& lane, std::int64_t begin, std::int64_t end);
    // out[e] = scale * z_e
    void (*normals)(float* out, std::uint64_t seed, std::uint32_t step, float scale, std::int64_t begin,
                    std::int64_t end);
    void (*to_float32)(Dtype dtype, const void* source, float* out, std::int64_t n);
};

#if defined(TSTITCH_X86)
extern const HostKernels kernels_avx512, kernels_avx2;
#endif
extern const HostKernels kernels_baseline;

}  // namespace tstitch
