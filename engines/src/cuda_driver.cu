// The CUDA driver of the step kernels (step.hpp), loaded from step_kernels.fatbin by tstitch_engines/device/cuda.py.
//
// Grid: x covers a lane's elements, four per thread (one Philox call); y is the position in the batch. Nothing is read
// from the host and no kernel waits for another inside a launch: the order is that of the stream,
//     prepare ... engine ... [guidance_factor] advance.
// `prepare` reads the step index and notes each position's step and row in `current`; the kernels after it read those,
// and `advance` writes the index. So no kernel reads what one of its blocks writes, and the blocks of a lane may run in
// any order.
//
// "elements" is channels * spatial of one lane; "output_elements" is that or twice that (learned variance); "stride" is
// the number of elements from one lane to the next in the arena, at least "elements".
//
// No header of CUDA is used: NVRTC comes without any, and all that the kernels need of them is four conversions.
#include "dtypes.hpp"

namespace {

using namespace tstitch;

constexpr int MOMENT_THREADS = 512;

// A position's step as prepare found it. Read 16 bytes at once.
struct alignas(16) Current {
    float row[ROW_SIZE];
    int step;
    int usable;  // 0: the step lies outside the table, or the row's numbers can't be cast
};
static_assert(sizeof(Current) == 112, "tstitch/cuda.h and cuda_kernels.py say so");

struct Float16 {
    std::uint16_t bits;
};
struct Bfloat16 {
    std::uint16_t bits;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(Float16 h) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
    return x;
#else
    return from_float16(h.bits);
#endif
}
__device__ float to_float(Bfloat16 h) { return from_bfloat16(h.bits); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ Float16 from_float<Float16>(float x) {
#if defined(__CUDA_ARCH__)
    Float16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
    return h;
#else
    return {to_float16(x)};
#endif
}
template <>
__device__ Bfloat16 from_float<Bfloat16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // Turing has no such instruction
    Bfloat16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
    return h;
#else
    return {to_bfloat16(x)};
#endif
}

template <typename T>
struct alignas(4 * sizeof(T)) Four {
    T value[4];
};

// Four neighbours in one transaction. A lane starts aligned only when its element count is a multiple of 4; otherwise,
// and at a ragged end (n < 4), one by one. Elements from n on read as 0. What is fetched before any of it is converted
// is under way at once.
template <typename T>
__device__ Four<T> fetch4(const T* source, bool aligned, int n) {
    if (aligned) return *reinterpret_cast<const Four<T>*>(source);
    Four<T> four = {};
    for (int k = 0; k < 4; ++k)
        if (k < n) four.value[k] = source[k];
    return four;
}

template <typename T>
__device__ void to_floats(const Four<T>& four, float (&out)[4]) {
    for (int k = 0; k < 4; ++k) out[k] = to_float(four.value[k]);
}

template <typename T>
__device__ void load4(const T* source, bool aligned, int n, float (&out)[4]) {
    to_floats(fetch4(source, aligned, n), out);
}

template <typename T>
__device__ void store4(T* target, bool aligned, int n, const float (&in)[4]) {
    if (aligned) {
        Four<T> four;
        for (int k = 0; k < 4; ++k) four.value[k] = from_float<T>(in[k]);
        *reinterpret_cast<Four<T>*>(target) = four;
    } else {
        for (int k = 0; k < 4; ++k)
            if (k < n) target[k] = from_float<T>(in[k]);
    }
}

__device__ void put_timestep(float* out, float t) { *out = t; }
__device__ void put_timestep(long long* out, float t) { *out = llrintf(t); }

// The lane whose data a position of the batch is given: a spare position (-1) is given that of the first.
__device__ int lane_at(const int* active, int at) { return active[at] < 0 ? active[0] : active[at]; }

// The lane's current row, or null when its step lies outside the table, or its numbers can't be cast (advance notes
// both as a fault).
__device__ const float* current_row(const float* rows, int row_count, int lane, int step) {
    if (step < 0 || step >= row_count) return nullptr;
    const float* const row = rows + (static_cast<long long>(lane) * row_count + step) * ROW_SIZE;
    return has_castable_numbers(row) ? row : nullptr;
}

template <typename T, typename Time>
__device__ void prepare(const float* __restrict__ latents, const float* __restrict__ rows, const int* __restrict__ step,
                        const int* __restrict__ active, Current* __restrict__ current, T* __restrict__ sample,
                        Time* __restrict__ timestep, int row_count, int elements, int stride, int guided) {
    const int batch = gridDim.y, at = blockIdx.y, lane = lane_at(active, at), thread = threadIdx.x;
    const int now = step[lane];
    const float* const row = current_row(rows, row_count, lane, now);
    if (blockIdx.x == 0) {  // of at least ROW_SIZE threads
        if (row != nullptr && thread < ROW_SIZE) current[at].row[thread] = row[thread];
        if (thread == 0) {
            current[at].step = now;
            current[at].usable = row != nullptr;
        }
    }
    if (row == nullptr) return;
    const int element = 4 * (blockIdx.x * blockDim.x + thread);
    if (element == 0) {
        put_timestep(timestep + at, row[ROW_T]);
        if (guided) put_timestep(timestep + batch + at, row[ROW_T]);
    }
    if (element >= elements) return;
    const int n = elements - element;
    const bool aligned = elements % 4 == 0;
    float x[4];
    load4(latents + static_cast<long long>(lane) * stride + element, aligned && stride % 4 == 0, n, x);
    for (float& value : x) value *= row[ROW_C_IN];
    store4(sample + static_cast<long long>(at) * elements + element, aligned, n, x);
    if (guided) store4(sample + static_cast<long long>(batch + at) * elements + element, aligned, n, x);
}

// factors[position in batch] = the rescale factor on m; one block per lane. Most GPUs have few units for float64, so
// RUN fours are summed in float32 before they go into a float64 sum. Summed are differences from the mean of a few
// elements, which lies d standard deviations from the mean of all: variances are right to a part in a million times
// 1 + d^2 or better, as long as the squares of differences are normal floats. Each thread sums its stride in order and
// the tree below is fixed, so the result is the same in every run.
template <typename T>
__device__ void guidance_factor(const Current* __restrict__ current, const T* __restrict__ output,
                                float* __restrict__ factors, int elements, int spatial, int output_elements) {
    constexpr int STRIDE = 4 * MOMENT_THREADS, RUN = 4, SAMPLE = 8;
    __shared__ Moments sums[MOMENT_THREADS];
    const int batch = gridDim.x, at = blockIdx.x, thread = threadIdx.x;
    const float* const row = current[at].row;
    const int guided = current[at].usable && row[ROW_RESCALE] != 0.0f
                           ? static_cast<int>(guided_elements(row, elements / spatial, spatial))
                           : 0;
    if (guided == 0) {
        if (thread == 0) factors[at] = 1.0f;
        return;
    }
    const T* const cond = output + static_cast<long long>(at) * output_elements;
    const T* const uncond = output + static_cast<long long>(batch + at) * output_elements;
    const bool aligned = elements % 4 == 0;
    float c_shift = 0.0f, m_shift = 0.0f;
    TSTITCH_UNROLL
    for (int k = 0; k < SAMPLE; ++k) {
        const int e = static_cast<int>(static_cast<long long>(guided) * k / SAMPLE);
        const float c = to_float(cond[e]);
        c_shift += c / SAMPLE;
        m_shift += guide(row, c, to_float(uncond[e])) / SAMPLE;
    }
    Moments sum = {};
    for (int first = 4 * thread; first < guided; first += RUN * STRIDE) {
        Four<T> cs[RUN] = {}, us[RUN] = {};
        TSTITCH_UNROLL
        for (int r = 0; r < RUN; ++r) {
            const int e = first + r * STRIDE;
            if (e >= guided) continue;
            cs[r] = fetch4(cond + e, aligned, guided - e);
            us[r] = fetch4(uncond + e, aligned, guided - e);
        }
        float c_sum = 0.0f, c_squared = 0.0f, m_sum = 0.0f, m_squared = 0.0f;
        TSTITCH_UNROLL
        for (int e = 0; e < 4 * RUN; ++e) {
            if (first + e / 4 * STRIDE + e % 4 >= guided) continue;
            const float given = to_float(cs[e / 4].value[e % 4]), c = given - c_shift;
            const float m = guide(row, given, to_float(us[e / 4].value[e % 4])) - m_shift;
            c_sum += c;
            c_squared += c * c;
            m_sum += m;
            m_squared += m * m;
        }
        sum.add(Moments{c_sum, c_squared, m_sum, m_squared});
    }
    sums[thread] = sum;
    for (int half = MOMENT_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) sums[thread].add(sums[thread + half]);
    }
    if (thread == 0) factors[at] = rescale_factor(row, sums[0], guided);
}

