/* The C interface on the host driver: published vectors of the generator, and walks with known answers. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "ddim.h"

enum { LANES = 3, CHANNELS = 2, SPATIAL = 35, ELEMENTS = CHANNELS * SPATIAL };

static float latents[LANES * ELEMENTS], history[TSTITCH_HISTORY * LANES * ELEMENTS], y[LANES * ELEMENTS];
static float rows[LANES * STEPS * TSTITCH_ROW_SIZE];
static int32_t step[LANES], fault[LANES];
static uint64_t seed[LANES];

static tstitch_arena* make_arena(int threads, const char* isa) {
    tstitch_lanes all = {0};
    tstitch_arena* arena = NULL;
    all.latents = latents;
    all.history = history;
    all.y = y;
    all.rows = rows;
    all.step = step;
    all.seed = seed;
    all.fault = fault;
    all.lanes = LANES;
    all.row_count = STEPS;
    all.channels = CHANNELS;
    all.spatial = SPATIAL;
    for (int lane = 0; lane < LANES; ++lane) {
        step[lane] = 0;
        fault[lane] = -1;
        seed[lane] = 1000u + (uint64_t)lane;
    }
    CHECK_OK(tstitch_arena_create(&all, threads, isa, &arena));
    return arena;
}

/* Random123's known answers for philox4x32, 10 rounds. */
static void test_philox(void) {
    static const uint32_t vectors[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
         0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1},
    };
    for (int i = 0; i < 3; ++i) {
        uint32_t out[4];
        tstitch_philox4x32_10(vectors[i], vectors[i] + 4, out);
        CHECK(memcmp(out, vectors[i] + 6, sizeof out) == 0);
    }
}

/* Box-Muller of the words above, in double. */
static void test_normals(const char* isa) {
    const uint64_t key = 0x299f31d0a4093822u;
    const uint32_t at = 7, words[2] = {(uint32_t)key, (uint32_t)(key >> 32)};
    float z[21];
    CHECK_OK(tstitch_normals(z, 21, key, at, 2.0f, 0, isa));
    for (uint32_t e = 0; e < 21; ++e) {
        const uint32_t counter[4] = {e / 4, 0, at, 0};
        uint32_t out[4];
        tstitch_philox4x32_10(counter, words, out);
        const double u = (out[e % 4 / 2 * 2] + 0.5) / 4294967296.0;
        const double angle = 2 * acos(-1.0) * out[e % 4 / 2 * 2 + 1] / 4294967296.0;
        CHECK_CLOSE(z[e], 2 * sqrt(-2 * log(u)) * (e % 2 ? sin(angle) : cos(angle)), 4e-6);
    }
}

static float image(int lane, int element) { return 0.5f * (float)sin(1.0 + lane + 0.3 * element); }

/* Walks all lanes; the model is given by what ddim.h says, with guidance when `guidance` is not 0. With it the two
 * halves differ by 1 such that their guided combination is the model's answer on the guided channels, and the
 * conditional half is on the others. */
