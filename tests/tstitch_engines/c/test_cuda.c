/* tstitch/cuda.h: its argument structs and launch shapes give, by the CUDA driver's source walked on the CPU
 * (cuda_on_host/launch.cpp), what the host driver gives. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <tstitch/cuda.h>
#include <tstitch/step.h>

#include "check.h"

enum { LANES = 3, BATCH = 2, STEPS = 2, CHANNELS = 3, SPATIAL = 401, ELEMENTS = CHANNELS * SPATIAL };
enum { ROOM = 404, STRIDE = CHANNELS * ROOM, ROW = 96, PITCH = 128 }; /* lanes lie further apart than their size */

/* Of cuda_on_host/launch.cpp: the number of arguments that the kernel takes. */
int launch(const char* name, int grid_x, int grid_y, int threads, int count, void** arguments);

#define LAUNCH(name, x, y, threads, parameters)                                         \
    do {                                                                                \
        const int count_ = (int)(sizeof parameters / sizeof parameters[0]);             \
        CHECK(launch(name, (int)(x), (int)(y), threads, count_, parameters) == count_); \
    } while (0)

#define ALIGNED __attribute__((aligned(16))) /* as the kernels ask for */

typedef struct state {
    ALIGNED float latents[LANES * STRIDE];
    ALIGNED float history[TSTITCH_HISTORY * LANES * STRIDE], y[LANES * STRIDE];
    ALIGNED float sample[2 * BATCH * ELEMENTS];
    ALIGNED float copy[LANES * STRIDE];
    ALIGNED unsigned char gathered[2 * BATCH * ROW];
    ALIGNED int64_t timestep[2 * BATCH];
    ALIGNED unsigned char current[BATCH * TSTITCH_CUDA_CURRENT_BYTES];
    int32_t step[LANES], fault[LANES];
} state;

ALIGNED static float rows[LANES * STEPS * TSTITCH_ROW_SIZE], output[2 * BATCH * 2 * ELEMENTS];
ALIGNED static float image[LANES * STRIDE], mask[LANES * ROOM], given[LANES * STRIDE];
ALIGNED static unsigned char conditioning[2 * LANES * PITCH];
static const uint64_t seed[LANES] = {1, 2, (uint64_t)-3};
static const int32_t active[BATCH] = {2, 0};

static float uniform(void) { return (float)rand() / (float)RAND_MAX; }

static tstitch_cuda_pointer address(const void* pointer) { return (tstitch_cuda_pointer)(uintptr_t)pointer; }

static void on_host(state* s) {
    tstitch_lanes all = {0};
    tstitch_arena* arena = NULL;
    all.latents = s->latents;
    all.history = s->history;
    all.y = s->y;
    all.image = image;
    all.mask = mask;
    all.noise = given;
    all.rows = rows;
    all.step = s->step;
    all.seed = seed;
    all.fault = s->fault;
    all.lanes = LANES;
    all.row_count = STEPS;
    all.channels = CHANNELS;
    all.spatial = SPATIAL;
    all.stride = STRIDE;
    CHECK_OK(tstitch_arena_create(&all, 1, NULL, &arena));
    CHECK_OK(tstitch_initial_noise(arena, 2, 3.0f));
    CHECK_OK(tstitch_gather_rows(active, BATCH, conditioning, LANES, PITCH, s->gathered, ROW, 2));
    for (int i = 0; i < STEPS; ++i) {
        CHECK_OK(tstitch_prepare(arena, active, BATCH, s->sample, TSTITCH_FLOAT32, s->timestep, TSTITCH_INT64, true));
        CHECK_OK(tstitch_advance(arena, active, BATCH, output, TSTITCH_FLOAT32, 2 * CHANNELS, true, true));
    }
    tstitch_arena_destroy(arena);
    for (int i = 0; i < LANES * STRIDE; ++i) s->copy[i] = 0.25f * s->latents[i];
}

