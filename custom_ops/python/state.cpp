// Caches to and from the canonical layout, as nested tuples of NumPy arrays; onnx_kivi/runtime/native.py gives them
// the dataclasses of onnx_kivi/runtime/backend.py. Absent sides and parts follow those.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "../store/canonical.hpp"
#include "../store/import.hpp"
#include "bind.hpp"

namespace onnx_kivi {

namespace {

template <class Attributes>
nb::dict to_wire(const Attributes& attributes) {
    nb::dict wire;
    Attributes::fields(attributes, attributes.spec_version, [&](const char* name, const auto& member) {
        if constexpr (std::is_same_v<decltype(member), const double&>) {
            wire[name] = nb::repr(nb::float_(member));
        } else {
            wire[name] = member;
        }
    });
    return wire;
}

// (keys, values) of dense tokens.
template <class Fill>
nb::tuple export_tokens(const SlotLayout& layout, int64_t tokens, const Fill& fill) {
    const SlotShape& shape = layout.blocks.shape;
    auto [key, key_data] = make_array<float>({shape.kv_heads, tokens, shape.k_size}, FLOAT32);
    auto [value, value_data] = make_array<float>({shape.kv_heads, tokens, shape.v_size}, FLOAT32);
    if (tokens > 0) fill(TokensState{key_data, value_data, tokens});
    return nb::make_tuple(key, value);
}

template <class Number>
Number* add_part(nb::list& parts, std::vector<int64_t> shape, bool present, nb::dlpack::dtype type) {
    auto [array, data] = make_array<Number>(present ? std::move(shape) : std::vector<int64_t>{0}, type);
    parts.append(array);
    return present ? data : nullptr;
}

// An array if the side is dense, else a tuple of the parts of its codes, empty where its scheme has them not.
std::pair<nb::object, SideState> make_side(const SlotLayout& layout, bool dense, bool key) {
    const SlotShape& shape = layout.blocks.shape;
    const Side& side = key ? layout.blocks.key : layout.blocks.value;
    SideState memory;
    if (dense) {
        auto [array, data] = make_array<float>({shape.kv_heads, layout.block_tokens, side.size}, FLOAT32);
        memory.dense = data;
        return {array, memory};
    }
    const int64_t heads = shape.kv_heads, columns = key ? layout.block_tokens : shape.v_size;
    std::vector<int64_t> params{heads, side.params};
    if (!key) params.push_back(side.groups);
    nb::list parts;
    CanonicalSide& to = memory.quantized;
    to.codes = add_part<unsigned char>(parts, {heads, side.depth, (columns * side.bits + 7) / 8}, true, UINT8);
    to.lo = add_part<uint16_t>(parts, params, !side.symmetric, FLOAT16);
    to.scale = add_part<uint16_t>(parts, params, true, FLOAT16);
    to.digits = add_part<unsigned char>(parts, {heads, (side.params * 2 + 7) / 8}, side.digits, UINT8);
    to.token = add_part<unsigned char>(parts, {heads, layout.block_tokens}, side.tokens, UINT8);
    to.unit = add_part<uint16_t>(parts, {heads}, side.tokens, FLOAT16);
    return {nb::tuple(parts), memory};
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
    if (state.step) step = to_wire(*state.step);
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
        if (!nb::isinstance<nb::tuple>(given)) return {true, view(given), {}, {}, {}, {}, {}, {}};
        return {false,         {}, view(given[0]), view(given[1]), view(given[2]), view(given[3]), view(given[4]),
                view(given[5])};
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
