// Codes of a block to and from the canonical packed layout of files and of onnx_kivi/runtime/backend.py.
#include "codes.hpp"

namespace onnx_kivi {
namespace {

// The canonical layout as rows of packed codes: a row is a key channel over tokens, or a token over value channels.
struct Rows {
    const Side& side;
    bool key;

    int count() const { return side.depth; }
    int length() const { return key ? side.group_size : side.size; }
    int64_t bytes() const { return (int64_t(length()) * side.bits + 7) / 8; }
    CodePlace place(int row, int column) const {
        return code_place(side, column / side.group_size, column % side.group_size, row);
    }
};

Rows rows_of(const Layout& layout, bool key) { return {key ? layout.key : layout.value, key}; }

}  // namespace

int64_t canonical_code_bytes(const Layout& layout, bool key) {
    const Rows rows = rows_of(layout, key);
    return layout.shape.kv_heads * rows.count() * rows.bytes();
}

int64_t canonical_param_count(const Layout& layout, bool key) {
    const Rows rows = rows_of(layout, key);
    return int64_t(layout.shape.kv_heads) * rows.count() * rows.side.groups;
}

void export_side(const Layout& layout, BlockRef block, bool key, const CanonicalSide& to) {
    const Rows rows = rows_of(layout, key);
    const Side& side = rows.side;
    std::memset(to.codes, 0, size_t(canonical_code_bytes(layout, key)));
    for (int head = 0; head < layout.shape.kv_heads; ++head) {
        const unsigned char* data = block.data + side_offset(layout, block.dense, head, key);
        for (int row = 0; row < rows.count(); ++row) {
            const int64_t index = int64_t(head) * rows.count() + row;
            unsigned char* packed = to.codes + index * rows.bytes();
            for (int column = 0; column < rows.length(); ++column) {
                const CodePlace place = rows.place(row, column);
                const int code = data[place.byte] >> place.shift & ((1 << side.bits) - 1);
                packed[column * side.bits / 8] |= (unsigned char)(code << column * side.bits % 8);
            }
            for (int group = 0; group < side.groups; ++group) {
                to.lo[index * side.groups + group] = params(side, data, group, 0)[row];
                to.scale[index * side.groups + group] = params(side, data, group, 1)[row];
            }
        }
    }
}

void import_side(const Layout& layout, unsigned char* block, uint32_t dense, bool key, const CanonicalSide& from) {
    const Rows rows = rows_of(layout, key);
    const Side& side = rows.side;
    for (int head = 0; head < layout.shape.kv_heads; ++head) {
        unsigned char* data = block + side_offset(layout, dense, head, key);
        std::memset(data, 0, size_t(side.quantized_bytes));
        for (int row = 0; row < rows.count(); ++row) {
            const int64_t index = int64_t(head) * rows.count() + row;
            const unsigned char* packed = from.codes + index * rows.bytes();
            for (int column = 0; column < rows.length(); ++column) {
                const CodePlace place = rows.place(row, column);
                const int code = packed[column * side.bits / 8] >> column * side.bits % 8 & ((1 << side.bits) - 1);
                data[place.byte] |= (unsigned char)(code << place.shift);
            }
            for (int group = 0; group < side.groups; ++group) {
                params(side, data, group, 0)[row] = from.lo[index * side.groups + group];
                params(side, data, group, 1)[row] = from.scale[index * side.groups + group];
            }
        }
    }
}

}  // namespace onnx_kivi