static void on_cuda(state* s, bool rescale) {
    float factors[BATCH];
    const unsigned blocks = tstitch_cuda_blocks(ELEMENTS);
    tstitch_cuda_initial_noise noise = {0};
    tstitch_cuda_prepare prepare = {0};
    tstitch_cuda_guidance_factor factor = {0};
    tstitch_cuda_advance advance = {0};
    tstitch_cuda_scaled_copy copy = {0};
    tstitch_cuda_gather_rows gather = {0};

    noise.latent = address(s->latents + 2 * STRIDE);
    noise.seed = seed[2];
    noise.scale = 3.0f;
    noise.elements = ELEMENTS;

    prepare.latents = advance.latents = address(s->latents);
    prepare.rows = address(rows);
    prepare.current = factor.current = advance.current = address(s->current);
    prepare.step = advance.step = address(s->step);
    prepare.active = advance.active = address(active);
    prepare.sample = address(s->sample);
    prepare.timestep = address(s->timestep);
    prepare.row_count = STEPS;
    prepare.elements = factor.elements = advance.elements = ELEMENTS;
    prepare.stride = advance.stride = STRIDE;
    prepare.guided = advance.guided = 1;

    factor.output = advance.output = address(output);
    factor.factors = address(factors);
    advance.factors = rescale ? factor.factors : 0;
    factor.spatial = advance.spatial = SPATIAL;
    factor.output_elements = advance.output_elements = 2 * ELEMENTS;

    advance.history = address(s->history);
    advance.y = address(s->y);
    advance.image = address(image);
    advance.mask = address(mask);
    advance.noise = address(given);
    advance.seed = address(seed);
    advance.fault = address(s->fault);
    advance.lanes = LANES;

    copy.target = address(s->copy);
    copy.source = address(s->latents);
    copy.scale = 0.25f;
    copy.elements = LANES * STRIDE;

    gather.active = address(active);
    gather.source = address(conditioning);
    gather.target = address(s->gathered);
    gather.batch = BATCH;
    gather.lanes = LANES;
    gather.row_bytes = ROW;
    gather.source_stride = PITCH;

    void* of_noise[] = TSTITCH_CUDA_INITIAL_NOISE_PARAMETERS(noise);
    void* of_prepare[] = TSTITCH_CUDA_PREPARE_PARAMETERS(prepare);
    void* of_factor[] = TSTITCH_CUDA_GUIDANCE_FACTOR_PARAMETERS(factor);
    void* of_advance[] = TSTITCH_CUDA_ADVANCE_PARAMETERS(advance);
    void* of_gather[] = TSTITCH_CUDA_GATHER_ROWS_PARAMETERS(gather);
    void* of_copy[] = TSTITCH_CUDA_SCALED_COPY_PARAMETERS(copy);
    LAUNCH("initial_noise", blocks, 1, TSTITCH_CUDA_THREADS, of_noise);
    LAUNCH("gather_rows", tstitch_cuda_row_blocks(ROW), 2 * BATCH, TSTITCH_CUDA_THREADS, of_gather);
    for (int i = 0; i < STEPS; ++i) {
        LAUNCH("prepare_float32_int64", blocks, BATCH, TSTITCH_CUDA_THREADS, of_prepare);
        if (rescale) LAUNCH("guidance_factor_float32", BATCH, 1, TSTITCH_CUDA_MOMENT_THREADS, of_factor);
        LAUNCH("advance_float32", blocks, BATCH, TSTITCH_CUDA_THREADS, of_advance);
    }
    LAUNCH("scaled_copy", (LANES * STRIDE + TSTITCH_CUDA_THREADS - 1) / TSTITCH_CUDA_THREADS, 1, TSTITCH_CUDA_THREADS,
           of_copy);
}

