// Sizes of a block's memory, derived from what defines the slot.
#include "codes.hpp"

namespace onnx_kivi {
namespace {

int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

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
    side.dense_bytes = padded(int64_t(tokens) * size * int64_t(sizeof(float)), LINE_BYTES);
    side.tile_bytes = int64_t(side.depth_padded) * bits / 32 * LINE_BYTES;
    if (bits != DENSE_BITS) {
        side.code_bytes = side.lanes / TILE_LANES * side.tile_bytes;
        side.quantized_bytes = padded(param_offset(side, groups, 0), LINE_BYTES);
    }
    return side;
}

}  // namespace

Layout make_layout(const SlotShape& shape) {
    const int32_t tokens = shape.block_tokens;
    const bool whole_row = shape.v_group_size == 0 || shape.v_group_size > shape.v_size;
    const int32_t group = whole_row ? shape.v_size : shape.v_group_size;
    return {shape, make_side(shape.k_size, shape.k_bits, tokens, tokens, tokens, shape.k_size),
            make_side(shape.v_size, shape.v_bits, tokens, shape.v_size, group, tokens)};
}

uint32_t least_dense(const Layout& layout) {
    return (layout.key.bits == DENSE_BITS ? KEY_DENSE : NONE_DENSE) |
           (layout.value.bits == DENSE_BITS ? VALUE_DENSE : NONE_DENSE);
}

int64_t block_bytes(const Layout& layout, uint32_t dense) {
    return side_offset(layout, dense, layout.shape.kv_heads, true);
}

}  // namespace onnx_kivi
