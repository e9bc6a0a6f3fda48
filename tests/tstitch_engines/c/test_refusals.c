/* Every wrong argument is an error code and a message with what was got and what is allowed; nothing is changed. */
#include <math.h>
#include <string.h>
#include <tstitch/step.h>

#include "check.h"

static void refused(tstitch_status status, const char* says, int line) {
    if (status != TSTITCH_BAD_INPUT || strstr(tstitch_last_error(), says) == NULL) {
        fprintf(stderr, "line %d: status %d, \"%s\"; expected \"%s\"\n", line, (int)status, tstitch_last_error(), says);
        ++failures;
    }
}
#define REFUSED(call, says) refused(call, says, __LINE__)

int main(void) {
    float latents[2 * 3 * 4] = {0}, history[TSTITCH_HISTORY * 2 * 3 * 4], rows[2 * 1 * TSTITCH_ROW_SIZE] = {0},
                          out[2 * 2 * 2 * 3 * 4];
    float before[2 * 3 * 4] = {0};
    static float aligned[8];
    float* const timestep = (uintptr_t)aligned % 8 == 0 ? aligned : aligned + 1;
    int32_t step[2] = {0, 0}, fault[2] = {-1, -1};
    const int32_t both[2] = {0, 1}, outside[1] = {2}, negative[1] = {-1}, twice[2] = {1, 1};
    const uint64_t seed[2] = {1, 2};
    tstitch_lanes good = {0}, bad;
    tstitch_arena *arena = NULL, *none = (tstitch_arena*)out;

    CHECK(strcmp(tstitch_last_error(), "") == 0);
    good.latents = latents;
    good.history = history;
    good.rows = rows;
    good.step = step;
    good.seed = seed;
    good.fault = fault;
    good.lanes = 2;
    good.row_count = 1;
    good.channels = 3;
    good.spatial = 4;
    CHECK_OK(tstitch_arena_create(&good, 1, NULL, &arena));

    REFUSED(tstitch_arena_create(&good, 1, NULL, NULL), "arena is null");
    REFUSED(tstitch_arena_create(NULL, 1, NULL, &none), "lanes is null");
    CHECK(none == NULL);
    REFUSED(tstitch_arena_create(&good, -2, NULL, &none), "threads = -2; allowed is 0 (all) to 1024");
    REFUSED(tstitch_arena_create(&good, 100000, NULL, &none), "threads = 100000; allowed is 0 (all) to 1024");
    REFUSED(tstitch_arena_create(&good, 1, "mmx", &none), "no instruction set 'mmx'; allowed are ");
#define REFUSED_WITH(field, value, says) \
    bad = good;                          \
    bad.field = value;                   \
    REFUSED(tstitch_arena_create(&bad, 1, NULL, &none), says)
    REFUSED_WITH(latents, NULL, "latents is null");
    REFUSED_WITH(history, NULL, "history is null");
    REFUSED_WITH(rows, NULL, "rows is null");
    REFUSED_WITH(step, NULL, "step is null");
    REFUSED_WITH(seed, NULL, "seed is null");
    REFUSED_WITH(fault, NULL, "fault is null");
    REFUSED_WITH(lanes, 0, "lanes = 0; allowed is 1 or more");
    REFUSED_WITH(row_count, -1, "row_count = -1");
    REFUSED_WITH(channels, 0, "channels = 0");
    REFUSED_WITH(spatial, 0, "spatial = 0");
    REFUSED_WITH(spatial, INT64_MAX / 8, "more than fits into memory");
    REFUSED_WITH(row_count, INT64_MAX / 8, "more than fits into memory");
    REFUSED_WITH(stride, INT64_MAX / 8, "more than fits into memory");
    REFUSED_WITH(stride, 9, "stride = 9; allowed is 0, or a multiple of the 3 channels from 12 on");
    REFUSED_WITH(stride, 13, "stride = 13");
    REFUSED_WITH(stride, -12, "stride = -12");
    REFUSED_WITH(stride, INT64_MIN, "stride = -9223372036854775808");
    REFUSED_WITH(lanes, INT64_MAX, "more than fits into memory");
    REFUSED_WITH(lanes, (int64_t)1 << 31, "more than fits into memory");
    REFUSED_WITH(row_count, (int64_t)1 << 31, "more than fits into memory");
    REFUSED_WITH(channels, INT64_MAX, "more than fits into memory");
    REFUSED_WITH(channels, (int64_t)1 << 57, "more than fits into memory");
    REFUSED_WITH(channels, INT64_MIN, "channels = -9223372036854775808");
#define ODD(type, array) (type*)((char*)(array) + 1)
    REFUSED_WITH(latents, ODD(float, latents), "latents is at an address that is no multiple of 4");
    REFUSED_WITH(history, ODD(float, history), "history is at an address that is no multiple of 4");
    REFUSED_WITH(rows, ODD(float, rows), "rows is at an address that is no multiple of 4");
    REFUSED_WITH(step, ODD(int32_t, step), "step is at an address that is no multiple of 4");
    REFUSED_WITH(seed, (const uint64_t*)((const char*)seed + 4), "seed is at an address that is no multiple of 8");
    REFUSED_WITH(fault, ODD(int32_t, fault), "fault is at an address that is no multiple of 4");
    REFUSED_WITH(y, ODD(float, latents), "y is at an address that is no multiple of 4");
    REFUSED_WITH(image, ODD(float, latents), "image is at an address that is no multiple of 4");
    REFUSED_WITH(mask, ODD(float, latents), "mask is at an address that is no multiple of 4");
    REFUSED_WITH(noise, ODD(float, latents), "noise is at an address that is no multiple of 4");

    REFUSED(tstitch_initial_noise(NULL, 0, 1), "arena is null");
    REFUSED(tstitch_initial_noise(arena, 2, 1), "lane = 2; allowed is 0 to 1");
    REFUSED(tstitch_initial_noise(arena, INT32_MIN, 1), "lane = -2147483648; allowed is 0 to 1");
    REFUSED(tstitch_initial_noise(arena, 0, NAN), "scale = nan; allowed is a finite number");
#define GATHER(active, batch, source, lanes, stride, target, bytes, halves) \
    tstitch_gather_rows(active, batch, source, lanes, stride, target, bytes, halves)
    REFUSED(GATHER(NULL, 2, rows, 2, 8, out, 8, 1), "active is null");
    REFUSED(GATHER(both, -1, rows, 2, 8, out, 8, 1), "batch = -1");
    REFUSED(GATHER(both, 2, NULL, 2, 8, out, 8, 1), "source is null");
    REFUSED(GATHER(both, 2, rows, 2, 8, NULL, 8, 1), "target is null");
    REFUSED(GATHER(both, 2, rows, 0, 8, out, 8, 1), "lanes = 0");
    REFUSED(GATHER(both, 2, rows, 2, 8, out, 0, 1), "row_bytes = 0");
    REFUSED(GATHER(both, 2, rows, 2, 8, out, 8, 0), "halves = 0");
    REFUSED(GATHER(both, 2, rows, 2, 7, out, 8, 1), "source_stride = 7; allowed is row_bytes (8) or more");
    REFUSED(GATHER(both, 2, rows, 2, INT64_MAX / 3, out, 8, 2), "as far as the rows fit into memory");
    REFUSED(GATHER(both, 2, rows, 2, INT64_MIN, out, 8, 2), "source_stride = -9223372036854775808");
    REFUSED(GATHER(both, INT64_MAX / 4, rows, 2, 8, out, 8, 1), "more than fits into memory");
    REFUSED(GATHER(ODD(int32_t, step), 1, rows, 2, 8, out, 8, 1), "active is at an address that is no multiple of 4");
    REFUSED(GATHER(outside, 1, rows, 2, 8, out, 8, 1), "active[0] = 2 is no lane; allowed is 0 to 1");
    REFUSED(GATHER(negative, 1, rows, 2, 8, out, 8, 1), "active[0] = -1 is no lane; allowed is 0 to 1");
    CHECK_OK(GATHER(NULL, 0, NULL, 2, 8, NULL, 8, 1));
    REFUSED(tstitch_normals(NULL, 4, 0, 0, 1, 1, NULL), "out is null");
    REFUSED(tstitch_normals(out, -4, 0, 0, 1, 1, NULL), "count = -4");
    REFUSED(tstitch_normals(out, INT64_MAX / 4, 0, 0, 1, 1, NULL), "more than fits into memory");
    REFUSED(tstitch_normals(ODD(float, out), 4, 0, 0, 1, 1, NULL), "out is at an address that is no multiple of 4");
    REFUSED(tstitch_normals(out, 4, 0, 0, INFINITY, 1, NULL), "scale = inf; allowed is a finite number");
    REFUSED(tstitch_normals(out, 4, 0, 0, 1, 1025, NULL), "threads = 1025");

#define PREPARE(active, batch, sample, dtype, times, kind) \
    tstitch_prepare(arena, active, batch, sample, dtype, times, kind, false)
    REFUSED(tstitch_prepare(NULL, both, 2, out, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT32, true), "arena is null");
    REFUSED(PREPARE(NULL, 2, out, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT32), "active is null");
    REFUSED(PREPARE(both, -1, out, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT32), "batch = -1");
    REFUSED(PREPARE(both, 2, NULL, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT32), "sample is null");
    REFUSED(PREPARE(both, 2, out, TSTITCH_FLOAT32, NULL, TSTITCH_FLOAT32), "timestep is null");
    REFUSED(PREPARE(both, 2, out, TSTITCH_INT64, timestep, TSTITCH_FLOAT32),
            "sample_dtype = 3; allowed are TSTITCH_FLO");
    REFUSED(PREPARE(both, 2, out, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT16), "timestep_dtype = 1; allowed are TSTI");
    REFUSED(PREPARE(both, 2, out, (tstitch_dtype)7, timestep, TSTITCH_FLOAT32), "sample_dtype = 7; allowed are");
    REFUSED(PREPARE(both, 2, out, TSTITCH_FLOAT32, timestep, (tstitch_dtype)-1), "timestep_dtype = -1; allowed are");
    REFUSED(PREPARE(both, INT64_MAX / 16, out, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT32),
            "more than fits into memory");
    REFUSED(PREPARE(both, 2, ODD(float, out), TSTITCH_FLOAT16, timestep, TSTITCH_FLOAT32), "sample is at an address");
    REFUSED(PREPARE(both, 2, out, TSTITCH_FLOAT32, timestep + 1, TSTITCH_INT64), "no multiple of 8");
    REFUSED(PREPARE(ODD(int32_t, step), 1, out, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT32), "active is at an address");
    REFUSED(PREPARE(outside, 1, out, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT32), "active[0] = 2 is no lane; allowed");
    REFUSED(PREPARE(negative, 1, out, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT32), "active[0] = -1");
    REFUSED(PREPARE(twice, 2, out, TSTITCH_FLOAT32, timestep, TSTITCH_FLOAT32), "active[1] = 1 names a lane again");
    CHECK_OK(PREPARE(NULL, 0, NULL, TSTITCH_FLOAT32, NULL, TSTITCH_FLOAT32));

#define ADVANCE(active, batch, output, channels) \
    tstitch_advance(arena, active, batch, output, TSTITCH_FLOAT32, channels, false, false)
    REFUSED(tstitch_advance(NULL, both, 2, out, TSTITCH_FLOAT32, 3, true, true), "arena is null");
    REFUSED(tstitch_advance(arena, both, 2, out, TSTITCH_INT64, 3, true, true), "dtype = 3");
    REFUSED(ADVANCE(NULL, 2, out, 3), "active is null");
    REFUSED(ADVANCE(both, 2, NULL, 3), "model_output is null");
    REFUSED(ADVANCE(both, INT64_MAX / 32, out, 3), "more than fits into memory");
    REFUSED(ADVANCE(both, 2, ODD(float, out), 3), "model_output is at an address that is no multiple of 4");
    REFUSED(ADVANCE(both, 2, out, INT64_MIN), "output_channels = -9223372036854775808");
    REFUSED(ADVANCE(both, 2, out, 4), "output_channels = 4; allowed is 3, or 6 with learned variance");
    REFUSED(ADVANCE(outside, 1, out, 3), "active[0] = 2 is no lane");
    REFUSED(ADVANCE(twice, 2, out, 3), "active[1] = 1 names a lane again; allowed is each at most once");
    for (int i = 0; i < TSTITCH_ROW_SIZE; ++i) {
        const float before_it = rows[TSTITCH_ROW_SIZE + i], wrong[] = {NAN, INFINITY, -INFINITY};
        for (int k = 0; k < 3; ++k) {
            rows[TSTITCH_ROW_SIZE + i] = wrong[k];
            REFUSED(ADVANCE(both, 2, out, 3), "; allowed is a finite number");
            REFUSED(PREPARE(both, 2, out, TSTITCH_FLOAT32, timestep, TSTITCH_INT64), "; allowed is a finite number");
        }
        rows[TSTITCH_ROW_SIZE + i] = before_it;
    }
#define REFUSED_ROW(field, value, says)                                                                    \
    rows[TSTITCH_ROW_SIZE + field] = value;                                                                \
    REFUSED(ADVANCE(both, 2, out, 3), "row 0 of lane 1 has " says);                                        \
    REFUSED(PREPARE(both, 2, out, TSTITCH_FLOAT32, timestep, TSTITCH_INT64), "row 0 of lane 1 has " says); \
    CHECK_OK(ADVANCE(NULL, 0, NULL, 3));                                                                   \
    rows[TSTITCH_ROW_SIZE + field] = 0
    REFUSED_ROW(TSTITCH_ROW_FLAGS, 32, "FLAGS = 32.000000; allowed is a sum of the flags, 0 to 31");
    REFUSED_ROW(TSTITCH_ROW_FLAGS, -1, "FLAGS = -1.000000");
    REFUSED_ROW(TSTITCH_ROW_FLAGS, 2.5f, "FLAGS = 2.500000");
    REFUSED_ROW(TSTITCH_ROW_FLAGS, 1e30f, "FLAGS = 1");
    REFUSED_ROW(TSTITCH_ROW_T, 1e19f, "T = 9999999980506447872.000000; allowed is a timestep that fits into 64 bits");
    REFUSED_ROW(TSTITCH_ROW_T, -1e30f, "T = -1");
    REFUSED_ROW(TSTITCH_ROW_GUIDED_CHANNELS, -1, "GUIDED_CHANNELS = -1.000000; allowed is 0 or more");
    step[1] = -1;
    REFUSED(ADVANCE(both + 1, 1, out, 3), "lane 1 is at step -1");
    step[1] = INT32_MAX;
    REFUSED(ADVANCE(both + 1, 1, out, 3), "lane 1 is at step 2147483647");
    step[1] = 0;
    rows[TSTITCH_ROW_S] = 1;
    rows[TSTITCH_ROW_FLAGS] = TSTITCH_FLAG_LEARNED;
    REFUSED(ADVANCE(both, 2, out, 3), "has 3 channels, allowed is 6");
    step[1] = 1;
    REFUSED(ADVANCE(both + 1, 1, out, 3), "lane 1 is at step 1; its table has the steps 0 to 0");
    CHECK_OK(ADVANCE(NULL, 0, NULL, 3));

    CHECK(memcmp(latents, before, sizeof latents) == 0);
    CHECK(step[0] == 0 && fault[0] == -1 && fault[1] == -1);
    tstitch_arena_destroy(arena);
    tstitch_arena_destroy(NULL);
    return failures != 0;
}
