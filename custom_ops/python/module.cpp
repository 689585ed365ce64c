// onnx_kivi._native: the caches of libonnx_kivi for Python. onnx_kivi/runtime/native.py is its only user.
//
// Stateless and thin: it turns arrays into views, releases the GIL where work is done, and turns Error into the
// classes of onnx_kivi.errors.
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <type_traits>

#include "../store/kernel_choice.hpp"
#include "../store/wire.hpp"
#include "../threads/interrupts.hpp"
#include "../threads/pool.hpp"
#include "bind.hpp"

namespace onnx_kivi {

namespace {

void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const Error& error) {
        const nb::object type = nb::module_::import_("onnx_kivi.errors").attr(class_name(error.kind));
        PyErr_SetString(type.ptr(), error.what());
    }
}

// (name, wire type, default or None) of each attribute, for the test that compares them with the spec.
template <class Attributes>
nb::list attribute_specs(int64_t version) {
    nb::list specs;
    Attributes defaults;
    defaults.spec_version = version;
    Attributes::fields(defaults, version, [&](const char* name, const auto& member) {
        const bool is_int = std::is_same_v<decltype(member), const int64_t&>;
        const bool required = static_cast<int>(specs.size()) < Attributes::REQUIRED;
        specs.append(nb::make_tuple(name, is_int ? "int" : "string", required ? nb::none() : nb::cast(member)));
    });
    return specs;
}

const char* type_name(nb::dlpack::dtype type) {
    const auto is = [type](nb::dlpack::dtype_code code, int bits) {
        return type.code == static_cast<uint8_t>(code) && type.bits == bits;
    };
    using enum nb::dlpack::dtype_code;
    if (is(Float, 16)) return "float16";
    if (is(Float, 64)) return "float64";
    if (is(Int, 32)) return "int32";
    if (is(Int, 64)) return "int64";
    if (is(Bool, 8)) return "bool";
    return "another type";
}

Tensor tensor(const AnyArray& array) {
    Tensor tensor;
    tensor.data = static_cast<const float*>(array.data());
    tensor.shape.assign(array.shape_ptr(), array.shape_ptr() + array.ndim());
    if (array.dtype() != FLOAT32) tensor.other_type = type_name(array.dtype());
    return tensor;
}

nb::object attend_arrays(int64_t ticket, const SdpaAttributes& attributes, const AnyArray& query, const AnyArray& key,
                         const AnyArray& value, const AnyArray& attn_mask, const AnyArray& head_sink) {
    Call call{tensor(query), tensor(key), tensor(value), tensor(attn_mask), tensor(head_sink), nullptr};
    nb::object output = nb::none();
    // Arrays of other ranks are refused by attend, before it writes.
    if (query.ndim() == 4 && value.ndim() == 4) {
        const auto& q = call.query.shape;
        std::tie(output, call.output) = make_array<float>({q[0], q[1], q[2], call.value.shape[3]}, FLOAT32);
    }
    {
        const nb::gil_scoped_release released;
        attend(ticket, attributes, call, default_scheduler());
    }
    return output;
}

template <class Result, class Function>
Result released(const Function& function) {
    const nb::gil_scoped_release released;
    return function();
}

}  // namespace

NB_MODULE(_native, m) {
    nb::register_exception_translator(translate);

    nb::class_<StepAttributes>(m, "StepAttributes").def("__init__", [](StepAttributes* self, const Wire& wire) {
        new (self) StepAttributes(from_wire<StepAttributes>(wire));
    });
    nb::class_<SdpaAttributes>(m, "SdpaAttributes").def("__init__", [](SdpaAttributes* self, const Wire& wire) {
        new (self) SdpaAttributes(from_wire<SdpaAttributes>(wire));
    });
    m.def("step_attribute_specs", attribute_specs<StepAttributes>);
    m.def("sdpa_attribute_specs", attribute_specs<SdpaAttributes>);
    m.def("ghost_attribute_specs", attribute_specs<GhostAttributes>);
    m.def("tensor_specs", [] {
        nb::list specs;
        for (const TensorSpec& spec : sdpa_tensors()) {
            nb::list letters;
            for (const Letter letter : spec.shape) letters.append(letter_name(letter));
            specs.append(nb::make_tuple(spec.name, nb::tuple(letters), spec.optional, spec.broadcast));
        }
        return specs;
    });

    m.def("new_cache", [] { return new_cache(); });
    m.def("close", [](int64_t handle) { released<void>([&] { close_cache(handle); }); });
    m.def("open_rows", [](const std::vector<int64_t>& handles, const std::vector<int64_t>& past_lengths,
                          const std::vector<int64_t>& new_lengths, const StepAttributes& step) {
        return released<std::pair<std::vector<int64_t>, int64_t>>(
            [&] { return open_rows(handles, past_lengths, new_lengths, step); });
    });
    m.def("attend", attend_arrays);
    m.def("members",
          [](int64_t ticket) { return released<std::vector<int64_t>>([&] { return step_members(ticket); }); });
    m.def("length", [](int64_t handle) { return released<int64_t>([&] { return cache_length(handle); }); });
    m.def("lengths",
          [](int64_t handle) { return released<std::vector<int64_t>>([&] { return cache_lengths(handle); }); });
    m.def("sealed_tokens",
          [](int64_t handle) { return released<int64_t>([&] { return sealed_tokens(cache_state(handle)); }); });
    m.def("nbytes", [](int64_t handle) { return released<int64_t>([&] { return nbytes(cache_state(handle)); }); });
    m.def("shared_nbytes",
          [](int64_t handle) { return released<int64_t>([&] { return cache_shared_nbytes(handle); }); });
    m.def("dense_nbytes",
          [](int64_t handle) { return released<int64_t>([&] { return dense_nbytes(cache_state(handle)); }); });
    m.def("crop", [](int64_t handle, int64_t length) { released<void>([&] { crop_cache(handle, length); }); });
    m.def("crop_rows", [](int64_t handle, const std::vector<int64_t>& lengths) {
        released<void>([&] { crop_rows(handle, lengths); });
    });
    m.def("reset", [](int64_t handle) { released<void>([&] { reset_cache(handle); }); });
    m.def("fork", [](int64_t handle) { return released<int64_t>([&] { return fork_cache(handle); }); });
    m.def("gather", [](const std::vector<std::pair<int64_t, int64_t>>& rows) {
        return released<int64_t>([&] { return gather_rows(rows); });
    });
    m.def("reorder", [](int64_t handle, const std::vector<int64_t>& index) {
        released<void>([&] { reorder_cache(handle, index); });
    });
    bind_state(m);

    m.def("isa", [] { return std::string(active_kernel().name); });
    m.def("isa_names", kernel_names);
    m.def("use_isa", use_kernel);
    m.def("threads", default_threads);
    m.def("watch_interrupts", watch_interrupts);
}

}  // namespace onnx_kivi
