// Python binding of the host driver: checks shapes and types once per call, then works on plain pointers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "arena.hpp"
#include "thread_pool.hpp"

namespace nb = nanobind;

namespace tstitch {
namespace {

template <typename T, typename... More>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu, More...>;
using AnyArray = nb::ndarray<nb::c_contig, nb::device::cpu>;
using AnyConstArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

template <typename A>
std::string shape_text(const A& array) {
    std::string text = "[";
    for (std::size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + "]";
}

// bfloat16 has no numpy type: its bits come as uint16.
template <typename A>
Dtype model_dtype(const A& array, const char* what) {
    if (array.dtype() == nb::dtype<float>()) return Dtype::float32;
    if (array.dtype() == nb::dtype<std::uint16_t>()) return Dtype::bfloat16;
    const nb::dlpack::dtype half{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    if (array.dtype() == half) return Dtype::float16;
    refuse(std::string(what) + " has an unsupported dtype; allowed are float32, float16 and bfloat16 (as uint16)");
}

const HostKernels& find_kernels(const std::optional<std::string>& isa) {
    const std::vector<const HostKernels*> known = supported_kernels();
    if (!isa) return *known.front();
    std::string names;
    for (const HostKernels* kernels : known) {
        if (*isa == kernels->name) return *kernels;
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    refuse("this CPU has no instruction set '" + *isa + "'; allowed are " + names);
}

int thread_count(int asked) {
    if (asked < 0) refuse("threads = " + std::to_string(asked) + "; allowed is 0 (all) or more");
    return asked == 0 ? available_threads() : asked;
}

class Arena {
  public:
    using Ints = Array<std::int32_t, nb::ndim<1>>;

    Arena(Array<float> latents, Array<float> history, Array<const float, nb::shape<-1, -1, ROW_SIZE>> rows, Ints step,
          Array<const std::int64_t, nb::ndim<1>> seed, Ints fault, int threads, const std::optional<std::string>& isa)
        : keep_{nb::cast(latents), nb::cast(history), nb::cast(rows), nb::cast(step), nb::cast(seed), nb::cast(fault)} {
        if (latents.ndim() < 2) refuse("latents " + shape_text(latents) + " must be [lanes, channels, ...]");
        const std::size_t lanes = latents.shape(0);
        if (history.ndim() != latents.ndim() + 1 || history.shape(0) != 2 || history.size() != 2 * latents.size())
            refuse("history " + shape_text(history) + " must be [2, ...] of latents " + shape_text(latents));
        if (rows.shape(0) != lanes || step.size() != lanes || seed.size() != lanes || fault.size() != lanes)
            refuse("rows " + shape_text(rows) + ", step " + shape_text(step) + ", seed " + shape_text(seed) +
                   ", fault " + shape_text(fault) + " must be for the " + std::to_string(lanes) + " lanes of latents");
        arena_.latents = latents.data();
        arena_.history = history.data();
        arena_.rows = rows.data();
        arena_.step = step.data();
        arena_.seed = reinterpret_cast<const std::uint64_t*>(seed.data());
        arena_.fault = fault.data();
        arena_.lanes = static_cast<std::int64_t>(lanes);
        arena_.row_count = static_cast<std::int64_t>(rows.shape(1));
        arena_.channels = static_cast<std::int64_t>(latents.shape(1));
        arena_.spatial =
            latents.size() == 0 ? 0 : static_cast<std::int64_t>(latents.size()) / arena_.lanes / arena_.channels;
        arena_.kernels = &find_kernels(isa);
        arena_.threads = thread_count(threads);
    }

    void prepare(const Array<const std::int32_t, nb::ndim<1>>& active, const AnyArray& sample, const AnyArray& timestep,
                 bool guided) const {
        const auto batch = static_cast<std::int64_t>(active.size());
        const std::int64_t wanted = guided ? 2 * batch : batch;
        check_lanes(active, true);
        const Dtype dtype = model_dtype(sample, "sample");
        if (static_cast<std::int64_t>(sample.size()) != wanted * arena_.elements())
            refuse("sample " + shape_text(sample) + " must hold " + std::to_string(wanted) + " lanes of " +
                   std::to_string(arena_.elements()) + " elements");
        if (timestep.ndim() != 1 || static_cast<std::int64_t>(timestep.size()) != wanted)
            refuse("timestep " + shape_text(timestep) + " must be [" + std::to_string(wanted) + "]");
        float* as_float = nullptr;
        std::int64_t* as_int = nullptr;
        if (timestep.dtype() == nb::dtype<float>())
            as_float = static_cast<float*>(timestep.data());
        else if (timestep.dtype() == nb::dtype<std::int64_t>())
            as_int = static_cast<std::int64_t*>(timestep.data());
        else
            refuse("timestep has an unsupported dtype; allowed are float32 and int64");
        unlocked(wanted * arena_.elements(),
                 [&] { arena_.prepare(active.data(), batch, dtype, sample.data(), as_float, as_int, guided); });
    }

    void advance(const Array<const std::int32_t, nb::ndim<1>>& active, const AnyConstArray& output, bool guided,
                 bool rescale) const {
        const auto batch = static_cast<std::int64_t>(active.size());
        const std::int64_t lanes = guided ? 2 * batch : batch, size = static_cast<std::int64_t>(output.size());
        const Dtype dtype = model_dtype(output, "model_output");
        const bool learned = size == 2 * lanes * arena_.elements();
        if (!learned && size != lanes * arena_.elements())
            refuse("model_output " + shape_text(output) + " must hold " + std::to_string(lanes) + " lanes of " +
                   std::to_string(arena_.elements()) + " elements, or twice as many with learned variance");
        check_lanes(active, learned);
        unlocked(batch * arena_.elements(), [&] {
            arena_.advance(active.data(), batch, dtype, output.data(), arena_.channels * (learned ? 2 : 1), guided,
                           rescale);
        });
    }

  private:
    void check_lanes(const Array<const std::int32_t, nb::ndim<1>>& active, bool learned_given) const {
        const std::string wrong = arena_.check(active.data(), static_cast<std::int64_t>(active.size()), learned_given);
        if (!wrong.empty()) refuse(wrong);
    }

    // Other Python threads may run during work that is worth it. For the few microseconds of a small batch the lock is
    // kept: getting it back from a busy thread can take a whole switch interval (5 ms).
    template <typename Work>
    static void unlocked(std::int64_t elements, Work work) {
        if (elements < PARALLEL_WORK / 4) return work();
        const nb::gil_scoped_release release;
        work();
    }

    std::array<nb::object, 6> keep_;  // the arrays whose memory arena_ points to
    HostArena arena_ = {};
};

void normals(const Array<float>& out, std::uint64_t seed, std::uint32_t step, float scale, int threads,
             const std::optional<std::string>& isa) {
    const HostKernels& kernels = find_kernels(isa);
    const int count = thread_count(threads);
    float* const data = out.data();
    const auto size = static_cast<std::int64_t>(out.size());
    const nb::gil_scoped_release release;
    initial_noise(kernels, count, data, size, seed, step, scale);
}

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> c, std::uint32_t k0, std::uint32_t k1) {
    philox4x32_10(c[0], c[1], c[2], c[3], k0, k1);
    return c;
}

void to_float32(const AnyConstArray& source, const Array<float>& out, const std::optional<std::string>& isa) {
    if (source.size() != out.size()) refuse("out " + shape_text(out) + " must be as large as " + shape_text(source));
    find_kernels(isa).to_float32(model_dtype(source, "source"), source.data(), out.data(),
                                 static_cast<std::int64_t>(out.size()));
}

void from_float32(const Array<const float>& source, const AnyArray& out, const std::optional<std::string>& isa) {
    if (source.size() != out.size()) refuse("out " + shape_text(out) + " must be as large as " + shape_text(source));
    find_kernels(isa).prepare(model_dtype(out, "out"), source.data(), 1.0f, out.data(), 0,
                              static_cast<std::int64_t>(out.size()));
}

}  // namespace
}  // namespace tstitch

NB_MODULE(_kernels, m) {
    using namespace tstitch;
    using namespace nb::literals;

    m.doc() = "Host driver of the step kernels (engines/src/step.hpp).";
    nb::list fields;
#define TSTITCH_NAME(name) fields.append(#name);
    TSTITCH_ROW_FIELDS(TSTITCH_NAME)
#undef TSTITCH_NAME
    m.attr("ROW_FIELDS") = nb::tuple(fields);
    m.attr("FLAG_LEARNED") = FLAG_LEARNED;
    m.attr("FLAG_STORE") = FLAG_STORE;
    m.attr("INITIAL_NOISE_STEP") = INITIAL_NOISE_STEP;
    m.attr("PARALLEL_WORK") = PARALLEL_WORK;
    m.attr("HAS_FATBIN") = bool(TSTITCH_HAS_FATBIN);
    nb::list isas;
    for (const HostKernels* kernels : supported_kernels()) isas.append(kernels->name);
    m.attr("ISAS") = nb::tuple(isas);

    nb::class_<Arena>(m, "Arena")
        .def(nb::init<Array<float>, Array<float>, Array<const float, nb::shape<-1, -1, ROW_SIZE>>, Arena::Ints,
                      Array<const std::int64_t, nb::ndim<1>>, Arena::Ints, int, const std::optional<std::string>&>(),
             "latents"_a.noconvert(), "history"_a.noconvert(), "rows"_a.noconvert(), "step"_a.noconvert(),
             "seed"_a.noconvert(), "fault"_a.noconvert(), "threads"_a = 0, "isa"_a = nb::none())
        .def("prepare", &Arena::prepare, "active"_a.noconvert(), "sample"_a.noconvert(), "timestep"_a.noconvert(),
             "guided"_a)
        .def("advance", &Arena::advance, "active"_a.noconvert(), "model_output"_a.noconvert(), "guided"_a, "rescale"_a);
    m.def("normals", &normals, "out"_a.noconvert(), "seed"_a, "step"_a, "scale"_a = 1.0f, "threads"_a = 0,
          "isa"_a = nb::none());
    m.def("philox", [](std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint32_t k0,
                       std::uint32_t k1) {
        const std::array<std::uint32_t, 4> out = philox({c0, c1, c2, c3}, k0, k1);
        return nb::make_tuple(out[0], out[1], out[2], out[3]);
    });
    m.def("to_float32", &to_float32, "source"_a.noconvert(), "out"_a.noconvert(), "isa"_a = nb::none());
    m.def("from_float32", &from_float32, "source"_a.noconvert(), "out"_a.noconvert(), "isa"_a = nb::none());
}
