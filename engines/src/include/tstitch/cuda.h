/* The step kernels on an NVIDIA GPU: what step_kernels.fatbin holds and how its kernels are launched. C99, header only.
 *
 * The fat binary is loaded with cuModuleLoadDataEx (or cuLibraryLoadData) and its kernels found by name; this header
 * needs nothing of CUDA's. The arrays are those of tstitch_lanes (tstitch/step.h) in device memory. One step, in the
 * order of one stream:
 *
 *     [gather_rows ...] -> prepare -> your engine -> [guidance_factor] -> advance
 *
 * Nothing in it reads the host or waits, so it may be captured into a CUDA graph that is then replayed for every step.
 *
 * For each kernel there is a struct of its arguments in their order, and a macro that makes cuLaunchKernel's
 * kernelParams of it:
 *
 *     tstitch_cuda_prepare a = {.latents = ...};
 *     void* parameters[] = TSTITCH_CUDA_PREPARE_PARAMETERS(a);
 *     cuLaunchKernel(prepare_float16_int64, tstitch_cuda_blocks(elements), batch, 1, TSTITCH_CUDA_THREADS, 1, 1, 0,
 *                    stream, parameters, NULL);
 *
 *     kernel                        grid                            threads per block (T)
 *     prepare_SAMPLE_TIMESTEP       tstitch_cuda_blocks(e), batch   TSTITCH_CUDA_THREADS
 *     guidance_factor_OUTPUT        batch                           TSTITCH_CUDA_MOMENT_THREADS
 *     advance_OUTPUT                tstitch_cuda_blocks(e), batch   TSTITCH_CUDA_THREADS
 *     gather_rows                   tstitch_cuda_row_blocks(bytes), TSTITCH_CUDA_THREADS
 *                                   halves * batch
 *     initial_noise                 tstitch_cuda_blocks(e)          TSTITCH_CUDA_THREADS
 *     scaled_copy                   (elements + T - 1) / T          TSTITCH_CUDA_THREADS
 *
 * SAMPLE and OUTPUT: float32, float16, bfloat16; TIMESTEP: float32, int64.
 *
 * "elements" (e) is channels * spatial of one lane, below 2^30; "output_elements" is that, or twice that for a model
 * that predicts its variance. "stride" is that of tstitch_lanes, but never 0. Arrays are aligned to 16 bytes. The
 * kernels can't check what the host driver refuses: active holds lanes of the arena, each at most once, and -1 for
 * spare positions after the first. A lane whose step lies outside its table, a row whose T, FLAGS or GUIDED_CHANNELS
 * tstitch_advance refuses, a row with TSTITCH_FLAG_LEARNED without the model's second half, a row that uses an array
 * which is 0, and a latent that is not finite are noted in fault.
 */
#ifndef TSTITCH_CUDA_H
#define TSTITCH_CUDA_H

#include <stdint.h>

enum {
    TSTITCH_CUDA_THREADS = 256,        /* per block; each thread takes four elements */
    TSTITCH_CUDA_MOMENT_THREADS = 512, /* per block of guidance_factor, exactly */
    TSTITCH_CUDA_CURRENT_BYTES = 112
};

typedef uint64_t tstitch_cuda_pointer; /* a CUdeviceptr, or a device address as an integer */

static inline unsigned tstitch_cuda_blocks(int64_t elements) {
    return (unsigned)((elements + 4 * TSTITCH_CUDA_THREADS - 1) / (4 * TSTITCH_CUDA_THREADS));
}

static inline unsigned tstitch_cuda_row_blocks(uint64_t row_bytes) {
    return (unsigned)((row_bytes + 16 * TSTITCH_CUDA_THREADS - 1) / (16 * TSTITCH_CUDA_THREADS));
}

/* See tstitch_prepare. */
typedef struct tstitch_cuda_prepare {
    tstitch_cuda_pointer latents, rows, step, active; /* float, float, int32, int32 */
    tstitch_cuda_pointer current; /* [batch] of TSTITCH_CUDA_CURRENT_BYTES, written: for the two kernels below */
    tstitch_cuda_pointer sample, timestep; /* written */
    int32_t row_count, elements, stride, guided;
} tstitch_cuda_prepare;
#define TSTITCH_CUDA_PREPARE_PARAMETERS(a)                                                 \
    {&(a).latents,  &(a).rows,      &(a).step,     &(a).active, &(a).current, &(a).sample, \
     &(a).timestep, &(a).row_count, &(a).elements, &(a).stride, &(a).guided}

/* Only where rows have a RESCALE: writes one factor for each position of the batch, which advance then reads. */
typedef struct tstitch_cuda_guidance_factor {
    tstitch_cuda_pointer current, output;
    tstitch_cuda_pointer factors; /* float [batch], written */
    int32_t elements, spatial, output_elements;
} tstitch_cuda_guidance_factor;
#define TSTITCH_CUDA_GUIDANCE_FACTOR_PARAMETERS(a) \
    {&(a).current, &(a).output, &(a).factors, &(a).elements, &(a).spatial, &(a).output_elements}

/* See tstitch_advance; active is what the last prepare was given. */
typedef struct tstitch_cuda_advance {
    tstitch_cuda_pointer latents, history, current, step, seed, fault, active, output;
    tstitch_cuda_pointer factors;               /* of guidance_factor, or 0: no rescale */
    tstitch_cuda_pointer y, image, mask, noise; /* or 0 where no row uses them */
    int32_t lanes, elements, stride, spatial, output_elements, guided;
} tstitch_cuda_advance;
#define TSTITCH_CUDA_ADVANCE_PARAMETERS(a)                                          \
    {&(a).latents, &(a).history, &(a).current,         &(a).step,    &(a).seed,     \
     &(a).fault,   &(a).active,  &(a).output,          &(a).factors, &(a).y,        \
     &(a).image,   &(a).mask,    &(a).noise,           &(a).lanes,   &(a).elements, \
     &(a).stride,  &(a).spatial, &(a).output_elements, &(a).guided}

/* See tstitch_gather_rows. Rows are copied 16 bytes at once where row_bytes and source_stride are multiples of 16. */
typedef struct tstitch_cuda_gather_rows {
    tstitch_cuda_pointer active, source, target; /* int32, bytes, bytes */
    int32_t batch, lanes;
    uint64_t row_bytes, source_stride;
} tstitch_cuda_gather_rows;
#define TSTITCH_CUDA_GATHER_ROWS_PARAMETERS(a) \
    {&(a).active, &(a).source, &(a).target, &(a).batch, &(a).lanes, &(a).row_bytes, &(a).source_stride}

/* Writes scale * z into one lane's latent. */
typedef struct tstitch_cuda_initial_noise {
    tstitch_cuda_pointer latent; /* of the lane: latents + lane * stride * 4 bytes */
    uint64_t seed;
    float scale;
    int32_t elements;
} tstitch_cuda_initial_noise;
#define TSTITCH_CUDA_INITIAL_NOISE_PARAMETERS(a) {&(a).latent, &(a).seed, &(a).scale, &(a).elements}

/* target[e] = scale * source[e]: latents from elsewhere, at any address, into the arena. */
typedef struct tstitch_cuda_scaled_copy {
    tstitch_cuda_pointer target, source; /* float */
    float scale;
    uint64_t elements;
} tstitch_cuda_scaled_copy;
#define TSTITCH_CUDA_SCALED_COPY_PARAMETERS(a) {&(a).target, &(a).source, &(a).scale, &(a).elements}

#endif