// next += factor * term, where the factor is not 0.
__device__ void add4(float (&next)[4], float factor, const float* term, bool aligned, int n) {
    if (factor == 0.0f) return;
    float values[4];
    load4(term, aligned, n, values);
    for (int k = 0; k < 4; ++k) next[k] += factor * values[k];
}

// Where a row uses what is not there: a NaN that the fault array reports, not a guess.
__device__ void spoil(float (&values)[4]) {
    for (float& value : values) value = bits_float(0x7fc00000u);
}

template <typename T>
__device__ void advance(float* __restrict__ latents, float* __restrict__ history, const Current* __restrict__ current,
                        int* __restrict__ step, const unsigned long long* __restrict__ seed, int* __restrict__ fault,
                        const int* __restrict__ active, const T* __restrict__ output, const float* __restrict__ factors,
                        float* __restrict__ second, const float* __restrict__ image, const float* __restrict__ mask,
                        const float* __restrict__ noise, int lanes, int elements, int stride, int spatial,
                        int output_elements, int guided) {
    const int batch = gridDim.y, at = blockIdx.y, lane = active[at];
    if (lane < 0) return;
    const Current own = current[at];  // all of it at once: what is read through a pointer is read again after a write
    const float* const row = own.row;
    const int now = own.step;
    const int element = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (element == 0) step[lane] = now + 1;
    if (!own.usable) {
        if (element == 0 && fault[lane] == -1) fault[lane] = now;
        return;
    }
    if (element >= elements) return;
    const int n = min(4, elements - element);
    const bool dense = elements % 4 == 0, aligned = dense && stride % 4 == 0;  // the model's lanes, the arena's
    const long long offset = static_cast<long long>(lane) * stride + element;
    const long long past = static_cast<long long>(lanes) * stride;
    const auto first = static_cast<std::uint32_t>(now);
    float* const slot = history + history_slot(first) * past + offset;  // of D3, then of D
    const float* const slot1 = history + history_slot(first + 2) * past + offset;
    const float* const slot2 = history + history_slot(first + 1) * past + offset;
    const T* const cond = output + static_cast<long long>(at) * output_elements + element;

    const long long touched = guided ? guided_elements(row, elements / spatial, spatial) : 0;
    const bool guides = element < touched;
    const Four<float> latent = fetch4(latents + offset, aligned, n);
    const Four<T> first_half = fetch4(cond, dense, n);
    Four<T> second_half = {};
    if (guides) second_half = fetch4(cond + static_cast<long long>(batch) * output_elements, dense, n);
    const float factor = guides && factors != nullptr ? factors[at] : 1.0f;
    float x[4], m[4], d[4], next[4];
    to_floats(latent, x);
    to_floats(first_half, m);
    if (guides) {
        float u[4];
        to_floats(second_half, u);
        for (int k = 0; k < 4; ++k)
            if (element + k < touched) m[k] = factor * guide(row, m[k], u[k]);
    }
    for (int k = 0; k < 4; ++k) {
        d[k] = denoised(row, x[k], m[k]);
        next[k] = combine(row, x[k], d[k]);
    }
    add4(next, row[ROW_C], slot1, aligned, n);
    add4(next, row[ROW_E], slot2, aligned, n);
    add4(next, row[ROW_F], slot, aligned, n);
    if (uses_y(row)) {
        if (second == nullptr) {
            spoil(next);
        } else {
            float* const y = second + offset;
            add4(next, row[ROW_Y], y, aligned, n);
            if (has_flag(row, FLAG_STORE_Y)) {
                float sum[4];
                for (int k = 0; k < 4; ++k) sum[k] = combine_y(row, x[k], d[k]);
                add4(sum, row[ROW_YY], y, aligned, n);
                add4(sum, row[ROW_YC], slot1, aligned, n);
                add4(sum, row[ROW_YE], slot2, aligned, n);
                add4(sum, row[ROW_YF], slot, aligned, n);
                store4(y, aligned, n, sum);
            }
        }
    }
    if (has_flag(row, FLAG_STORE)) store4(slot, aligned, n, d);
    if (row[ROW_S] != 0.0f) {
        float z[4], scale[4] = {row[ROW_S], row[ROW_S], row[ROW_S], row[ROW_S]};
        four_normals(seed[lane], static_cast<std::uint32_t>(now), static_cast<std::uint64_t>(element / 4), z[0], z[1],
                     z[2], z[3]);
        if (has_flag(row, FLAG_LEARNED)) {
            if (output_elements == 2 * elements) {
                load4(cond + elements, dense, n, scale);
                for (float& value : scale) value = learned_scale(row, value);
            } else {  // the model has no second half
                spoil(scale);
            }
        }
        for (int k = 0; k < 4; ++k) next[k] += scale[k] * z[k];
    }
    if (has_flag(row, FLAG_INPAINT)) {
        const bool given = has_flag(row, FLAG_GIVEN_NOISE);
        if (image == nullptr || mask == nullptr || (given && noise == nullptr)) {
            spoil(next);
        } else {
            float level[4] = {};
            add4(level, row[ROW_IMAGE_A], image + offset, aligned, n);
            if (given) {
                add4(level, row[ROW_IMAGE_S], noise + offset, aligned, n);
            } else if (row[ROW_IMAGE_S] != 0.0f) {
                float z[4];
                four_normals(seed[lane], INITIAL_NOISE_STEP, static_cast<std::uint64_t>(element / 4), z[0], z[1], z[2],
                             z[3]);
                for (int k = 0; k < 4; ++k) level[k] += row[ROW_IMAGE_S] * z[k];
            }
            const float* const of_lane = mask + static_cast<long long>(lane) * (stride / (elements / spatial));
            for (int k = 0; k < 4; ++k)
                if (k < n) next[k] = inpaint(of_lane[(element + k) % spatial], next[k], level[k]);
        }
    }
    store4(latents + offset, aligned, n, next);
    bool finite = true;
    for (int k = 0; k < 4; ++k) finite = finite && (k >= n || is_finite(next[k]));
    if (!finite && fault[lane] == -1) fault[lane] = now;  // all threads that get here write the same value
}

}  // namespace

