#include "arena.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "thread_pool.hpp"

namespace tstitch {
namespace {

constexpr const char* FIELD_NAMES[] = {
#define TSTITCH_NAME(name) #name,
    TSTITCH_ROW_FIELDS(TSTITCH_NAME)
#undef TSTITCH_NAME
};

std::int64_t chunks_of(std::int64_t elements) { return (elements + CHUNK - 1) / CHUNK; }

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// body(lane, chunk, begin, end) for the CHUNK-sized pieces of `lanes` lanes. The pieces, and so every sum over them,
// are the same for any number of threads.
template <typename Body>
void for_chunks(std::int64_t lanes, std::int64_t elements, std::int64_t work, int threads, Body body) {
    const std::int64_t chunks = chunks_of(elements);
    auto item = [&](std::int64_t i) {
        const std::int64_t lane = i / chunks, begin = i % chunks * CHUNK;
        body(lane, i, begin, std::min(begin + CHUNK, elements));
    };
    parallel_for(lanes * chunks, work < PARALLEL_WORK ? 1 : threads, item);
}

// Throws std::invalid_argument for a row with numbers that no step can be made of.
void check_numbers(const float* row, std::int32_t lane, std::int32_t step) {
    const auto refuse_field = [&](int field, const std::string& allowed) {
        refuse("row " + std::to_string(step) + " of lane " + std::to_string(lane) + " has " + FIELD_NAMES[field] +
               " = " + std::to_string(row[field]) + "; allowed is " + allowed);
    };
    for (int field = 0; field < ROW_SIZE; ++field)
        if (!is_finite(row[field])) refuse_field(field, "a finite number");
    if (!has_whole_flags(row)) refuse_field(ROW_FLAGS, "a sum of the flags, 0 to " + std::to_string(FLAG_ALL));
    if (!has_whole_timestep(row)) refuse_field(ROW_T, "a timestep that fits into 64 bits");
    if (row[ROW_GUIDED_CHANNELS] < 0.0f) refuse_field(ROW_GUIDED_CHANNELS, "0 or more");
}

}  // namespace

std::vector<const HostKernels*> supported_kernels() {
    std::vector<const HostKernels*> found;
    for (const HostKernels* kernels : {
#if defined(TSTITCH_X86)
             &kernels_avx512, &kernels_avx2,
#endif
             &kernels_baseline})
        // The baseline needs no more than the flags that this whole binary was compiled with.
        if (kernels == &kernels_baseline || kernels->supported()) found.push_back(kernels);
    return found;
}

const HostKernels& find_kernels(const char* isa) {
    const std::vector<const HostKernels*> known = supported_kernels();
    if (isa == nullptr) return *known.front();
    std::string names;
    for (const HostKernels* kernels : known) {
        if (std::strcmp(isa, kernels->name) == 0) return *kernels;
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    refuse("this CPU has no instruction set '" + std::string(isa) + "'; allowed are " + names);
}

int thread_count(int asked) {
    if (asked < 0 || asked > MOST_THREADS)
        refuse("threads = " + std::to_string(asked) + "; allowed is 0 (all) to " + std::to_string(MOST_THREADS));
    return asked == 0 ? available_threads() : asked;
}

void check_active(const std::int32_t* active, std::int64_t batch, std::int64_t lanes) {
    for (std::int64_t i = 0; i < batch; ++i) {
        const std::int32_t lane = active[i];
        if (lane < (i == 0 ? 0 : -1) || lane >= lanes)
            refuse("active[" + std::to_string(i) + "] = " + std::to_string(lane) + " is no lane; allowed is 0 to " +
                   std::to_string(lanes - 1) + (i == 0 ? "" : ", or -1 for a spare position"));
    }
}

void HostArena::check(const std::int32_t* active, std::int64_t batch) {
    check_active(active, batch, lanes);
    ++calls;
    for (std::int64_t i = 0; i < batch; ++i) {
        const std::int32_t lane = active[i];
        if (lane < 0) continue;
        if (last_used[static_cast<std::size_t>(lane)] == calls)
            refuse("active[" + std::to_string(i) + "] = " + std::to_string(lane) +
                   " names a lane again; allowed is each at most once");
        last_used[static_cast<std::size_t>(lane)] = calls;
        if (step[lane] < 0 || step[lane] >= row_count)
            refuse("lane " + std::to_string(lane) + " is at step " + std::to_string(step[lane]) +
                   "; its table has the steps 0 to " + std::to_string(row_count - 1));
        check_numbers(row(lane), lane, step[lane]);
    }
}

void HostArena::check_rows(const std::int32_t* active, std::int64_t batch, bool learned_given) const {
    for (std::int64_t i = 0; i < batch; ++i) {
        if (active[i] < 0) continue;
        const float* const r = row(active[i]);
        const auto refuse_lane = [&](const std::string& why) {
            refuse("lane " + std::to_string(active[i]) + " " + why);
        };
        if (!learned_given && has_flag(r, FLAG_LEARNED) && r[ROW_S] != 0.0f)
            refuse_lane("takes its noise scale from the model's second half of channels; the model output has " +
                        std::to_string(channels) + " channels, allowed is " + std::to_string(2 * channels));
        if (y == nullptr && uses_y(r)) refuse_lane("remembers a second state, and the arena has no y");
        if (!has_flag(r, FLAG_INPAINT)) continue;
        if (image == nullptr || mask == nullptr)
            refuse_lane(std::string("inpaints, and the arena has no ") + (image == nullptr ? "image" : "mask"));
        if (noise == nullptr && has_flag(r, FLAG_GIVEN_NOISE))
            refuse_lane("inpaints with noise that is given, and the arena has no noise");
    }
}

void HostArena::prepare(const std::int32_t* active, std::int64_t batch, Dtype dtype, void* sample,
                        float* timestep_float, std::int64_t* timestep_int, bool guided) const {
    const std::int64_t count = elements(), lane_bytes = count * bytes_of(dtype);
    const std::int64_t halves = guided ? 2 : 1;
    for (std::int64_t i = 0; i < batch * halves; ++i) {
        const float t = row(lane_at(active, i % batch))[ROW_T];
        if (timestep_float != nullptr) timestep_float[i] = t;
        if (timestep_int != nullptr) timestep_int[i] = std::llrint(t);
    }
    for_chunks(batch * halves, count, batch * halves * count, threads,
               [&](std::int64_t i, std::int64_t, std::int64_t begin, std::int64_t end) {
                   const std::int32_t lane = lane_at(active, i % batch);
                   kernels->prepare(dtype, latents + lane * stride, row(lane)[ROW_C_IN],
                                    static_cast<char*>(sample) + i * lane_bytes, begin, end);
               });
}

void HostArena::advance(const std::int32_t* active, std::int64_t batch, Dtype dtype, const void* output,
                        std::int64_t output_channels, bool guided, bool rescale) const {
    const std::int64_t count = elements(), past = lanes * stride;
    const std::int64_t lane_bytes = output_channels * spatial * bytes_of(dtype);
    std::int64_t work = 0;
    std::vector<LaneStep> steps;
    steps.reserve(static_cast<std::size_t>(batch));
    for (std::int64_t i = 0; i < batch; ++i) {
        if (active[i] < 0) continue;
        const std::int32_t lane = active[i], now = step[lane];
        const float* r = row(lane);
        const char* out = static_cast<const char*>(output) + i * lane_bytes;
        const auto slot = [&](std::uint32_t back) {
            return history + history_slot(static_cast<std::uint32_t>(now) + back) * past + lane * stride;
        };
        LaneStep& one = steps.emplace_back();
        one.row = r;
        one.x = latents + lane * stride;
        one.cond = out;
        one.uncond = guided ? out + batch * lane_bytes : nullptr;
        one.learned = has_flag(r, FLAG_LEARNED) ? out + count * bytes_of(dtype) : nullptr;
        one.store = has_flag(r, FLAG_STORE) ? slot(0) : nullptr;
        one.d1 = slot(2);
        one.d2 = slot(1);
        one.d3 = slot(0);
        one.y = uses_y(r) ? y + lane * stride : nullptr;
        const bool inpaints = has_flag(r, FLAG_INPAINT);
        one.image = inpaints ? image + lane * stride : nullptr;
        one.mask = inpaints ? mask + lane * (stride / channels) : nullptr;
        one.noise = inpaints && has_flag(r, FLAG_GIVEN_NOISE) ? noise + lane * stride : nullptr;
        one.spatial = spatial;
        one.seed = seed[lane];
        one.step = static_cast<std::uint32_t>(now);
        one.guided = guided ? guided_elements(r, channels, spatial) : 0;
        one.factor = 1.0f;
        const bool draws_noise = inpaints && one.noise == nullptr && r[ROW_IMAGE_S] != 0.0f;
        work += count * (1 + (NOISE_WORK - 1) * ((r[ROW_S] != 0.0f) + draws_noise));
    }

    const auto used = static_cast<std::int64_t>(steps.size());
    const std::int64_t chunks = chunks_of(count);
    if (guided && rescale) {
        std::vector<Moments> part(static_cast<std::size_t>(used * chunks));
        for_chunks(used, count, used * count, threads,
                   [&](std::int64_t i, std::int64_t at, std::int64_t begin, std::int64_t end) {
                       const LaneStep& one = steps[static_cast<std::size_t>(i)];
                       part[static_cast<std::size_t>(at)] =
                           one.row[ROW_RESCALE] != 0.0f ? kernels->moments(dtype, one, begin, end) : Moments{};
                   });
        for (std::int64_t i = 0; i < used; ++i) {
            LaneStep& one = steps[static_cast<std::size_t>(i)];
            if (one.row[ROW_RESCALE] == 0.0f || one.guided == 0) continue;
            Moments sum = {};
            for (std::int64_t k = 0; k < chunks; ++k) sum.add(part[static_cast<std::size_t>(i * chunks + k)]);
            one.factor = rescale_factor(one.row, sum, one.guided);
        }
    }

    std::vector<unsigned char> finite(static_cast<std::size_t>(used * chunks));
    for_chunks(used, count, work, threads, [&](std::int64_t i, std::int64_t at, std::int64_t begin, std::int64_t end) {
        finite[static_cast<std::size_t>(at)] =
            kernels->advance(dtype, steps[static_cast<std::size_t>(i)], begin, end) ? 1 : 0;
    });
    auto first = finite.begin();
    for (std::int64_t i = 0; i < batch; ++i) {
        const std::int32_t lane = active[i];
        if (lane < 0) continue;
        if (fault[lane] == -1 && std::find(first, first + chunks, 0) != first + chunks) fault[lane] = step[lane];
        step[lane] += 1;
        first += chunks;
    }
}

void normals(const HostKernels& kernels, int threads, float* out, std::int64_t count, std::uint64_t seed,
             std::uint32_t step, float scale) {
    for_chunks(1, count, count * NOISE_WORK, threads,
               [&](std::int64_t, std::int64_t, std::int64_t begin, std::int64_t end) {
                   kernels.normals(out, seed, step, scale, begin, end);
               });
}

}  // namespace tstitch
