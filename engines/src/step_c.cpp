// The C interface (include/tstitch/step.h) over the host driver: checks its arguments and lets no exception out. The
// Python binding calls the same functions.
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "arena.hpp"
#include "thread_pool.hpp"
#include "tstitch/step.h"

struct tstitch_arena {
    tstitch::HostArena host;
};

namespace tstitch {
namespace {

#define TSTITCH_SAME(name) static_assert(int(TSTITCH_ROW_##name) == int(ROW_##name), "step.h and step.hpp differ");
TSTITCH_ROW_FIELDS(TSTITCH_SAME)
#undef TSTITCH_SAME
static_assert(int(TSTITCH_ROW_SIZE) == int(ROW_SIZE) && int(TSTITCH_FLAG_LEARNED) == FLAG_LEARNED &&
                  int(TSTITCH_FLAG_STORE) == FLAG_STORE && TSTITCH_INITIAL_NOISE_STEP == INITIAL_NOISE_STEP,
              "step.h and step.hpp differ");
static_assert(int(TSTITCH_FLAG_STORE_Y) == FLAG_STORE_Y && int(TSTITCH_FLAG_INPAINT) == FLAG_INPAINT &&
                  int(TSTITCH_FLAG_GIVEN_NOISE) == FLAG_GIVEN_NOISE && int(TSTITCH_HISTORY) == HISTORY,
              "step.h and step.hpp differ");

thread_local char last_error[512] = "";  // fixed, so that reporting a failure can't fail; longer messages are cut

tstitch_status failed(tstitch_status status, const char* message) {
    std::snprintf(last_error, sizeof last_error, "%s", message);
    return status;
}

template <typename Body>
tstitch_status guarded(Body body) {
    try {
        body();
        return TSTITCH_OK;
    } catch (const std::invalid_argument& error) {
        return failed(TSTITCH_BAD_INPUT, error.what());
    } catch (const std::bad_alloc&) {
        return failed(TSTITCH_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception& error) {
        return failed(TSTITCH_FAILED, error.what());
    } catch (...) {
        return failed(TSTITCH_FAILED, "an unknown exception");
    }
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// `alignment` is checked too: the vectors of the kernels may fault on an address between two elements.
void require(const void* pointer, const char* name, std::int64_t alignment = 1) {
    if (pointer == nullptr) refuse(std::string(name) + " is null");
    if (reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(alignment) != 0)
        refuse(std::string(name) + " is at an address that is no multiple of " + std::to_string(alignment) +
               ", the size of its elements");
}

void require_finite(float value, const char* name) {
    if (!is_finite(value)) refuse(std::string(name) + " = " + std::to_string(value) + "; allowed is a finite number");
}

void require_positive(std::int64_t value, const char* name) {
    if (value < 1) refuse(std::string(name) + " = " + std::to_string(value) + "; allowed is 1 or more");
}

Dtype model_dtype(tstitch_dtype dtype, const char* name) {
    switch (dtype) {
        case TSTITCH_FLOAT32:
            return Dtype::float32;
        case TSTITCH_FLOAT16:
            return Dtype::float16;
        case TSTITCH_BFLOAT16:
            return Dtype::bfloat16;
        case TSTITCH_INT64:
            break;
    }
    refuse(std::string(name) + " = " + std::to_string(static_cast<int>(dtype)) +
           "; allowed are TSTITCH_FLOAT32, TSTITCH_FLOAT16 and TSTITCH_BFLOAT16");
}

// False for a batch of none, which is no work and no mistake. `bytes`: of one position in the caller's largest array.
bool has_lanes(const std::int32_t* active, std::int64_t batch, std::int64_t bytes) {
    if (batch < 0) refuse("batch = " + std::to_string(batch) + "; allowed is 0 or more");
    if (__builtin_mul_overflow(batch, bytes, &bytes))
        refuse("batch = " + std::to_string(batch) + " is more than fits into memory");
    if (batch > 0) require(active, "active", sizeof *active);
    return batch > 0;
}

std::int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

void require_sizes(const tstitch_lanes& lanes) {
    require_positive(lanes.lanes, "lanes");
    require_positive(lanes.row_count, "row_count");
    require_positive(lanes.channels, "channels");
    require_positive(lanes.spatial, "spatial");
    // Of a guided learned output in floats, which is more than the history, and as units of work (NOISE_WORK).
    std::int64_t bytes = 2 * NOISE_WORK;
    std::int64_t table = static_cast<std::int64_t>(sizeof(float)) * ROW_SIZE;
    bool large = __builtin_mul_overflow(table, lanes.lanes, &table);
    large = __builtin_mul_overflow(table, lanes.row_count, &table) || large;
    const std::int64_t per_channel = lanes.stride / lanes.channels;
    for (const std::int64_t factor :
         {lanes.lanes, std::int64_t{2}, lanes.channels, per_channel > lanes.spatial ? per_channel : lanes.spatial})
        large = __builtin_mul_overflow(bytes, factor, &bytes) || large;
    if (large || lanes.lanes > INT32_MAX || lanes.row_count > INT32_MAX)
        refuse("lanes = " + std::to_string(lanes.lanes) + ", row_count = " + std::to_string(lanes.row_count) +
               ", channels = " + std::to_string(lanes.channels) + ", spatial = " + std::to_string(lanes.spatial) +
               ", stride = " + std::to_string(lanes.stride) + " are more than fits into memory");
    if (lanes.stride != 0 && (lanes.stride < lanes.channels * lanes.spatial || lanes.stride % lanes.channels != 0))
        refuse("stride = " + std::to_string(lanes.stride) + "; allowed is 0, or a multiple of the " +
               std::to_string(lanes.channels) + " channels from " + std::to_string(lanes.channels * lanes.spatial) +
               " on");
}

tstitch_arena* make_arena(const tstitch_lanes& lanes, int threads, const char* isa) {
    require_sizes(lanes);
    require(lanes.latents, "latents", sizeof(float));
    require(lanes.history, "history", sizeof(float));
    require(lanes.rows, "rows", sizeof(float));
    require(lanes.step, "step", sizeof(std::int32_t));
    require(lanes.seed, "seed", sizeof(std::uint64_t));
    require(lanes.fault, "fault", sizeof(std::int32_t));
    if (lanes.y != nullptr) require(lanes.y, "y", sizeof(float));
    if (lanes.image != nullptr) require(lanes.image, "image", sizeof(float));
    if (lanes.mask != nullptr) require(lanes.mask, "mask", sizeof(float));
    if (lanes.noise != nullptr) require(lanes.noise, "noise", sizeof(float));
    HostArena host = {};
    host.latents = lanes.latents;
    host.history = lanes.history;
    host.y = lanes.y;
    host.rows = lanes.rows;
    host.step = lanes.step;
    host.seed = lanes.seed;
    host.fault = lanes.fault;
    host.image = lanes.image;
    host.mask = lanes.mask;
    host.noise = lanes.noise;
    host.lanes = lanes.lanes;
    host.row_count = lanes.row_count;
    host.channels = lanes.channels;
    host.spatial = lanes.spatial;
    host.stride = lanes.stride == 0 ? host.elements() : lanes.stride;
    host.kernels = &find_kernels(isa);
    host.threads = thread_count(threads);
    host.last_used.resize(static_cast<std::size_t>(lanes.lanes));
    return new tstitch_arena{std::move(host)};
}

}  // namespace
}  // namespace tstitch

using namespace tstitch;

extern "C" {

const char* tstitch_last_error(void) { return last_error; }

const char* tstitch_version(void) { return TSTITCH_VERSION; }

tstitch_status tstitch_arena_create(const tstitch_lanes* lanes, int threads, const char* isa, tstitch_arena** arena) {
    return guarded([&] {
        require(arena, "arena");
        *arena = nullptr;
        require(lanes, "lanes");
        *arena = make_arena(*lanes, threads, isa);
    });
}

void tstitch_arena_destroy(tstitch_arena* arena) { delete arena; }

tstitch_status tstitch_initial_noise(tstitch_arena* arena, int32_t lane, float scale) {
    return guarded([&] {
        require(arena, "arena");
        const HostArena& host = arena->host;
        if (lane < 0 || lane >= host.lanes)
            refuse("lane = " + std::to_string(lane) + "; allowed is 0 to " + std::to_string(host.lanes - 1));
        require_finite(scale, "scale");
        normals(*host.kernels, host.threads, host.latents + lane * host.stride, host.elements(), host.seed[lane],
                INITIAL_NOISE_STEP, scale);
    });
}

tstitch_status tstitch_prepare(tstitch_arena* arena, const int32_t* active, int64_t batch, void* sample,
                               tstitch_dtype sample_dtype, void* timestep, tstitch_dtype timestep_dtype, bool guided) {
    return guarded([&] {
        require(arena, "arena");
        const Dtype dtype = model_dtype(sample_dtype, "sample_dtype");
        if (timestep_dtype != TSTITCH_FLOAT32 && timestep_dtype != TSTITCH_INT64)
            refuse("timestep_dtype = " + std::to_string(static_cast<int>(timestep_dtype)) +
                   "; allowed are TSTITCH_FLOAT32 and TSTITCH_INT64");
        if (!has_lanes(active, batch, 2 * arena->host.elements() * std::int64_t{sizeof(float)})) return;
        require(sample, "sample", size_of(dtype));
        require(timestep, "timestep", timestep_dtype == TSTITCH_INT64 ? 8 : 4);
        arena->host.check(active, batch);
        arena->host.prepare(active, batch, dtype, sample,
                            timestep_dtype == TSTITCH_FLOAT32 ? static_cast<float*>(timestep) : nullptr,
                            timestep_dtype == TSTITCH_INT64 ? static_cast<std::int64_t*>(timestep) : nullptr, guided);
    });
}

tstitch_status tstitch_advance(tstitch_arena* arena, const int32_t* active, int64_t batch, const void* model_output,
                               tstitch_dtype dtype, int64_t output_channels, bool guided, bool rescale) {
    return guarded([&] {
        require(arena, "arena");
        const Dtype type = model_dtype(dtype, "dtype");
        HostArena& host = arena->host;
        const bool learned = output_channels == 2 * host.channels;
        if (!learned && output_channels != host.channels)
            refuse("output_channels = " + std::to_string(output_channels) + "; allowed is " +
                   std::to_string(host.channels) + ", or " + std::to_string(2 * host.channels) +
                   " with learned variance");
        if (!has_lanes(active, batch, 2 * NOISE_WORK * 2 * host.elements())) return;
        require(model_output, "model_output", size_of(type));
        host.check(active, batch);
        host.check_rows(active, batch, learned);
        host.advance(active, batch, type, model_output, output_channels, guided, rescale);
    });
}

tstitch_status tstitch_gather_rows(const int32_t* active, int64_t batch, const void* source, int64_t lanes,
                                   int64_t source_stride, void* target, int64_t row_bytes, int64_t halves) {
    return guarded([&] {
        require_positive(lanes, "lanes");
        require_positive(row_bytes, "row_bytes");
        require_positive(halves, "halves");
        std::int64_t bytes = source_stride;
        if (source_stride < row_bytes || __builtin_mul_overflow(bytes, lanes, &bytes) ||
            __builtin_mul_overflow(bytes, halves, &bytes))
            refuse("source_stride = " + std::to_string(source_stride) + "; allowed is row_bytes (" +
                   std::to_string(row_bytes) + ") or more, as far as the rows fit into memory");
        if (!has_lanes(active, batch, row_bytes * halves)) return;
        require(source, "source");
        require(target, "target");
        check_active(active, batch, lanes);
        const char* const rows = static_cast<const char*>(source);
        char* out = static_cast<char*>(target);
        for (std::int64_t half = 0; half < halves; ++half)
            for (std::int64_t i = 0; i < batch; ++i, out += row_bytes)
                std::memcpy(out, rows + (half * lanes + lane_at(active, i)) * source_stride,
                            static_cast<std::size_t>(row_bytes));
    });
}

tstitch_status tstitch_normals(float* out, int64_t count, uint64_t seed, uint32_t step, float scale, int threads,
                               const char* isa) {
    return guarded([&] {
        if (count < 0) refuse("count = " + std::to_string(count) + "; allowed is 0 or more");
        if (count > INT64_MAX / (2 * NOISE_WORK))
            refuse("count = " + std::to_string(count) + " is more than fits into memory");
        if (count > 0) require(out, "out", sizeof *out);
        require_finite(scale, "scale");
        normals(find_kernels(isa), thread_count(threads), out, count, seed, step, scale);
    });
}

void tstitch_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    std::uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    philox4x32_10(c0, c1, c2, c3, key[0], key[1]);
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

const char* tstitch_isa(int index) {
    const char* name = nullptr;
    const tstitch_status status = guarded([&] {
        const std::vector<const HostKernels*> known = supported_kernels();
        if (index >= 0 && static_cast<std::size_t>(index) < known.size())
            name = known[static_cast<std::size_t>(index)]->name;
    });
    return status == TSTITCH_OK ? name : nullptr;
}
}
