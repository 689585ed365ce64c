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
    int group(int column) const { return column / side.group_size; }
    int lane(int column) const { return column % side.group_size; }
};

Rows rows_of(const Layout& layout, bool key) { return {key ? layout.key : layout.value, key}; }

// Of at most 8 bits, which may lie across two bytes.
int packed_code(const unsigned char* packed, int64_t index, int bits) {
    const int64_t at = index * bits;
    const int shift = int(at % 8), above = shift + bits > 8 ? packed[at / 8 + 1] << 8 : 0;
    return (packed[at / 8] | above) >> shift & ((1 << bits) - 1);
}

void put_packed(unsigned char* packed, int64_t index, int bits, int code) {
    const int64_t at = index * bits;
    const int shifted = code << at % 8;
    packed[at / 8] |= (unsigned char)shifted;
    if (shifted >> 8) packed[at / 8 + 1] |= (unsigned char)(shifted >> 8);
}

int64_t digit_bytes(const Side& side) { return (int64_t(side.params) * 2 + 7) / 8; }

// Numbers of digits, and scales of tokens.
void export_extras(const Side& side, const unsigned char* data, int head, const CanonicalSide& to) {
    if (side.digits) {
        unsigned char* packed = to.digits + head * digit_bytes(side);
        std::memset(packed, 0, size_t(digit_bytes(side)));
        for (int i = 0; i < side.params; ++i) put_packed(packed, i, 2, digits_of(side, data, i));
    }
    if (!side.tokens) return;
    std::memcpy(to.token + int64_t(head) * side.group_size, data + token_offset(side), size_t(side.group_size));
    std::memcpy(to.unit + head, data + unit_offset(side), sizeof(uint16_t));
}

void import_extras(const Side& side, unsigned char* data, int head, const CanonicalSide& from) {
    if (side.digits) {
        const unsigned char* packed = from.digits + head * digit_bytes(side);
        for (int i = 0; i < side.params; ++i) put_digits(side, data, i, packed_code(packed, i, 2));
    }
    if (!side.tokens) return;
    std::memcpy(data + token_offset(side), from.token + int64_t(head) * side.group_size, size_t(side.group_size));
    std::memcpy(data + unit_offset(side), from.unit + head, sizeof(uint16_t));
}

}  // namespace

int64_t canonical_code_bytes(const Layout& layout, bool key) {
    const Rows rows = rows_of(layout, key);
    return layout.shape.kv_heads * rows.count() * rows.bytes();
}

void export_side(const Layout& layout, BlockRef block, bool key, const CanonicalSide& to) {
    const Rows rows = rows_of(layout, key);
    const Side& side = rows.side;
    std::memset(to.codes, 0, size_t(canonical_code_bytes(layout, key)));
    for (int head = 0; head < layout.shape.kv_heads; ++head) {
        const unsigned char* data = block.data + side_offset(layout, block.dense, head, key);
        for (int row = 0; row < rows.count(); ++row) {
            unsigned char* packed = to.codes + (int64_t(head) * rows.count() + row) * rows.bytes();
            for (int column = 0; column < rows.length(); ++column)
                put_packed(packed, column, side.bits, code_at(side, data, rows.group(column), rows.lane(column), row));
        }
        for (int i = 0; i < side.params; ++i)
            for (int group = 0; group < side.groups; ++group) {
                const int64_t index = (int64_t(head) * side.params + i) * side.groups + group;
                if (!side.symmetric) to.lo[index] = params(side, data, group, 0)[i];
                to.scale[index] = params(side, data, group, 1)[i];
            }
        export_extras(side, data, head, to);
    }
}

void import_side(const Layout& layout, unsigned char* block, uint32_t dense, bool key, const CanonicalSide& from) {
    const Rows rows = rows_of(layout, key);
    const Side& side = rows.side;
    for (int head = 0; head < layout.shape.kv_heads; ++head) {
        unsigned char* data = block + side_offset(layout, dense, head, key);
        std::memset(data, 0, size_t(side.quantized_bytes));
        for (int row = 0; row < rows.count(); ++row) {
            const unsigned char* packed = from.codes + (int64_t(head) * rows.count() + row) * rows.bytes();
            for (int column = 0; column < rows.length(); ++column)
                put_code(side, data, rows.group(column), rows.lane(column), row,
                         packed_code(packed, column, side.bits));
        }
        for (int i = 0; i < side.params; ++i)
            for (int group = 0; group < side.groups; ++group) {
                const int64_t index = (int64_t(head) * side.params + i) * side.groups + group;
                if (!side.symmetric) params(side, data, group, 0)[i] = from.lo[index];
                params(side, data, group, 1)[i] = from.scale[index];
            }
        import_extras(side, data, head, from);
    }
}

}  // namespace onnx_kivi