/* A row whose numbers can't be cast to whole ones is a fault of its lane, before anything is cast. */
static void test_bad_rows(void) {
    static const struct {
        int field;
        float value;
    } bad[] = {
        {TSTITCH_ROW_FLAGS, NAN},  {TSTITCH_ROW_FLAGS, 1e30f}, {TSTITCH_ROW_FLAGS, 32},
        {TSTITCH_ROW_FLAGS, -1},   {TSTITCH_ROW_FLAGS, 0.5f},  {TSTITCH_ROW_T, NAN},
        {TSTITCH_ROW_T, INFINITY}, {TSTITCH_ROW_T, -1e19f},    {TSTITCH_ROW_GUIDED_CHANNELS, NAN},
    };
    static state fresh;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
        float* const number = rows + (2 * STEPS + 1) * TSTITCH_ROW_SIZE + bad[i].field;
        const float before = *number;
        state s = fresh;
        for (int lane = 0; lane < LANES; ++lane) s.fault[lane] = -1;
        *number = bad[i].value;
        on_cuda(&s, false);
        CHECK(s.fault[2] == 1 && s.fault[0] == -1);
        *number = before;
    }
}

int main(void) {
    static state host, cuda;
    for (int i = 0; i < LANES * STEPS; ++i) {
        float* row = rows + i * TSTITCH_ROW_SIZE;
        for (int k = 0; k < TSTITCH_ROW_SIZE; ++k) row[k] = 0.2f + 0.6f * uniform();
        row[TSTITCH_ROW_T] = 100.0f * uniform();
        row[TSTITCH_ROW_C] = i % STEPS ? 0.3f : 0.0f;
        row[TSTITCH_ROW_E] = row[TSTITCH_ROW_F] = row[TSTITCH_ROW_YE] = row[TSTITCH_ROW_YF] = 0;
        row[TSTITCH_ROW_YC] = row[TSTITCH_ROW_C];
        row[TSTITCH_ROW_GUIDED_CHANNELS] = 2;
        row[TSTITCH_ROW_FLAGS] = TSTITCH_FLAG_STORE + TSTITCH_FLAG_LEARNED + TSTITCH_FLAG_STORE_Y +
                                 TSTITCH_FLAG_INPAINT + (i % 2 ? TSTITCH_FLAG_GIVEN_NOISE : 0);
    }
    for (size_t i = 0; i < sizeof output / sizeof output[0]; ++i) output[i] = 2 * uniform() - 1;
    for (int i = 0; i < LANES * STRIDE; ++i) {
        host.latents[i] = 2 * uniform() - 1;
        image[i] = 2 * uniform() - 1;
        given[i] = 2 * uniform() - 1;
    }
    for (int i = 0; i < LANES * ROOM; ++i) mask[i] = uniform();
    for (int i = 0; i < 2 * LANES * PITCH; ++i) conditioning[i] = (unsigned char)rand();
    for (int lane = 0; lane < LANES; ++lane) host.fault[lane] = -1;
    cuda = host;
    on_host(&host);
    on_cuda(&cuda, true);
    for (int i = 0; i < LANES * STRIDE; ++i) {
        CHECK_CLOSE(cuda.latents[i], host.latents[i], 1e-5);
        CHECK_CLOSE(cuda.copy[i], host.copy[i], 1e-5);
        CHECK_CLOSE(cuda.y[i], host.y[i], 1e-5);
    }
    for (int i = 0; i < TSTITCH_HISTORY * LANES * STRIDE; ++i) CHECK_CLOSE(cuda.history[i], host.history[i], 1e-5);
    for (int i = 0; i < 2 * BATCH * ELEMENTS; ++i) CHECK_CLOSE(cuda.sample[i], host.sample[i], 1e-5);
    for (int half = 0; half < 2; ++half)
        for (int i = 0; i < BATCH; ++i)
            CHECK(memcmp(host.gathered + (half * BATCH + i) * ROW, conditioning + (half * LANES + active[i]) * PITCH,
                         ROW) == 0);
    CHECK(memcmp(cuda.gathered, host.gathered, sizeof host.gathered) == 0);
    CHECK(memcmp(cuda.timestep, host.timestep, sizeof host.timestep) == 0);
    CHECK(memcmp(cuda.step, host.step, sizeof host.step) == 0);
    CHECK(memcmp(cuda.fault, host.fault, sizeof host.fault) == 0);
    CHECK(host.step[0] == STEPS && host.step[1] == 0 && host.step[2] == STEPS);
    test_bad_rows();
    return failures != 0;
}
