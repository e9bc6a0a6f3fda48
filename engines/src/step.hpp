// The arithmetic of one sampler step, written once for the host (host_kernels.cpp) and CUDA (cuda_driver.cu).
//
// The equations and the layout of a row are documented in tstitch_engines/device/step_row.py; a test compares the two
// files. Everything here is per element and forced inline: no symbol of this header ever reaches the linker, so it may
// be compiled for several instruction sets into one binary.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC, which make_fatbin.py uses, has no standard headers
namespace std {
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
}  // namespace std
#else
#include <cstdint>
#include <cstring>
#endif

#if defined(__CUDACC__)
#define TSTITCH_HD __host__ __device__ __forceinline__
#define TSTITCH_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define TSTITCH_HD inline __attribute__((always_inline))
#define TSTITCH_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TSTITCH_HD inline __attribute__((always_inline))
#define TSTITCH_UNROLL _Pragma("GCC unroll 16")
#endif

namespace tstitch {

// In the order of rows.py: X(name) gives ROW_name, the index of one float of a row.
#define TSTITCH_ROW_FIELDS(X) \
    X(T)                      \
    X(C_IN)                   \
    X(P)                      \
    X(Q)                      \
    X(A)                      \
    X(B)                      \
    X(C)                      \
    X(E)                      \
    X(S)                      \
    X(G)                      \
    X(RESCALE)                \
    X(GUIDED_CHANNELS)        \
    X(LOG_STD_MIN)            \
    X(LOG_STD_MAX)            \
    X(FLAGS)                  \
    X(F)                      \
    X(Y)                      \
    X(YX)                     \
    X(YY)                     \
    X(YB)                     \
    X(YC)                     \
    X(YE)                     \
    X(YF)                     \
    X(IMAGE_A)                \
    X(IMAGE_S)

enum RowField : int {
#define TSTITCH_ENUM(name) ROW_##name,
    TSTITCH_ROW_FIELDS(TSTITCH_ENUM)
#undef TSTITCH_ENUM
        ROW_SIZE
};

constexpr int FLAG_LEARNED = 1;
constexpr int FLAG_STORE = 2;
constexpr int FLAG_STORE_Y = 4;
constexpr int FLAG_INPAINT = 8;
constexpr int FLAG_GIVEN_NOISE = 16;
constexpr int FLAG_ALL = 31;
constexpr int HISTORY = 3;  // estimates that a lane remembers
constexpr std::uint32_t INITIAL_NOISE_STEP = 0xFFFFFFFFu;

TSTITCH_HD std::uint32_t float_bits(float x) {
    std::uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

TSTITCH_HD float bits_float(std::uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

TSTITCH_HD bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

// Whether the numbers of a row that become whole ones can: a cast of NaN, or of a float that is too large, is
// undefined. FLAGS is a sum of FLAG_*, T fits into 64 bits, GUIDED_CHANNELS is a count.
TSTITCH_HD bool has_whole_flags(const float* row) {
    const float flags = row[ROW_FLAGS];
    if (!(flags >= 0.0f && flags <= static_cast<float>(FLAG_ALL))) return false;
    return static_cast<float>(static_cast<int>(flags)) == flags;
}
TSTITCH_HD bool has_whole_timestep(const float* row) { return row[ROW_T] > -0x1p63f && row[ROW_T] < 0x1p63f; }
TSTITCH_HD bool has_castable_numbers(const float* row) {
    return has_whole_flags(row) && has_whole_timestep(row) && row[ROW_GUIDED_CHANNELS] >= 0.0f;
}

// Of a row whose numbers are castable.
TSTITCH_HD bool has_flag(const float* row, int flag) { return (static_cast<int>(row[ROW_FLAGS]) & flag) != 0; }

// How many leading elements of a lane are guided, from the row's channel count; a count above `channels` means all.
TSTITCH_HD std::int64_t guided_elements(const float* row, std::int64_t channels, std::int64_t spatial) {
    const float asked = row[ROW_GUIDED_CHANNELS];
    const std::int64_t count =
        asked >= static_cast<float>(channels) ? channels : (asked > 0.0f ? static_cast<std::int64_t>(asked) : 0);
    return count * spatial;
}

// History is a ring: D of step i lives in slot i % 3, so D1 (step i - 1) is in slot i + 2 and D2 in slot i + 1 (mod 3),
// and D3 (step i - 3) is in the slot that D of step i overwrites.
TSTITCH_HD int history_slot(std::uint32_t step) { return static_cast<int>(step % HISTORY); }

TSTITCH_HD bool uses_y(const float* row) { return row[ROW_Y] != 0.0f || has_flag(row, FLAG_STORE_Y); }

// ---------------------------------------------------------------------------------------------------------- noise

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in place on the counter.
TSTITCH_HD void philox4x32_10(std::uint32_t& c0, std::uint32_t& c1, std::uint32_t& c2, std::uint32_t& c3,
                              std::uint32_t k0, std::uint32_t k1) {
    TSTITCH_UNROLL
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = static_cast<std::uint64_t>(0xD2511F53u) * c0;
        const std::uint64_t p1 = static_cast<std::uint64_t>(0xCD9E8D57u) * c2;
        c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<std::uint32_t>(p1);
        c3 = static_cast<std::uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// The elementary functions are our own, of +, *, / and bit moves only: compilers vectorise them, and the CPU and the
// GPU get the same noise up to the last bits, which the two platforms' libraries would not give.

// ln(u) for 2^-33 <= u <= 1: u = 2^k (1 + f), ln(1 + f) = 2 atanh(f / (2 + f)) by its series; below 2 ulp.
TSTITCH_HD float log_unit(float u) {
    const std::uint32_t half_root = 0x3f3504f3u;  // sqrt(1/2): 1 + f lies in [sqrt(1/2), sqrt(2))
    const std::uint32_t moved = float_bits(u) + (0x3f800000u - half_root);
    const float k = static_cast<float>(static_cast<std::int32_t>(moved >> 23) - 127);
    const float f = bits_float((moved & 0x007fffffu) + half_root) - 1.0f;
    const float s = f / (2.0f + f);
    const float w = s * s;
    const float series = w * (1.0f / 3 + w * (1.0f / 5 + w * (1.0f / 7 + w * (1.0f / 9))));
    return k * 0.69314718f + (2.0f * s + 2.0f * s * series);
}

// sin(pi x) and cos(pi x) for |x| <= 1: the nearest quarter turn is taken off, Taylor series on |pi r| <= pi/4.
TSTITCH_HD void sin_cos_pi(float x, float& sine, float& cosine) {
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const float shifted = 2.0f * x + shifter;
    const std::uint32_t quarter = float_bits(shifted);
    const float t = 3.14159265f * (x - 0.5f * (shifted - shifter));
    const float w = t * t;
    const float s = t + t * w * (-1.0f / 6 + w * (1.0f / 120 + w * (-1.0f / 5040 + w * (1.0f / 362880))));
    const float c =
        1.0f + w * (-0.5f + w * (1.0f / 24 + w * (-1.0f / 720 + w * (1.0f / 40320 + w * (-1.0f / 3628800)))));
    const bool odd = (quarter & 1u) != 0;
    sine = bits_float(float_bits(odd ? c : s) ^ ((quarter & 2u) << 30));
    cosine = bits_float(float_bits(odd ? s : c) ^ (((quarter + 1u) & 2u) << 30));
}

// exp(x), x clamped to +-87 so that the result stays a normal float; NaN stays NaN.
TSTITCH_HD float exp_clamped(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float shifter = 12582912.0f;
    const float shifted = x * 1.44269504f + shifter;
    const float n = shifted - shifter;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n * the first is exact
    const float p =
        1.0f +
        r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r / 5040))))));
    return p * bits_float((float_bits(shifted) - 0x4b400000u + 127u) << 23);
}

