/* The step kernels on the CPU, for programs that do not speak Python. C99; link with tstitch::step.
 *
 * Diffusion sampling around any engine (ONNX Runtime, TensorRT...), for a batch of images ("lanes") that may each be at
 * a step of their own:
 *
 *     fill rows, seed, step = 0, fault = -1; tstitch_initial_noise for each lane
 *     repeat:  tstitch_prepare -> your engine -> tstitch_advance
 *
 * Each step of a lane reads one row of its table, TSTITCH_ROW_SIZE floats:
 *
 *     m  = c                                       if not guided
 *     m  = u + G (c - u)                           on the first GUIDED_CHANNELS channels, c on the others
 *     m  = RESCALE (std(c)/std(m)) m + (1 - RESCALE) m     over the same channels (arXiv 2305.08891, eq. 15-16)
 *     D  = P x + Q m
 *     x' = A x + B D + C D1 + E D2 + F D3 + Y y + S z      D1, D2, D3: D of the steps before; z: Gaussian noise
 *     y' = YX x + YY y + YB D + YC D1 + YE D2 + YF D3      y: a second remembered state; with TSTITCH_FLAG_STORE_Y
 *     x' = mask x' + (1 - mask) (IMAGE_A x0 + IMAGE_S z0)  for inpainting; with TSTITCH_FLAG_INPAINT
 *
 * c and u are the model's conditional and unconditional output, x0 a picture's latent and z0 the lane's initial
 * noise. tstitch_engines/device/step_row.py has the same layout, and
 * tstitch_trt.solvers makes such tables. tstitch/cuda.h has the same steps on an NVIDIA GPU.
 *
 * Ownership: all arrays belong to the caller and stay where they are from tstitch_arena_create to
 * tstitch_arena_destroy; between calls the caller may read and write them. Nothing is allocated that outlives its call
 * but the arena object itself and the sleeping threads of the process's one pool.
 *
 * Threads: one arena is used by one thread at a time; different arenas may be used at once. Results do not depend on
 * the number of threads, nor a lane's result on the other lanes of its batch.
 *
 * Errors: no exception leaves these functions. A call that does not return TSTITCH_OK has not changed latents, history,
 * step or fault, and tstitch_last_error says what was wrong. Refused are null and misaligned arrays, sizes whose
 * product is more than fits into memory, unknown dtypes, positions that name no lane or one twice, a lane whose step
 * lies outside its table, and a row that can't be right: a number that is not finite, FLAGS that are no sum of
 * TSTITCH_FLAG_*, a T that does not fit into 64 bits, GUIDED_CHANNELS below 0. How large an array is, only the caller
 * knows.
 */
#ifndef TSTITCH_STEP_H
#define TSTITCH_STEP_H

#include <stdbool.h>
#include <stdint.h>

#if defined(TSTITCH_EXPORTS) /* set while the shared library itself is compiled */
#define TSTITCH_API __attribute__((visibility("default")))
#else
#define TSTITCH_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------------ constants */

/* The floats of a row. */
enum {
    TSTITCH_ROW_T,    /* timestep given to the model */
    TSTITCH_ROW_C_IN, /* factor on the latent before the model sees it */
    TSTITCH_ROW_P,
    TSTITCH_ROW_Q,
    TSTITCH_ROW_A,
    TSTITCH_ROW_B,
    TSTITCH_ROW_C,
    TSTITCH_ROW_E,
    TSTITCH_ROW_S,
    TSTITCH_ROW_G,               /* guidance scale */
    TSTITCH_ROW_RESCALE,         /* guidance rescale, 0 = off */
    TSTITCH_ROW_GUIDED_CHANNELS, /* how many leading channels are guided */
    TSTITCH_ROW_LOG_STD_MIN,     /* with TSTITCH_FLAG_LEARNED: S exp(min + (max - min) (w + 1) / 2) scales z, */
    TSTITCH_ROW_LOG_STD_MAX,     /* w being the model's second half of channels */
    TSTITCH_ROW_FLAGS,           /* sum of TSTITCH_FLAG_*, as a float */
    TSTITCH_ROW_F,
    TSTITCH_ROW_Y,
    TSTITCH_ROW_YX,
    TSTITCH_ROW_YY,
    TSTITCH_ROW_YB,
    TSTITCH_ROW_YC,
    TSTITCH_ROW_YE,
    TSTITCH_ROW_YF,
    TSTITCH_ROW_IMAGE_A, /* with TSTITCH_FLAG_INPAINT: the noise level of x' */
    TSTITCH_ROW_IMAGE_S,
    TSTITCH_ROW_SIZE
};