static void test_ddim(int threads, const char* isa, float guidance, int guided_channels) {
    const bool guided = guidance != 0;
    const int copies = guided ? 2 : 1;
    static const int32_t active[LANES] = {2, 0, 1};
    float noise[LANES * ELEMENTS], sample[2 * LANES * ELEMENTS], output[2 * LANES * ELEMENTS];
    int64_t timestep[2 * LANES];
    tstitch_arena* arena = make_arena(threads, isa);
    for (int lane = 0; lane < LANES; ++lane) {
        ddim_rows(rows + lane * STEPS * TSTITCH_ROW_SIZE, guidance, (float)guided_channels);
        CHECK_OK(tstitch_initial_noise(arena, lane, 1.0f));
        CHECK_OK(
            tstitch_normals(noise + lane * ELEMENTS, ELEMENTS, seed[lane], TSTITCH_INITIAL_NOISE_STEP, 1.0f, 1, isa));
    }
    CHECK(memcmp(latents, noise, sizeof latents) == 0);
    for (int i = 0; i < LANES * ELEMENTS; ++i)
        latents[i] = (float)(ddim_alpha(0) * image(i / ELEMENTS, i % ELEMENTS) + ddim_sigma(0) * noise[i]);

    for (int now = 0; now < STEPS; ++now) {
        CHECK_OK(tstitch_prepare(arena, active, LANES, sample, TSTITCH_FLOAT32, timestep, TSTITCH_INT64, guided));
        for (int i = 0; i < copies * LANES; ++i) {
            CHECK(timestep[i] == llrint(ddim_timestep(now)));
            for (int e = 0; e < ELEMENTS; ++e) {
                const int at = i * ELEMENTS + e, lane = active[i % LANES];
                const double answer = (sample[at] - ddim_alpha(now) * image(lane, e)) / ddim_sigma(now);
                double given = answer;
                if (guided && e / SPATIAL < guided_channels) given = i < LANES ? answer + 1 - 1 / guidance : answer + 1;
                if (guided && e / SPATIAL >= guided_channels && i >= LANES) given = NAN; /* must not be read */
                output[at] = (float)given;
            }
        }
        CHECK_OK(tstitch_advance(arena, active, LANES, output, TSTITCH_FLOAT32, CHANNELS, guided, false));
        for (int lane = 0; lane < LANES; ++lane) {
            CHECK(step[lane] == now + 1);
            for (int e = 0; e < ELEMENTS; ++e)
                CHECK_CLOSE(latents[lane * ELEMENTS + e],
                            ddim_alpha(now + 1) * image(lane, e) + ddim_sigma(now + 1) * noise[lane * ELEMENTS + e],
                            3e-4); /* the first step divides by alpha = 0.07: rounding grows by its inverse */
        }
    }
    for (int lane = 0; lane < LANES; ++lane) CHECK(fault[lane] == -1);
    CHECK(tstitch_advance(arena, active, LANES, output, TSTITCH_FLOAT32, CHANNELS, guided, false) == TSTITCH_BAD_INPUT);
    CHECK(strstr(tstitch_last_error(), "lane 2 is at step 10; its table has the steps 0 to 9") != NULL);
    tstitch_arena_destroy(arena);
}

/* Values that both half types hold exactly, so their bits are known; and a step that reads them back. */
static void test_half_types(const char* isa) {
    static const float values[4] = {1.0f, -2.0f, 0.15625f, 0.0f};
    static const uint16_t float16[4] = {0x3c00, 0xc000, 0x3100, 0x0000}, bfloat16[4] = {0x3f80, 0xc000, 0x3e20, 0x0000};
    static const int32_t active[1] = {1};
    for (int half = 0; half < 2; ++half) {
        const tstitch_dtype dtype = half ? TSTITCH_BFLOAT16 : TSTITCH_FLOAT16;
        const uint16_t* bits = half ? bfloat16 : float16;
        uint16_t sample[ELEMENTS];
        float timestep[1];
        tstitch_arena* arena = make_arena(1, isa);
        float* row = rows + STEPS * TSTITCH_ROW_SIZE;
        memset(rows, 0, sizeof rows);
        row[TSTITCH_ROW_T] = 12.5f;
        row[TSTITCH_ROW_C_IN] = 0.5f;
        row[TSTITCH_ROW_Q] = row[TSTITCH_ROW_B] = 3.0f; /* x' = 9 m */
        for (int e = 0; e < ELEMENTS; ++e) latents[ELEMENTS + e] = 2 * values[e % 4];
        CHECK_OK(tstitch_prepare(arena, active, 1, sample, dtype, timestep, TSTITCH_FLOAT32, false));
        CHECK(timestep[0] == 12.5f);
        for (int e = 0; e < ELEMENTS; ++e) CHECK(sample[e] == bits[e % 4]);
        CHECK_OK(tstitch_advance(arena, active, 1, sample, dtype, CHANNELS, false, false));
        for (int e = 0; e < ELEMENTS; ++e) CHECK(latents[ELEMENTS + e] == 9 * values[e % 4]);
        CHECK(step[0] == 0 && step[1] == 1 && step[2] == 0);
        tstitch_arena_destroy(arena);
    }
}