#define TSTITCH_PREPARE(name, T, Time)                                                                        \
    extern "C" __global__ void prepare_##name(const float* latents, const float* rows, const int* step,       \
                                              const int* active, Current* current, T* sample, Time* timestep, \
                                              int row_count, int elements, int stride, int guided) {          \
        prepare(latents, rows, step, active, current, sample, timestep, row_count, elements, stride, guided); \
    }
#define TSTITCH_KERNELS(name, T)                                                                                       \
    TSTITCH_PREPARE(name##_float32, T, float)                                                                          \
    TSTITCH_PREPARE(name##_int64, T, long long)                                                                        \
    extern "C" __global__ void __launch_bounds__(MOMENT_THREADS) guidance_factor_##name(                               \
        const Current* current, const T* output, float* factors, int elements, int spatial, int output_elements) {     \
        guidance_factor(current, output, factors, elements, spatial, output_elements);                                 \
    }                                                                                                                  \
    extern "C" __global__ void advance_##name(                                                                         \
        float* latents, float* history, const Current* current, int* step, const unsigned long long* seed, int* fault, \
        const int* active, const T* output, const float* factors, float* y, const float* image, const float* mask,     \
        const float* noise, int lanes, int elements, int stride, int spatial, int output_elements, int guided) {       \
        advance(latents, history, current, step, seed, fault, active, output, factors, y, image, mask, noise, lanes,   \
                elements, stride, spatial, output_elements, guided);                                                   \
    }

