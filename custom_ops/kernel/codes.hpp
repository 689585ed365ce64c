// Where codes and parameters sit in a side of a block (see `Side`), and float16 to and from f32.
// Internal linkage only: this header is compiled into every per-ISA object.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel.hpp"

namespace onnx_kivi {

constexpr int TILE_LANES = 16;  // lanes of one line of codes

struct CodePlace {
    int64_t byte;
    int shift;
};

// The lines of one tile of a group: `stride` apart, because two tiles that are read together alternate.
struct TileLines {
    int64_t first;
    int64_t stride;
};

// Lanes of a group, padded to whole tiles.
static inline int group_lanes(const Side& side, int group) {
    const int left = side.lanes - group * side.lanes_padded;
    return left < side.lanes_padded ? left : side.lanes_padded;
}

static inline TileLines tile_lines(const Side& side, int group, int tile) {
    const int64_t start = group * side.lanes_padded / TILE_LANES * side.tile_bytes;
    const bool paired = (tile / 2 * 2 + 1) * TILE_LANES < group_lanes(side, group);
    if (!paired) return {start + tile * side.tile_bytes, LINE_BYTES};
    return {start + tile / 2 * 2 * side.tile_bytes + tile % 2 * LINE_BYTES, 2 * LINE_BYTES};
}

static inline CodePlace code_place(const Side& side, int group, int lane, int depth) {
    const int per_line = 32 / side.bits;
    const TileLines lines = tile_lines(side, group, lane / TILE_LANES);
    return {lines.first + depth / per_line * lines.stride + 4 * (lane % TILE_LANES) + depth % 4,
            depth % per_line / 4 * side.bits};
}

static inline int code_at(const Side& side, const unsigned char* data, int group, int lane, int depth) {
    const CodePlace place = code_place(side, group, lane, depth);
    return data[place.byte] >> place.shift & ((1 << side.bits) - 1);
}

// float16 lo (which = 0) or scale (which = 1) of a group, by depth.
static inline int64_t param_offset(const Side& side, int group, int which) {
    return side.code_bytes + int64_t(2 * group + which) * side.depth_padded * int64_t(sizeof(uint16_t));
}

static inline const uint16_t* params(const Side& side, const unsigned char* data, int group, int which) {
    return reinterpret_cast<const uint16_t*>(data + param_offset(side, group, which));
}

static inline uint16_t* params(const Side& side, unsigned char* data, int group, int which) {
    return reinterpret_cast<uint16_t*>(data + param_offset(side, group, which));
}

static inline int64_t side_bytes(const Side& side, bool dense) {
    return dense ? side.dense_bytes : side.quantized_bytes;
}

// Offset of one kv head's keys or values in a block.
static inline int64_t side_offset(const Layout& layout, uint32_t dense, int64_t head, bool key) {
    const int64_t key_bytes = side_bytes(layout.key, dense & KEY_DENSE);
    const int64_t value_bytes = side_bytes(layout.value, dense & VALUE_DENSE);
    return head * (key_bytes + value_bytes) + (key ? 0 : key_bytes);
}

static inline bool side_is_dense(uint32_t dense, bool key) { return dense & (key ? KEY_DENSE : VALUE_DENSE); }

static inline float half_to_float(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    return half & 0x8000 ? -value : value;
}

// float16 of a magnitude: rounded toward zero, or away from it (infinity beyond 65504 then).
static inline uint16_t half_of_magnitude(float magnitude, bool away) {
    uint32_t bits, half;
    bool exact;
    std::memcpy(&bits, &magnitude, sizeof bits);
    if (magnitude < 0x1p-14f) {
        const float units = magnitude * 0x1p24f;
        half = uint32_t(units);
        exact = float(half) == units;
    } else {
        half = (bits >> 13) - (112u << 10);
        exact = (bits & 0x1fff) == 0;
    }
    half += away && !exact;
    const uint32_t largest = away ? 0x7c00 : 0x7bff;
    return uint16_t(half < largest ? half : largest);
}

// float16 toward minus infinity; a zero is +0.
static inline uint16_t half_below(float value) {
    if (value >= 0) return half_of_magnitude(value, false);
    return uint16_t(0x8000 | half_of_magnitude(-value, true));
}

}  // namespace onnx_kivi