/* x' = 2 D1 + 3 D2 + 4 D3 + y with D = m: each step's D is its number, y the sum of all D before; both start as NaN. */
static void test_history(void) {
    static const int32_t active[1] = {0};
    float output[ELEMENTS];
    tstitch_arena* arena = make_arena(1, NULL);
    memset(rows, 0, sizeof rows);
    for (int i = 0; i < TSTITCH_HISTORY * LANES * ELEMENTS; ++i) history[i] = NAN;
    for (int i = 0; i < LANES * ELEMENTS; ++i) y[i] = NAN;
    for (int i = 0; i < 5; ++i) {
        float* row = rows + i * TSTITCH_ROW_SIZE;
        row[TSTITCH_ROW_Q] = 1;
        row[TSTITCH_ROW_C] = i >= 1 ? 2.0f : 0.0f;
        row[TSTITCH_ROW_E] = i >= 2 ? 3.0f : 0.0f;
        row[TSTITCH_ROW_F] = i >= 3 ? 4.0f : 0.0f;
        row[TSTITCH_ROW_Y] = row[TSTITCH_ROW_YY] = i >= 1 ? 1.0f : 0.0f;
        row[TSTITCH_ROW_YB] = 1;
        row[TSTITCH_ROW_FLAGS] = TSTITCH_FLAG_STORE + TSTITCH_FLAG_STORE_Y;
        for (int e = 0; e < ELEMENTS; ++e) output[e] = (float)(i + 1);
        CHECK_OK(tstitch_advance(arena, active, 1, output, TSTITCH_FLOAT32, CHANNELS, false, false));
    }
    for (int e = 0; e < ELEMENTS; ++e) CHECK(latents[e] == 2 * 4 + 3 * 3 + 4 * 2 + (1 + 2 + 3 + 4) && y[e] == 15);
    tstitch_arena_destroy(arena);
}

static void test_fault(void) {
    static const int32_t active[2] = {0, 2};
    static float output[2 * ELEMENTS];
    tstitch_arena* arena = make_arena(1, NULL);
    memset(rows, 0, sizeof rows);
    memset(output, 0, sizeof output);
    for (int lane = 0; lane < LANES; ++lane)
        for (int i = 0; i < STEPS; ++i) rows[(lane * STEPS + i) * TSTITCH_ROW_SIZE + TSTITCH_ROW_Q] = 1;
    for (int i = 0; i < LANES * STEPS; ++i) rows[i * TSTITCH_ROW_SIZE + TSTITCH_ROW_B] = 1;
    for (int i = 0; i < 3; ++i) {
        output[2 * ELEMENTS - 1] = i == 1 ? INFINITY : 0.0f;
        CHECK_OK(tstitch_advance(arena, active, 2, output, TSTITCH_FLOAT32, CHANNELS, false, false));
    }
    CHECK(fault[0] == -1 && fault[1] == -1 && fault[2] == 1);
    tstitch_arena_destroy(arena);
}

int main(void) {
    test_philox();
    for (int i = 0; tstitch_isa(i) != NULL; ++i) {
        test_normals(tstitch_isa(i));
        test_half_types(tstitch_isa(i));
        for (int threads = 0; threads < 3; ++threads) {
            test_ddim(threads, tstitch_isa(i), 0, 0);
            test_ddim(threads, tstitch_isa(i), 1.75f, CHANNELS);
            test_ddim(threads, tstitch_isa(i), 4.0f, 1);
        }
    }
    test_history();
    test_fault();
    CHECK(tstitch_isa(0) != NULL && tstitch_isa(-1) == NULL);
    return failures != 0;
}