TSTITCH_KERNELS(float32, float)
TSTITCH_KERNELS(float16, Float16)
TSTITCH_KERNELS(bfloat16, Bfloat16)

struct alignas(16) Sixteen {
    unsigned char bytes[16];
};

// target[half, i] = source[half, active[i]], rows of bytes; y of the grid is half * batch + i. A thread copies 16
// bytes: at once where rows start at multiples of 16.
extern "C" __global__ void gather_rows(const int* active, const unsigned char* source, unsigned char* target, int batch,
                                       int lanes, unsigned long long row_bytes, unsigned long long source_stride) {
    const unsigned long long byte = 16 * (blockIdx.x * static_cast<unsigned long long>(blockDim.x) + threadIdx.x);
    if (byte >= row_bytes) return;
    const int at = blockIdx.y, half = at / batch;
    const unsigned long long row = static_cast<unsigned long long>(half) * lanes + lane_at(active, at % batch);
    source += row * source_stride + byte;
    target += at * row_bytes + byte;
    if (row_bytes % 16 == 0 && source_stride % 16 == 0) {
        *reinterpret_cast<Sixteen*>(target) = *reinterpret_cast<const Sixteen*>(source);
    } else {
        for (int k = 0; k < 16 && byte + k < row_bytes; ++k) target[k] = source[k];
    }
}

// One lane's latent: scale * z of the initial step.
extern "C" __global__ void initial_noise(float* latent, unsigned long long seed, float scale, int elements) {
    const int element = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (element >= elements) return;
    float z[4];
    four_normals(seed, INITIAL_NOISE_STEP, static_cast<std::uint64_t>(element / 4), z[0], z[1], z[2], z[3]);
    for (float& value : z) value *= scale;
    const bool aligned = elements % 4 == 0 && reinterpret_cast<unsigned long long>(latent) % 16 == 0;  // any stride
    store4(latent + element, aligned, elements - element, z);
}

// Latents that someone else holds on the device, into the arena: target = scale * source. One element per thread, since
// a foreign address need not be a multiple of 16.
extern "C" __global__ void scaled_copy(float* target, const float* source, float scale, unsigned long long elements) {
    const unsigned long long element = blockIdx.x * static_cast<unsigned long long>(blockDim.x) + threadIdx.x;
    if (element < elements) target[element] = scale * source[element];
}
