/* A whole trajectory with a model that is one line: the program of docs/how-to/c.md. */
#include <math.h>
#include <stdio.h>
#include <tstitch/step.h>

enum { STEPS = 20, CHANNELS = 4, SPATIAL = 8 * 8, ELEMENTS = CHANNELS * SPATIAL };

/* The perfect noise predictor of a data set that is one image, everywhere 0.25. */
static void engine(const float* sample, const int64_t* timestep, float* output) {
    const double u = 1.5 * (double)timestep[0] / 1000;
    for (int e = 0; e < ELEMENTS; ++e) output[e] = (float)((sample[e] - 0.25 * cos(u)) / sin(u));
}

int main(void) {
    static float latents[ELEMENTS], history[TSTITCH_HISTORY * ELEMENTS], rows[STEPS * TSTITCH_ROW_SIZE],
        sample[ELEMENTS], output[ELEMENTS];
    int32_t step[1] = {0}, fault[1] = {-1};
    const int32_t active[1] = {0};
    const uint64_t seed[1] = {42};
    int64_t timestep[1];

    for (int i = 0; i < STEPS; ++i) { /* DDIM with alpha = cos(u), sigma = sin(u), u = 1.5 t / 1000 */
        const double u = 1.5 * (STEPS - i) / STEPS, next = 1.5 * (STEPS - i - 1) / STEPS;
        float* row = rows + i * TSTITCH_ROW_SIZE;
        row[TSTITCH_ROW_T] = (float)(1000 * (STEPS - i) / STEPS);
        row[TSTITCH_ROW_C_IN] = 1;
        row[TSTITCH_ROW_P] = (float)(1 / cos(u));
        row[TSTITCH_ROW_Q] = (float)(-tan(u));
        row[TSTITCH_ROW_A] = (float)(sin(next) / sin(u));
        row[TSTITCH_ROW_B] = (float)(cos(next) - sin(next) / tan(u));
    }
    tstitch_lanes lanes = {
        .latents = latents,
        .history = history,
        .rows = rows,
        .step = step,
        .seed = seed,
        .fault = fault,
        .lanes = 1,
        .row_count = STEPS,
        .channels = CHANNELS,
        .spatial = SPATIAL,
    };
    tstitch_arena* arena;
    if (tstitch_arena_create(&lanes, 0, NULL, &arena) || tstitch_initial_noise(arena, 0, 1.0f)) goto failed;
    for (int i = 0; i < STEPS; ++i) {
        if (tstitch_prepare(arena, active, 1, sample, TSTITCH_FLOAT32, timestep, TSTITCH_INT64, false)) goto failed;
        engine(sample, timestep, output);
        if (tstitch_advance(arena, active, 1, output, TSTITCH_FLOAT32, CHANNELS, false, false)) goto failed;
    }
    tstitch_arena_destroy(arena);
    printf("tstitch %s: x[0] = %.4f, fault = %d\n", tstitch_version(), latents[0], fault[0]);
    return fabsf(latents[0] - 0.25f) < 1e-3f && fault[0] == -1 ? 0 : 1;
failed:
    fprintf(stderr, "%s\n", tstitch_last_error());
    tstitch_arena_destroy(arena);
    return 1;
}
