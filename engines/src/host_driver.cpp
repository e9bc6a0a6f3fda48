// Python binding: shapes and types of arrays are checked here, the rest is the C interface (tstitch/step.h).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "arena.hpp"
#include "tstitch/step.h"

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
tstitch_dtype model_dtype(const A& array, const char* what) {
    if (array.dtype() == nb::dtype<float>()) return TSTITCH_FLOAT32;
    if (array.dtype() == nb::dtype<std::uint16_t>()) return TSTITCH_BFLOAT16;
    const nb::dlpack::dtype half{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    if (array.dtype() == half) return TSTITCH_FLOAT16;
    refuse(std::string(what) + " has an unsupported dtype; allowed are float32, float16 and bfloat16 (as uint16)");
}

template <typename A>
tstitch_dtype timestep_dtype(const A& array) {
    if (array.dtype() == nb::dtype<float>()) return TSTITCH_FLOAT32;
    if (array.dtype() == nb::dtype<std::int64_t>()) return TSTITCH_INT64;
    refuse("timestep has an unsupported dtype; allowed are float32 and int64");
}

const char* name_or_null(const std::optional<std::string>& isa) { return isa ? isa->c_str() : nullptr; }

void raise_if(tstitch_status status) {
    if (status == TSTITCH_OK) return;
    if (status == TSTITCH_BAD_INPUT) refuse(tstitch_last_error());
    if (status == TSTITCH_OUT_OF_MEMORY) throw std::bad_alloc();
    throw std::runtime_error(tstitch_last_error());
}

class Arena {
  public:
    using Ints = Array<std::int32_t, nb::ndim<1>>;
    using ConstInts = Array<const std::int32_t, nb::ndim<1>>;

    Arena(Array<float> latents, Array<float> history, Array<const float, nb::shape<-1, -1, ROW_SIZE>> rows, Ints step,
          Array<const std::int64_t, nb::ndim<1>> seed, Ints fault, std::optional<Array<float>> y,
          std::optional<Array<const float>> image, std::optional<Array<const float>> mask,
          std::optional<Array<const float>> noise, std::int64_t spatial, int threads,
          const std::optional<std::string>& isa)
        : keep_{nb::cast(latents), nb::cast(history), nb::cast(rows),  nb::cast(step), nb::cast(seed),
                nb::cast(fault),   nb::cast(y),       nb::cast(image), nb::cast(mask), nb::cast(noise)} {
        if (latents.ndim() < 2 || latents.size() == 0)
            refuse("latents " + shape_text(latents) + " must be [lanes, channels, ...], none of them 0");
        const std::size_t lanes = latents.shape(0);
        if (history.ndim() != latents.ndim() + 1 || history.shape(0) != HISTORY ||
            history.size() != HISTORY * latents.size())
            refuse("history " + shape_text(history) + " must be [" + std::to_string(HISTORY) + ", ...] of latents " +
                   shape_text(latents));
        if (rows.shape(0) != lanes || step.size() != lanes || seed.size() != lanes || fault.size() != lanes)
            refuse("rows " + shape_text(rows) + ", step " + shape_text(step) + ", seed " + shape_text(seed) +
                   ", fault " + shape_text(fault) + " must be for the " + std::to_string(lanes) + " lanes of latents");
        const auto stride = static_cast<std::int64_t>(latents.size() / lanes);
        channels_ = static_cast<std::int64_t>(latents.shape(1));
        if (spatial < 0 || spatial > stride / channels_)
            refuse("spatial " + std::to_string(spatial) + " must be 0 (all) to " + std::to_string(stride / channels_) +
                   ", the elements of a channel of latents " + shape_text(latents));
        elements_ = spatial == 0 ? stride : spatial * channels_;
        const auto pointer = [&](const auto& array, const char* name, std::size_t size, const std::string& what) {
            if (array && array->size() != size)
                refuse(std::string(name) + " " + shape_text(*array) + " must be " + what + " of latents " +
                       shape_text(latents));
            return array ? array->data() : nullptr;
        };
        const std::size_t size = latents.size();
        tstitch_lanes all = {};
        all.latents = latents.data();
        all.history = history.data();
        all.rows = rows.data();
        all.step = step.data();
        all.seed = reinterpret_cast<const std::uint64_t*>(seed.data());
        all.fault = fault.data();
        all.lanes = static_cast<std::int64_t>(lanes);
        all.row_count = static_cast<std::int64_t>(rows.shape(1));
        all.channels = channels_;
        all.spatial = elements_ / channels_;
        all.stride = stride;
        all.y = pointer(y, "y", size, "the shape");
        all.image = pointer(image, "image", size, "the shape");
        all.mask = pointer(mask, "mask", size / latents.shape(1), "the shape, with one channel,");
        all.noise = pointer(noise, "noise", size, "the shape");
        tstitch_arena* made = nullptr;
        raise_if(tstitch_arena_create(&all, threads, name_or_null(isa), &made));
        arena_.reset(made);
    }

    void prepare(const ConstInts& active, const AnyArray& sample, const AnyArray& timestep, bool guided) const {
        const auto batch = static_cast<std::int64_t>(active.size());
        const std::int64_t wanted = guided ? 2 * batch : batch;
        const tstitch_dtype dtype = model_dtype(sample, "sample"), time = timestep_dtype(timestep);
        if (static_cast<std::int64_t>(sample.size()) != wanted * elements_)
            refuse("sample " + shape_text(sample) + " must hold " + std::to_string(wanted) + " lanes of " +
                   std::to_string(elements_) + " elements");
        if (timestep.ndim() != 1 || static_cast<std::int64_t>(timestep.size()) != wanted)
            refuse("timestep " + shape_text(timestep) + " must be [" + std::to_string(wanted) + "]");
        raise_if(unlocked(wanted * elements_, [&] {
            return tstitch_prepare(arena_.get(), active.data(), batch, sample.data(), dtype, timestep.data(), time,
                                   guided);
        }));
    }

    void advance(const ConstInts& active, const AnyConstArray& output, bool guided, bool rescale) const {
        const auto batch = static_cast<std::int64_t>(active.size());
        const std::int64_t lanes = guided ? 2 * batch : batch, size = static_cast<std::int64_t>(output.size());
        const tstitch_dtype dtype = model_dtype(output, "model_output");
        const bool learned = size == 2 * lanes * elements_;
        if (!learned && size != lanes * elements_)
            refuse("model_output " + shape_text(output) + " must hold " + std::to_string(lanes) + " lanes of " +
                   std::to_string(elements_) + " elements, or twice as many with learned variance");
        raise_if(unlocked(batch * elements_, [&] {
            return tstitch_advance(arena_.get(), active.data(), batch, output.data(), dtype,
                                   channels_ * (learned ? 2 : 1), guided, rescale);
        }));
    }

  private:
    // Other Python threads may run during work that is worth it. For the few microseconds of a small batch the lock is
    // kept: getting it back from a busy thread can take a whole switch interval (5 ms).
    template <typename Work>
    static tstitch_status unlocked(std::int64_t elements, Work work) {
        if (elements < PARALLEL_WORK / 4) return work();
        const nb::gil_scoped_release release;
        return work();
    }

    struct Destroy {
        void operator()(tstitch_arena* arena) const { tstitch_arena_destroy(arena); }
    };

    std::array<nb::object, 10> keep_;  // the arrays whose memory arena_ points to
    std::unique_ptr<tstitch_arena, Destroy> arena_;
    std::int64_t elements_ = 0, channels_ = 0;
};

// target [batch or 2 batch, ...] from source [halves, lanes, bytes of a row].
void gather_rows(const Arena::ConstInts& active, const Array<const std::uint8_t, nb::ndim<3>>& source,
                 const AnyArray& target) {
    const std::size_t batch = active.size();
    if (batch == 0 || target.ndim() == 0 || target.shape(0) % batch != 0 || target.shape(0) > batch * source.shape(0) ||
        target.size() == 0 || target.nbytes() / target.shape(0) > source.shape(2))
        refuse("target " + shape_text(target) + " must have one row, of at most " + std::to_string(source.shape(2)) +
               " bytes, for each of the " + std::to_string(batch) + " active lanes in 1 to " +
               std::to_string(source.shape(0)) + " halves");
    raise_if(tstitch_gather_rows(active.data(), static_cast<std::int64_t>(batch), source.data(),
                                 static_cast<std::int64_t>(source.shape(1)), static_cast<std::int64_t>(source.shape(2)),
                                 target.data(), static_cast<std::int64_t>(target.nbytes() / target.shape(0)),
                                 static_cast<std::int64_t>(target.shape(0) / batch)));
}

void draw_normals(const Array<float>& out, std::uint64_t seed, std::uint32_t step, float scale, int threads,
                  const std::optional<std::string>& isa) {
    float* const data = out.data();
    const auto size = static_cast<std::int64_t>(out.size());
    const char* const name = name_or_null(isa);
    tstitch_status status;
    {
        const nb::gil_scoped_release release;
        status = tstitch_normals(data, size, seed, step, scale, threads, name);
    }
    raise_if(status);
}

using Word = std::uint32_t;

nb::tuple philox(Word c0, Word c1, Word c2, Word c3, Word k0, Word k1) {
    const Word counter[4] = {c0, c1, c2, c3}, key[2] = {k0, k1};
    Word out[4];
    tstitch_philox4x32_10(counter, key, out);
    return nb::make_tuple(out[0], out[1], out[2], out[3]);
}

// The two conversions that the kernels contain, by themselves, for the tests.
Dtype kernel_dtype(tstitch_dtype dtype) {
    return dtype == TSTITCH_FLOAT32 ? Dtype::float32 : dtype == TSTITCH_FLOAT16 ? Dtype::float16 : Dtype::bfloat16;
}

void to_float32(const AnyConstArray& source, const Array<float>& out, const std::optional<std::string>& isa) {
    if (source.size() != out.size()) refuse("out " + shape_text(out) + " must be as large as " + shape_text(source));
    find_kernels(name_or_null(isa))
        .to_float32(kernel_dtype(model_dtype(source, "source")), source.data(), out.data(),
                    static_cast<std::int64_t>(out.size()));
}

void from_float32(const Array<const float>& source, const AnyArray& out, const std::optional<std::string>& isa) {
    if (source.size() != out.size()) refuse("out " + shape_text(out) + " must be as large as " + shape_text(source));
    find_kernels(name_or_null(isa))
        .prepare(kernel_dtype(model_dtype(out, "out")), source.data(), 1.0f, out.data(), 0,
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
    m.attr("FLAG_STORE_Y") = FLAG_STORE_Y;
    m.attr("FLAG_INPAINT") = FLAG_INPAINT;
    m.attr("FLAG_GIVEN_NOISE") = FLAG_GIVEN_NOISE;
    m.attr("HISTORY") = HISTORY;
    m.attr("INITIAL_NOISE_STEP") = INITIAL_NOISE_STEP;
    m.attr("PARALLEL_WORK") = PARALLEL_WORK;
    m.attr("HAS_FATBIN") = bool(TSTITCH_HAS_FATBIN);
    nb::list isas;
    for (int i = 0; tstitch_isa(i) != nullptr; ++i) isas.append(tstitch_isa(i));
    m.attr("ISAS") = nb::tuple(isas);

    nb::class_<Arena>(m, "Arena")
        .def(nb::init<Array<float>, Array<float>, Array<const float, nb::shape<-1, -1, ROW_SIZE>>, Arena::Ints,
                      Array<const std::int64_t, nb::ndim<1>>, Arena::Ints, std::optional<Array<float>>,
                      std::optional<Array<const float>>, std::optional<Array<const float>>,
                      std::optional<Array<const float>>, std::int64_t, int, const std::optional<std::string>&>(),
             "latents"_a.noconvert(), "history"_a.noconvert(), "rows"_a.noconvert(), "step"_a.noconvert(),
             "seed"_a.noconvert(), "fault"_a.noconvert(), "y"_a.noconvert() = nb::none(),
             "image"_a.noconvert() = nb::none(), "mask"_a.noconvert() = nb::none(), "noise"_a.noconvert() = nb::none(),
             "spatial"_a = 0, "threads"_a = 0, "isa"_a = nb::none())
        .def("prepare", &Arena::prepare, "active"_a.noconvert(), "sample"_a.noconvert(), "timestep"_a.noconvert(),
             "guided"_a)
        .def("advance", &Arena::advance, "active"_a.noconvert(), "model_output"_a.noconvert(), "guided"_a, "rescale"_a);
    m.def("gather_rows", &gather_rows, "active"_a.noconvert(), "source"_a.noconvert(), "target"_a.noconvert());
    m.def("normals", &draw_normals, "out"_a.noconvert(), "seed"_a, "step"_a, "scale"_a = 1.0f, "threads"_a = 0,
          "isa"_a = nb::none());
    m.def("philox", &philox);
    m.def("to_float32", &to_float32, "source"_a.noconvert(), "out"_a.noconvert(), "isa"_a = nb::none());
    m.def("from_float32", &from_float32, "source"_a.noconvert(), "out"_a.noconvert(), "isa"_a = nb::none());
}
