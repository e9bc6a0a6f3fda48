// The host's loops over elements. CMake compiles this file once per instruction set with TSTITCH_ISA naming it; all
// but the table at the end has internal linkage, so that no function built for AVX-512 can be picked by the linker for
// a caller on an older CPU. For the same reason nothing of the standard library's templates is used here.
//
// Work goes through tiles that stay in the L1 cache: each term of a step is a short loop of its own that the compiler
// vectorises, and terms with coefficient 0 cost nothing.
#include "host_kernels.hpp"

#include "dtypes.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef TSTITCH_ISA
#define TSTITCH_ISA baseline
#endif
#define TSTITCH_JOIN2(a, b) a##b
#define TSTITCH_JOIN(a, b) TSTITCH_JOIN2(a, b)
#define TSTITCH_TEXT2(a) #a
#define TSTITCH_TEXT(a) TSTITCH_TEXT2(a)

namespace tstitch {
namespace {

constexpr std::int64_t TILE = 1024;  // a multiple of 4: one Philox call never crosses tiles
static_assert(CHUNK % TILE == 0 && TILE % 4 == 0);

struct Float32 {
    using Stored = float;
    static const float* read(const float* source, std::int64_t, float*) { return source; }
    static void write(const float* source, float* out, std::int64_t n) {
        memcpy(out, source, static_cast<std::size_t>(n) * sizeof(float));
    }
};

struct Float16 {
    using Stored = std::uint16_t;
    static const float* read(const std::uint16_t* __restrict source, std::int64_t n, float* __restrict tile) {
        std::int64_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(tile + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#endif
        for (; i < n; ++i) tile[i] = from_float16(source[i]);
        return tile;
    }
    static void write(const float* __restrict source, std::uint16_t* __restrict out, std::int64_t n) {
        std::int64_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; i < n; ++i) out[i] = to_float16(source[i]);
    }
};

struct Bfloat16 {
    using Stored = std::uint16_t;
    static const float* read(const std::uint16_t* __restrict source, std::int64_t n, float* __restrict tile) {
        for (std::int64_t i = 0; i < n; ++i) tile[i] = from_bfloat16(source[i]);
        return tile;
    }
    static void write(const float* __restrict source, std::uint16_t* __restrict out, std::int64_t n) {
        for (std::int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(source[i]);
    }
};

std::int64_t lesser(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// z[0 ... 4 blocks) for the blocks from `first` on.
void normal_tile(std::uint64_t seed, std::uint32_t step, std::uint64_t first, std::int64_t blocks,
                 float* __restrict z) {
    const std::uint32_t high = static_cast<std::uint32_t>(first >> 32), low = static_cast<std::uint32_t>(first);
    const std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    // A tile starts at a multiple of 256 blocks, so the low word can't wrap inside it and `high` is the same for all.
    // Three short loops instead of one: each fits the vectoriser.
    alignas(64) std::uint32_t bits[4][TILE / 4];
    for (std::int32_t j = 0; j < static_cast<std::int32_t>(blocks); ++j) {
        std::uint32_t c0 = low + static_cast<std::uint32_t>(j), c1 = high, c2 = step, c3 = 0;
        philox4x32_10(c0, c1, c2, c3, k0, k1);
        bits[0][j] = c0;
        bits[1][j] = c1;
        bits[2][j] = c2;
        bits[3][j] = c3;
    }
    alignas(64) float pair[4][TILE / 4];
    for (std::int64_t j = 0; j < blocks; ++j) box_muller(bits[0][j], bits[1][j], pair[0][j], pair[1][j]);
    for (std::int64_t j = 0; j < blocks; ++j) box_muller(bits[2][j], bits[3][j], pair[2][j], pair[3][j]);
    for (std::int64_t j = 0; j < blocks; ++j) {
        z[4 * j] = pair[0][j];
        z[4 * j + 1] = pair[1][j];
        z[4 * j + 2] = pair[2][j];
        z[4 * j + 3] = pair[3][j];
    }
}

template <typename T>
void prepare_range(const float* __restrict x, float c_in, void* out, std::int64_t begin, std::int64_t end) {
    alignas(64) float scaled[TILE];
    for (std::int64_t at = begin; at < end; at += TILE) {
        const std::int64_t n = lesser(TILE, end - at);
        for (std::int64_t i = 0; i < n; ++i) scaled[i] = c_in * x[at + i];
        T::write(scaled, static_cast<typename T::Stored*>(out) + at, n);
    }
}

// m of a tile: guided and rescaled on its first `guided` elements, the conditional output on the others.
template <typename T>
const float* model_tile(const LaneStep& lane, std::int64_t at, std::int64_t n, std::int64_t guided,
                        float* __restrict cond_tile, float* __restrict uncond_tile, float* __restrict m) {
    using Stored = typename T::Stored;
    const float* __restrict cond = T::read(static_cast<const Stored*>(lane.cond) + at, n, cond_tile);
    if (lane.uncond == nullptr || guided == 0) return cond;
    const float* __restrict uncond = T::read(static_cast<const Stored*>(lane.uncond) + at, guided, uncond_tile);
    for (std::int64_t i = 0; i < guided; ++i) m[i] = lane.factor * guide(lane.row, cond[i], uncond[i]);
    for (std::int64_t i = guided; i < n; ++i) m[i] = cond[i];
    return m;
}

template <typename T>
Moments moments_range(const LaneStep& lane, std::int64_t begin, std::int64_t end) {
    using Stored = typename T::Stored;
    alignas(64) float cond_tile[TILE], uncond_tile[TILE];
    constexpr int WAYS = 8;  // independent sums: a fixed order of additions that still vectorises
    Moments sums[WAYS] = {};
    double cond_sum[WAYS] = {}, cond_squared[WAYS] = {}, guided_sum[WAYS] = {}, guided_squared[WAYS] = {};
    end = lesser(end, lane.guided);
    for (std::int64_t at = begin; at < end; at += TILE) {
        const std::int64_t n = lesser(TILE, end - at);
        const float* __restrict cond = T::read(static_cast<const Stored*>(lane.cond) + at, n, cond_tile);
        const float* __restrict uncond = T::read(static_cast<const Stored*>(lane.uncond) + at, n, uncond_tile);
        std::int64_t i = 0;
        for (; i + WAYS <= n; i += WAYS)
            for (int k = 0; k < WAYS; ++k) {
                const double c = cond[i + k], m = guide(lane.row, cond[i + k], uncond[i + k]);
                cond_sum[k] += c;
                cond_squared[k] += c * c;
                guided_sum[k] += m;
                guided_squared[k] += m * m;
            }
        for (int k = 0; i < n; ++i, ++k) sums[k].add(cond[i], guide(lane.row, cond[i], uncond[i]));
    }
    Moments total = {};
    for (int k = 0; k < WAYS; ++k) {
        sums[k].add(Moments{cond_sum[k], cond_squared[k], guided_sum[k], guided_squared[k]});
        total.add(sums[k]);
    }
    return total;
}

// next += factor * term, where the factor is not 0.
void add(float* __restrict next, float factor, const float* __restrict term, std::int64_t n) {
    if (factor == 0.0f) return;
    for (std::int64_t i = 0; i < n; ++i) next[i] += factor * term[i];
}

// y' of a tile; `sum` is room for it, since y' may be made of y.
void update_y(const LaneStep& lane, std::int64_t at, std::int64_t n, const float* __restrict d, float* __restrict sum) {
    const float* const row = lane.row;
    const float* __restrict x = lane.x + at;
    for (std::int64_t i = 0; i < n; ++i) sum[i] = combine_y(row, x[i], d[i]);
    add(sum, row[ROW_YY], lane.y + at, n);
    add(sum, row[ROW_YC], lane.d1 + at, n);
    add(sum, row[ROW_YE], lane.d2 + at, n);
    add(sum, row[ROW_YF], lane.d3 + at, n);
    memcpy(lane.y + at, sum, static_cast<std::size_t>(n) * sizeof(float));
}

// The picture outside the mask over a tile of x'; `level` and `z` are room for it at its noise level.
void inpaint_tile(const LaneStep& lane, std::int64_t at, std::int64_t n, float* __restrict level, float* __restrict z,
                  float* __restrict next) {
    const float a = lane.row[ROW_IMAGE_A], s = lane.row[ROW_IMAGE_S];
    const float* __restrict image = lane.image + at;
    for (std::int64_t i = 0; i < n; ++i) level[i] = a * image[i];
    if (s != 0.0f && lane.noise == nullptr)
        normal_tile(lane.seed, INITIAL_NOISE_STEP, static_cast<std::uint64_t>(at) / 4, (n + 3) / 4, z);
    add(level, s, lane.noise != nullptr ? lane.noise + at : z, n);
    for (std::int64_t i = 0; i < n;) {  // runs inside one channel, which share the mask
        const std::int64_t place = (at + i) % lane.spatial, stop = lesser(n, i + lane.spatial - place);
        const float* __restrict mask = lane.mask + place - i;
        for (; i < stop; ++i) next[i] = inpaint(mask[i], next[i], level[i]);
    }
}

template <typename T>
bool advance_range(const LaneStep& lane, std::int64_t begin, std::int64_t end) {
    alignas(64) float cond_tile[TILE], uncond_tile[TILE], m_tile[TILE], d[TILE], next[TILE], z[TILE];
    const float* const row = lane.row;
    const float s = row[ROW_S];
    std::uint32_t broken = 0;
    for (std::int64_t at = begin; at < end; at += TILE) {
        const std::int64_t n = lesser(TILE, end - at);
        const std::int64_t guided = lane.guided <= at ? 0 : lesser(n, lane.guided - at);
        const float* __restrict m = model_tile<T>(lane, at, n, guided, cond_tile, uncond_tile, m_tile);
        float* __restrict x = lane.x + at;
        for (std::int64_t i = 0; i < n; ++i) {
            d[i] = denoised(row, x[i], m[i]);
            next[i] = combine(row, x[i], d[i]);
        }
        add(next, row[ROW_C], lane.d1 + at, n);
        add(next, row[ROW_E], lane.d2 + at, n);
        add(next, row[ROW_F], lane.d3 + at, n);
        if (lane.y != nullptr) {
            add(next, row[ROW_Y], lane.y + at, n);
            if (has_flag(row, FLAG_STORE_Y)) update_y(lane, at, n, d, z);
        }
        if (lane.store != nullptr) memcpy(lane.store + at, d, static_cast<std::size_t>(n) * sizeof(float));
        if (s != 0.0f) {
            normal_tile(lane.seed, lane.step, static_cast<std::uint64_t>(at) / 4, (n + 3) / 4, z);
            if (lane.learned != nullptr) {
                using Stored = typename T::Stored;
                const float* __restrict w = T::read(static_cast<const Stored*>(lane.learned) + at, n, uncond_tile);
                for (std::int64_t i = 0; i < n; ++i) next[i] += learned_scale(row, w[i]) * z[i];
            } else {
                add(next, s, z, n);
            }
        }
        if (lane.image != nullptr) inpaint_tile(lane, at, n, d, z, next);
        for (std::int64_t i = 0; i < n; ++i) {
            broken |= is_finite(next[i]) ? 0u : 1u;
            x[i] = next[i];
        }
    }
    return broken == 0;
}

void prepare(Dtype dtype, const float* x, float c_in, void* out, std::int64_t begin, std::int64_t end) {
    switch (dtype) {
        case Dtype::float32:
            return prepare_range<Float32>(x, c_in, out, begin, end);
        case Dtype::float16:
            return prepare_range<Float16>(x, c_in, out, begin, end);
        case Dtype::bfloat16:
            return prepare_range<Bfloat16>(x, c_in, out, begin, end);
    }
}

Moments moments(Dtype dtype, const LaneStep& lane, std::int64_t begin, std::int64_t end) {
    switch (dtype) {
        case Dtype::float16:
            return moments_range<Float16>(lane, begin, end);
        case Dtype::bfloat16:
            return moments_range<Bfloat16>(lane, begin, end);
        case Dtype::float32:
            break;
    }
    return moments_range<Float32>(lane, begin, end);
}

bool advance(Dtype dtype, const LaneStep& lane, std::int64_t begin, std::int64_t end) {
    switch (dtype) {
        case Dtype::float16:
            return advance_range<Float16>(lane, begin, end);
        case Dtype::bfloat16:
            return advance_range<Bfloat16>(lane, begin, end);
        case Dtype::float32:
            break;
    }
    return advance_range<Float32>(lane, begin, end);
}

void normals(float* out, std::uint64_t seed, std::uint32_t step, float scale, std::int64_t begin, std::int64_t end) {
    alignas(64) float z[TILE];
    for (std::int64_t at = begin; at < end; at += TILE) {
        const std::int64_t n = lesser(TILE, end - at);
        normal_tile(seed, step, static_cast<std::uint64_t>(at) / 4, (n + 3) / 4, z);
        for (std::int64_t i = 0; i < n; ++i) out[at + i] = scale * z[i];
    }
}

void to_float32(Dtype dtype, const void* source, float* out, std::int64_t n) {
    switch (dtype) {
        case Dtype::float32:
            return Float32::write(static_cast<const float*>(source), out, n);
        case Dtype::float16:
            Float16::read(static_cast<const std::uint16_t*>(source), n, out);
            return;
        case Dtype::bfloat16:
            Bfloat16::read(static_cast<const std::uint16_t*>(source), n, out);
            return;
    }
}

bool supported() {
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every CPU with AVX2 has F16C
#else
    return true;
#endif
}

}  // namespace

extern const HostKernels TSTITCH_JOIN(kernels_, TSTITCH_ISA) = {
    TSTITCH_TEXT(TSTITCH_ISA), supported, prepare, moments, advance, normals, to_float32,
};

}  // namespace tstitch
