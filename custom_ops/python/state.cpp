// Caches to and from the canonical layout, as nested tuples of NumPy arrays; onnx_kivi/runtime/native.py gives them
// the dataclasses of onnx_kivi/runtime/backend.py. Absent sides and parts follow those.
#include <nanobind/stl/string.h>

#include "../store/canonical.hpp"
#include "bind.hpp"

namespace onnx_kivi {

namespace {

template <class Attributes>
nb::dict to_wire(const Attributes& attributes) {
    nb::dict wire;
    Attributes::fields(attributes, [&](const char* name, const auto& member) {
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
std::pair<nb::object, nb::object> export_tokens(const SlotLayout& layout, int64_t tokens, const Fill& fill) {
    const SlotShape& shape = layout.blocks.shape;
    auto [key, key_data] = make_array<float>({shape.kv_heads, tokens, shape.k_size}, FLOAT32);
    auto [value, value_data] = make_array<float>({shape.kv_heads, tokens, shape.v_size}, FLOAT32);
    if (tokens > 0) fill(TokensState{key_data, value_data, tokens});
    return {key, value};
}

// An array if the side is dense, else (codes, lo, scale).
std::pair<nb::object, SideState> make_side(const SlotLayout& layout, bool dense, bool key) {
    const SlotShape& shape = layout.blocks.shape;
    const Side& side = key ? layout.blocks.key : layout.blocks.value;
    SideState memory;
    if (dense) {
        auto [array, data] = make_array<float>({shape.kv_heads, layout.block_tokens, side.size}, FLOAT32);
        memory.dense = data;
        return {array, memory};
    }
    const int64_t rows = key ? shape.k_size : layout.block_tokens, columns = key ? layout.block_tokens : shape.v_size;
    std::vector<int64_t> params{shape.kv_heads, rows};
    if (!key) params.push_back(side.groups);
    auto [codes, code_data] = make_array<unsigned char>({shape.kv_heads, rows, (columns * side.bits + 7) / 8}, UINT8);
    auto [lo, lo_data] = make_array<uint16_t>(params, FLOAT16);
    auto [scale, scale_data] = make_array<uint16_t>(params, FLOAT16);
    memory.quantized = {code_data, lo_data, scale_data};
    return {nb::make_tuple(codes, lo, scale), memory};
}

nb::tuple export_row(const SlotLayout& layout, const Row& row) {
    const auto [sink_key, sink_value] =
        export_tokens(layout, row.sink_tokens(layout), [&](const TokensState& to) { export_sinks(layout, row, to); });
    nb::list blocks;
    for (int64_t i = 0; i < row.sealed_blocks(); ++i) {
        const Block& block = row.block(i);
        const auto [key, key_memory] = make_side(layout, block.dense & KEY_DENSE, true);
        const auto [value, value_memory] = make_side(layout, block.dense & VALUE_DENSE, false);
        export_block(layout, block, {key_memory, value_memory});
        blocks.append(nb::make_tuple(key, value));
    }
    const auto [residual_key, residual_value] = export_tokens(
        layout, row.residual_tokens(layout), [&](const TokensState& to) { export_residual(layout, row, to); });
    return nb::make_tuple(sink_key, sink_value, blocks, residual_key, residual_value);
}

// (step's wire attributes or None, length, [(wire attributes, [row, ...]), ...])
nb::tuple export_state(int64_t handle) {
    const Snapshot snapshot = cache_snapshot(handle);
    nb::list slots;
    for (const auto& [index, slot] : snapshot.slots) {
        nb::list rows;
        for (const Row& row : slot.rows) rows.append(export_row(slot.layout, row));
        slots.append(nb::make_tuple(to_wire(slot.attributes), rows));
    }
    nb::object step = nb::none();
    if (snapshot.step) step = to_wire(*snapshot.step);
    return nb::make_tuple(step, snapshot.length, slots);
}

// Arrays that a row's views point into; the tuples hold them for longer than the import takes.
template <class T>
T* memory_of(nb::handle array) {
    return static_cast<T*>(const_cast<void*>(nb::cast<AnyArray>(array).data()));
}

SideState import_side_state(nb::handle side) {
    SideState state;
    if (nb::isinstance<nb::tuple>(side)) {
        state.quantized = {memory_of<unsigned char>(side[0]), memory_of<uint16_t>(side[1]),
                           memory_of<uint16_t>(side[2])};
    } else {
        state.dense = memory_of<float>(side);
    }
    return state;
}

TokensState import_tokens(nb::handle key, nb::handle value) {
    return {memory_of<float>(key), memory_of<float>(value), nb::cast<int64_t>(key.attr("shape")[1])};
}

Row import_row(const SlotLayout& layout, nb::handle row) {
    std::vector<BlockState> blocks;
    for (const nb::handle block : row[2]) blocks.push_back({import_side_state(block[0]), import_side_state(block[1])});
    return import_row(layout, import_tokens(row[0], row[1]), blocks, import_tokens(row[3], row[4]));
}

int64_t import_state(const StepAttributes* step, int64_t length, const nb::list& slots) {
    Snapshot snapshot;
    if (step) snapshot.step = *step;
    snapshot.length = length;
    for (const nb::handle given : slots) {
        Slot slot;
        slot.attributes = nb::cast<SdpaAttributes>(given[0]);
        for (const nb::handle row : given[1]) {
            if (slot.rows.empty()) {
                const nb::object key = row[3].attr("shape"), value = row[4].attr("shape");
                slot.layout = make_slot_layout(slot.attributes.row, nb::cast<int64_t>(key[0]),
                                               nb::cast<int64_t>(key[2]), nb::cast<int64_t>(value[2]));
            }
            slot.rows.push_back(import_row(slot.layout, row));
        }
        snapshot.slots.emplace(slot.attributes.slot, std::move(slot));
    }
    return new_cache(std::move(snapshot));
}

}  // namespace

void bind_state(nb::module_& m) {
    m.def("export_state", export_state);
    m.def("import_state", import_state, nb::arg("step").none(), nb::arg("length"), nb::arg("slots"));
}

}  // namespace onnx_kivi