enum {
    TSTITCH_FLAG_LEARNED = 1,     /* the noise scale is read from the model's second half of channels */
    TSTITCH_FLAG_STORE = 2,       /* a later row reads this step's D (one of its C, E, F, YC, YE, YF is not 0) */
    TSTITCH_FLAG_STORE_Y = 4,     /* y becomes y'; without it y stays */
    TSTITCH_FLAG_INPAINT = 8,     /* the picture is kept outside the mask */
    TSTITCH_FLAG_GIVEN_NOISE = 16 /* z0 of inpainting is read from noise; without it drawn as tstitch_initial_noise */
};

enum { TSTITCH_HISTORY = 3 }; /* the D that a lane remembers: that of step i in slot i % 3 */

#define TSTITCH_INITIAL_NOISE_STEP 0xFFFFFFFFu /* the Philox "step" of a lane's initial latent */

#ifdef __cplusplus
typedef enum tstitch_dtype : int { /* any value may come from C: it is checked, and must not be undefined before */
#else
typedef enum tstitch_dtype {
#endif
                                   TSTITCH_FLOAT32,
                                   TSTITCH_FLOAT16,
                                   TSTITCH_BFLOAT16,
                                   TSTITCH_INT64 /* timesteps only */
} tstitch_dtype;

typedef enum tstitch_status {
    TSTITCH_OK,
    TSTITCH_BAD_INPUT, /* an argument can't be right */
    TSTITCH_OUT_OF_MEMORY,
    TSTITCH_FAILED /* anything else: a bug of ours */
} tstitch_status;

/* What the calling thread's last failed call had to say: the value it got and what is allowed. Never null; valid until
 * this thread's next failed call. */
TSTITCH_API const char* tstitch_last_error(void);

TSTITCH_API const char* tstitch_version(void); /* "major.minor.patch" */

/* ---------------------------------------------------------------------------------------------------------- arena */

/* The caller's memory, C-contiguous and naturally aligned; no two arrays overlap. Set unused fields to 0. spatial is
 * height * width (times frames): its shape does not matter here. Read here only: rows, seed.
 *
 * Lanes may lie further apart than their elements: stride is the number of elements from one lane to the next in
 * latents, history, y, image and noise, and stride / channels that in mask; 0 means channels * spatial. So arenas of
 * several latent sizes can share the same arrays: each lane is used through the arena of its size. */
typedef struct tstitch_lanes {
    float* latents;       /* [lanes, channels, spatial] */
    float* history;       /* [TSTITCH_HISTORY, lanes, channels, spatial]; need not be initialised */
    const float* rows;    /* [lanes, row_count, TSTITCH_ROW_SIZE] */
    int32_t* step;        /* [lanes]: the row that is next, 0 to row_count - 1; row_count once the lane is finished */
    const uint64_t* seed; /* [lanes] */
    int32_t* fault;       /* [lanes]: set it to -1; the first step whose new latent was not finite is noted here */
    int64_t lanes, row_count, channels, spatial;
    /* May be null where no row uses them. Read only, but y. */
    float* y;           /* [lanes, channels, spatial]; need not be initialised */
    const float* image; /* [lanes, channels, spatial]: x0 of inpainting */
    const float* mask;  /* [lanes, 1, spatial]: 1 where the picture is drawn, 0 where it is known */
    const float* noise; /* [lanes, channels, spatial]: z0 of inpainting, unit Gaussian */
    int64_t stride;     /* 0, or a multiple of channels, at least channels * spatial */
} tstitch_lanes;

typedef struct tstitch_arena tstitch_arena;

/* threads: the most that a call may use, the caller among them, up to 1024; 0 = as many as this process may run on.
 * Small batches stay on the calling thread. isa: the name of an instruction set (see tstitch_isa), or null for the
 * best. The struct is copied, the arrays are not. On failure *arena is null. */
TSTITCH_API tstitch_status tstitch_arena_create(const tstitch_lanes* lanes, int threads, const char* isa,
                                                tstitch_arena** arena);
TSTITCH_API void tstitch_arena_destroy(tstitch_arena* arena); /* null is allowed */

/* Writes scale * z, scale being finite, into the lane's latent; z is keyed by seed[lane] and
 * TSTITCH_INITIAL_NOISE_STEP. */
TSTITCH_API tstitch_status tstitch_initial_noise(tstitch_arena* arena, int32_t lane, float scale);

/* active[0 .. batch - 1] are the lanes of a call, each at most once. -1 is a spare position, which fills a batch up;
 * the first position is none. The model is given there what it is given at the first position, and advance changes
 * nothing.
 */

/* The model's input from the active lanes at their own steps:
 *     sample[i] = C_IN * latents[active[i]], rounded to sample_dtype;  timestep[i] = T, to the nearest for
 * TSTITCH_INT64. With guided both arrays hold 2 * batch entries: i and batch + i are the same, for the conditional and
 * the unconditional half. sample is [batch or 2 * batch, channels, spatial]. */
TSTITCH_API tstitch_status tstitch_prepare(tstitch_arena* arena, const int32_t* active, int64_t batch, void* sample,
                                           tstitch_dtype sample_dtype, void* timestep, tstitch_dtype timestep_dtype,
                                           bool guided);

/* One step of the same lanes from the model's output: updates latents, history, y and fault, adds 1 to step.
 * model_output is [batch or 2 * batch, output_channels, spatial], conditional entries first; output_channels is
 * channels, or twice that for a model that predicts its variance (the second half is read only by rows with
 * TSTITCH_FLAG_LEARNED). Without rescale the RESCALE of the rows is ignored, which saves a pass over the output.
 * A latent that is not finite is no error of this call: see tstitch_lanes.fault. */
TSTITCH_API tstitch_status tstitch_advance(tstitch_arena* arena, const int32_t* active, int64_t batch,
                                           const void* model_output, tstitch_dtype dtype, int64_t output_channels,
                                           bool guided, bool rescale);

/* Rows of bytes that each lane has, such as its conditioning, gathered for a batch:
 *     target[half, i] = source[half, active[i]]    for half in [0, halves) and i in [0, batch)
 * source is [halves, lanes] rows that start source_stride bytes apart, target [halves, batch] rows of row_bytes without
 * gaps. */
TSTITCH_API tstitch_status tstitch_gather_rows(const int32_t* active, int64_t batch, const void* source, int64_t lanes,
                                               int64_t source_stride, void* target, int64_t row_bytes, int64_t halves);

/* --------------------------------------------------------------------------------------------------------- random */

/* out[e] = scale * z_e for e in [0, count): the normals that a lane of that seed draws at that step. */
TSTITCH_API tstitch_status tstitch_normals(float* out, int64_t count, uint64_t seed, uint32_t step, float scale,
                                           int threads, const char* isa);

/* Philox 4x32-10 (Salmon et al., SC 2011), low words first. Element 4 b + k of a lane is made of the counter
 * {b, b >> 32, step, 0} and the key {seed, seed >> 32}. None of the three is null. */
TSTITCH_API void tstitch_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* The instruction sets that this CPU can run, best first; null when index is past the last. */
TSTITCH_API const char* tstitch_isa(int index);

#ifdef __cplusplus
}
#endif

#endif