TSTITCH_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return sqrtf(x);
#else
    return __builtin_sqrtf(x);
#endif
}

// The Box-Muller transform: two independent N(0, 1) from two uniform 32-bit words. |z| <= 6.77.
TSTITCH_HD void box_muller(std::uint32_t a, std::uint32_t b, float& z0, float& z1) {
    const float u = static_cast<float>(a) * 0x1p-32f + 0x1p-33f;  // (0, 1]
    const float radius = square_root(-2.0f * log_unit(u));
    float sine, cosine;
    sin_cos_pi(static_cast<float>(static_cast<std::int32_t>(b)) * 0x1p-31f, sine, cosine);
    z0 = radius * cosine;
    z1 = radius * sine;
}

// The normals of elements 4 * block ... 4 * block + 3 of a lane at one step.
TSTITCH_HD void four_normals(std::uint64_t seed, std::uint32_t step, std::uint64_t block, float& z0, float& z1,
                             float& z2, float& z3) {
    std::uint32_t c0 = static_cast<std::uint32_t>(block), c1 = static_cast<std::uint32_t>(block >> 32);
    std::uint32_t c2 = step, c3 = 0;
    philox4x32_10(c0, c1, c2, c3, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
    box_muller(c0, c1, z0, z1);
    box_muller(c2, c3, z2, z3);
}

// ------------------------------------------------------------------------------------------------------- the step

// u + G (c - u)
TSTITCH_HD float guide(const float* row, float cond, float uncond) { return uncond + row[ROW_G] * (cond - uncond); }

// Sums over the guided elements of a lane, from which both standard deviations of the rescale come. In double: the
// variance is a difference of two of them.
struct Moments {
    double cond, cond_squared, guided, guided_squared;

    TSTITCH_HD void add(float c, float m) {
        cond += c;
        cond_squared += static_cast<double>(c) * c;
        guided += m;
        guided_squared += static_cast<double>(m) * m;
    }
    TSTITCH_HD void add(const Moments& other) {
        cond += other.cond;
        cond_squared += other.cond_squared;
        guided += other.guided;
        guided_squared += other.guided_squared;
    }
};

// The factor on m: RESCALE std(c)/std(m) + 1 - RESCALE. Only the ratio counts, so n or n - 1 under the root (diffusers
// takes n - 1) is the same. A constant m has no scale to restore and stays as it is.
TSTITCH_HD float rescale_factor(const float* row, const Moments& sum, std::int64_t count) {
    const double n = static_cast<double>(count);
    const double of_cond = sum.cond_squared - sum.cond * sum.cond / n;
    const double of_guided = sum.guided_squared - sum.guided * sum.guided / n;
    if (!(of_guided > 0.0) || !(of_cond >= 0.0)) return 1.0f;
    const float ratio = square_root(static_cast<float>(of_cond / of_guided));
    return row[ROW_RESCALE] * ratio + (1.0f - row[ROW_RESCALE]);
}

// D = P x + Q m
TSTITCH_HD float denoised(const float* row, float x, float m) { return row[ROW_P] * x + row[ROW_Q] * m; }

// A x + B D; the terms of D1, D2, D3, y and z are added only where their coefficient is not 0, so that memory which was
// never written (0 * NaN) can't leak into the latent.
TSTITCH_HD float combine(const float* row, float x, float d) { return row[ROW_A] * x + row[ROW_B] * d; }

// YX x + YB D, the terms of y' that are always there; see combine for the others.
TSTITCH_HD float combine_y(const float* row, float x, float d) { return row[ROW_YX] * x + row[ROW_YB] * d; }

// mask x' + (1 - mask) (IMAGE_A x0 + IMAGE_S z0), given what is in the second brackets
TSTITCH_HD float inpaint(float mask, float next, float image) { return image + mask * (next - image); }

// S, or with FLAG_LEARNED the scale that the model's second half of channels gives.
TSTITCH_HD float learned_scale(const float* row, float w) {
    const float lo = row[ROW_LOG_STD_MIN], hi = row[ROW_LOG_STD_MAX];
    return row[ROW_S] * exp_clamped(lo + (hi - lo) * (0.5f * (w + 1.0f)));
}

}  // namespace tstitch
