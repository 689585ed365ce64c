// Sizes of a block's memory, derived from what defines the slot.
#include "scratch.hpp"

namespace onnx_kivi {
namespace {

int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// `lanes` of a group, of all `all_lanes`; `depth` of the codes.
Side make_side(int32_t size, int32_t bits, int32_t tokens, int32_t all_lanes, int32_t lanes, int32_t depth) {
    const int32_t groups = (all_lanes + lanes - 1) / lanes;
    Side side{};
    side.size = size;
    side.bits = bits;
    side.groups = groups;
    side.group_size = lanes;
    side.lanes_padded = int32_t(padded(lanes, TILE_LANES));
    side.lanes = (groups - 1) * side.lanes_padded + int32_t(padded(all_lanes - (groups - 1) * lanes, TILE_LANES));
    side.depth = depth;
    side.depth_padded = int32_t(padded(depth, TILE_LANES));
    side.params = depth;
    side.params_padded = side.depth_padded;
    side.dense_bytes = padded(int64_t(tokens) * size * int64_t(sizeof(float)), LINE_BYTES);
    return side;
}

// What takes the codes of a side, whose schemes are set.
void set_bytes(Side& side) {
    if (side.bits == DENSE_BITS) return;
    const int64_t high_lines = side.bits == 3 ? (side.depth_padded + 31) / 32 : 0;
    side.tile_bytes = (low_lines(side) + high_lines) * LINE_BYTES;
    side.code_bytes = side.lanes / TILE_LANES * side.tile_bytes;
    side.quantized_bytes = padded(unit_offset(side) + (side.tokens ? int64_t(sizeof(uint16_t)) : 0), LINE_BYTES);
}

Side make_key_side(const SlotShape& shape) {
    const int32_t tokens = shape.block_tokens;
    Side side =
        make_side(shape.k_size, shape.k_bits, tokens, tokens, tokens, shape.k_digits ? shape.k_digits : shape.k_size);
    side.params = shape.k_size;
    side.params_padded = int32_t(padded(shape.k_size, TILE_LANES));
    side.digits = shape.k_digits > 0;
    side.tokens = shape.k_token;
    side.rotated = shape.k_rotated;
    set_bytes(side);
    return side;
}

Side make_value_side(const SlotShape& shape) {
    const bool whole_row = shape.v_group_size == 0 || shape.v_group_size > shape.v_size;
    const int32_t group = whole_row ? shape.v_size : shape.v_group_size;
    Side side = make_side(shape.v_size, shape.v_bits, shape.block_tokens, shape.v_size, group, shape.block_tokens);
    side.rotated = side.symmetric = shape.v_symmetric;
    set_bytes(side);
    return side;
}

}  // namespace

Layout make_layout(const SlotShape& shape) { return {shape, make_key_side(shape), make_value_side(shape)}; }

uint32_t least_dense(const Layout& layout) {
    return (layout.key.bits == DENSE_BITS ? KEY_DENSE : NONE_DENSE) |
           (layout.value.bits == DENSE_BITS ? VALUE_DENSE : NONE_DENSE);
}

int64_t block_bytes(const Layout& layout, uint32_t dense) {
    return side_offset(layout, dense, layout.shape.kv_heads, true);
}

int64_t encode_scratch_bytes(const Layout& layout) {
    const EncodeScratch scratch = make_encode_scratch(layout);
    return padded(scratch.floats * int64_t(sizeof(float)), LINE_BYTES);
}

}  // namespace onnx_kivi
