/* Several threads at once: each with an arena of its own over shared rows, and all with the one pool. Every one must
 * get what a single thread gets. Built with -fsanitize=thread (the preset tsan) it also shows that nothing is raced
 * for. */
#define _POSIX_C_SOURCE 200112L
#include <pthread.h>
#include <string.h>

#include "check.h"
#include "ddim.h"

enum { CALLERS = 4, LANES = 2, CHANNELS = 2, SPATIAL = 40000, ELEMENTS = CHANNELS * SPATIAL, ROUNDS = 2 };

static float rows[LANES * STEPS * TSTITCH_ROW_SIZE]; /* shared, read by all */
static const int32_t active[LANES] = {1, 0};
static const uint64_t seed[LANES] = {7, 8};

typedef struct walk {
    float latents[LANES * ELEMENTS], history[TSTITCH_HISTORY * LANES * ELEMENTS], sample[LANES * ELEMENTS];
    int32_t step[LANES], fault[LANES];
    int64_t timestep[LANES];
    int threads, wrong;
} walk;

static void* run(void* argument) {
    walk* const w = argument;
    tstitch_lanes all = {0};
    tstitch_arena* arena = NULL;
    all.latents = w->latents;
    all.history = w->history;
    all.rows = rows;
    all.step = w->step;
    all.seed = seed;
    all.fault = w->fault;
    all.lanes = LANES;
    all.row_count = STEPS;
    all.channels = CHANNELS;
    all.spatial = SPATIAL;
    w->wrong = tstitch_arena_create(&all, w->threads, NULL, &arena) != TSTITCH_OK;
    for (int round = 0; round < ROUNDS && !w->wrong; ++round) {
        for (int lane = 0; lane < LANES; ++lane) {
            w->step[lane] = 0;
            w->fault[lane] = -1;
            w->wrong |= tstitch_initial_noise(arena, lane, 1.0f) != TSTITCH_OK;
        }
        for (int i = 0; i < STEPS; ++i) {
            w->wrong |= tstitch_prepare(arena, active, LANES, w->sample, TSTITCH_FLOAT32, w->timestep, TSTITCH_INT64,
                                        false) != TSTITCH_OK;
            w->wrong |=
                tstitch_advance(arena, active, LANES, w->sample, TSTITCH_FLOAT32, CHANNELS, false, false) != TSTITCH_OK;
        }
        /* an error of this thread, which no other one may see */
        w->wrong |= tstitch_initial_noise(arena, 100 + w->threads, 1.0f) != TSTITCH_BAD_INPUT;
        char expected[32];
        snprintf(expected, sizeof expected, "lane = %d;", 100 + w->threads);
        w->wrong |= strncmp(tstitch_last_error(), expected, strlen(expected)) != 0;
    }
    tstitch_arena_destroy(arena);
    return NULL;
}

int main(void) {
    static walk alone, walks[CALLERS];
    pthread_t callers[CALLERS];
    for (int lane = 0; lane < LANES; ++lane) ddim_rows(rows + lane * STEPS * TSTITCH_ROW_SIZE, 0, 0);
    alone.threads = 1;
    run(&alone);
    CHECK(!alone.wrong);
    for (int i = 0; i < CALLERS; ++i) {
        walks[i].threads = i + 1;
        CHECK(pthread_create(&callers[i], NULL, run, &walks[i]) == 0);
    }
    for (int i = 0; i < CALLERS; ++i) {
        CHECK(pthread_join(callers[i], NULL) == 0);
        CHECK(!walks[i].wrong);
        CHECK(memcmp(walks[i].latents, alone.latents, sizeof alone.latents) == 0);
    }
    return failures != 0;
}
