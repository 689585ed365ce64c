// Caches to and from the canonical layout, as nested tuples of NumPy arrays; onnx_kivi/runtime/native.py gives them
// the dataclasses of onnx_kivi/runtime/backend.py. Absent sides and parts follow those.
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "../store/canonical.hpp"
#include "../store/import.hpp"
#include "../store/wire.hpp"
#include "bind.hpp"

namespace onnx_kivi {

namespace {

// (keys, values) of dense tokens.
template <class Fill>
nb::tuple export_tokens(const SlotLayout& layout, int64_t tokens, const Fill& fill) {
    const SlotShape& shape = layout.blocks.shape;
    auto [key, key_data] = make_array<float>({shape.kv_heads, tokens, shape.k_size}, FLOAT32);
    auto [value, value_data] = make_array<float>({shape.kv_heads, tokens, shape.v_size}, FLOAT32);
    if (tokens > 0) fill(TokensState{key_data, value_data, tokens});
    return nb::make_tuple(key, value);
}

std::pair<nb::object, void*> make_part(const Part& part) {
    switch (part.element) {
        case Element::float32: return make_array<float>(part.shape, FLOAT32);
        case Element::float16: return make_array<uint16_t>(part.shape, FLOAT16);
        case Element::uint8: return make_array<unsigned char>(part.shape, UINT8);
    }
    return {};
}

// An array if the side is dense, else a tuple of its parts, empty where its scheme has them not.
std::pair<nb::object, SideState> make_side(const SlotLayout& layout, bool dense, bool key) {
    nb::list arrays;
    std::vector<void*> memory;
    for (const Part& part : side_parts(layout, key, dense)) {
        const auto [array, data] = make_part(part);
        arrays.append(array);
        memory.push_back(elements(part) > 0 ? data : nullptr);
    }
    const nb::object side = dense ? nb::object(arrays[0]) : nb::object(nb::tuple(arrays));
    return {side, side_state(memory, dense)};
}

// ((sink key, sink value), freed, [block, ...], (residual key, residual value))
nb::tuple export_row(const SlotLayout& layout, const Row& row) {
    const nb::tuple sinks =
        export_tokens(layout, row.sink_tokens(layout), [&](const TokensState& to) { export_sinks(layout, row, to); });
    nb::list blocks;
    for (int64_t i = 0; i < row.sealed_blocks(); ++i) {
        const Block& block = row.block(i);
        const auto [key, key_memory] = make_side(layout, block.dense & KEY_DENSE, true);
        const auto [value, value_memory] = make_side(layout, block.dense & VALUE_DENSE, false);
        export_block(layout, block, {key_memory, value_memory});
        blocks.append(nb::make_tuple(key, value));
    }
    const nb::tuple residual = export_tokens(layout, row.residual_tokens(layout),
                                             [&](const TokensState& to) { export_residual(layout, row, to); });
    return nb::make_tuple(sinks, row.freed(), blocks, residual);
}

// (step's wire attributes or None, lengths, [(wire attributes, [row, ...]), ...])
nb::tuple export_state(int64_t handle) {
    const State state = cache_state(handle);
    nb::list slots, lengths;
    for (const int64_t length : state.lengths) lengths.append(length);
    for (const auto& [index, slot] : state.slots) {
        nb::list rows;
        for (const Row& row : slot.rows) rows.append(export_row(*slot.layout, row));
        slots.append(nb::make_tuple(to_wire(*slot.attributes), rows));
    }
    nb::object step = nb::none();
    if (state.step) step = nb::cast(to_wire(*state.step));
    return nb::make_tuple(step, lengths, slots);
}

// Arrays of a state that is being imported, held for as long: a contiguous copy may stand in for what was given.
class Arrays {
public:
    ArrayView view(nb::handle given) {
        AnyArray array;
        if (!nb::try_cast(given, array)) return {nullptr, described(given), {}, false};
        held_.push_back(array);
        ArrayView view{array.data(), nb::cast<std::string>(nb::str(nb::object(given.attr("dtype")))), {}};
        view.shape.assign(array.shape_ptr(), array.shape_ptr() + array.ndim());
        return view;
    }

    SideArrays side(nb::handle given) {
        const bool dense = !nb::isinstance<nb::tuple>(given);
        std::vector<ArrayView> arrays;
        if (dense) arrays.push_back(view(given));
        for (std::size_t i = 0; !dense && i < nb::len(given); ++i) arrays.push_back(view(given[i]));
        return side_arrays(arrays, dense);
    }

    RowArrays row(nb::handle given) {
        const nb::handle sinks = given[0], residual = given[3];
        RowArrays row{view(sinks[0]),    view(sinks[1]),   nb::cast<int64_t>(given[1]), {},
                      view(residual[0]), view(residual[1])};
        for (const nb::handle block : given[2]) row.blocks.push_back({side(block[0]), side(block[1])});
        return row;
    }

private:
    static std::string described(nb::handle given) { return nb::cast<std::string>(nb::repr(given.type())); }

    std::vector<AnyArray> held_;
};

int64_t import_arrays(const StepAttributes* step, const std::vector<int64_t>& lengths, const nb::list& slots) {
    Arrays arrays;
    StateArrays state;
    if (step) state.step = *step;
    state.lengths = lengths;
    for (const nb::handle given : slots) {
        SlotArrays slot{nb::cast<SdpaAttributes>(given[0]), {}};
        for (const nb::handle row : given[1]) slot.rows.push_back(arrays.row(row));
        state.slots.push_back(std::move(slot));
    }
    return new_cache(import_state(state));
}

}  // namespace

void bind_state(nb::module_& m) {
    m.def("export_state", export_state);
    m.def("import_state", import_arrays, nb::arg("step").none(), nb::arg("lengths"), nb::arg("slots"));
}

}  // namespace onnx_kivi
