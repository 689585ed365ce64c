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

// Bits of the codes in the first lines of a tile: all, but for the highest of 3.
static inline int low_bits(const Side& side) { return side.bits == 3 ? 2 : side.bits; }
static inline int low_lines(const Side& side) { return side.depth_padded * low_bits(side) / 32; }

// Of a code's part of so many bits, whose lines are those from `first_line` on.
static inline CodePlace part_place(const Side& side, int group, int lane, int depth, int bits, int first_line) {
    const int per_line = 32 / bits;
    const TileLines lines = tile_lines(side, group, lane / TILE_LANES);
    return {lines.first + (first_line + depth / per_line) * lines.stride + 4 * (lane % TILE_LANES) + depth % 4,
            depth % per_line / 4 * bits};
}

static inline CodePlace code_place(const Side& side, int group, int lane, int depth) {
    return part_place(side, group, lane, depth, low_bits(side), 0);
}

// Of the highest of 3 bits.
static inline CodePlace high_place(const Side& side, int group, int lane, int depth) {
    return part_place(side, group, lane, depth, 1, low_lines(side));
}

static inline int code_at(const Side& side, const unsigned char* data, int group, int lane, int depth) {
    const CodePlace place = code_place(side, group, lane, depth);
    const int code = data[place.byte] >> place.shift & ((1 << low_bits(side)) - 1);
    if (side.bits != 3) return code;
    const CodePlace high = high_place(side, group, lane, depth);
    return code | (data[high.byte] >> high.shift & 1) << 2;
}

static inline void put_code(const Side& side, unsigned char* data, int group, int lane, int depth, int code) {
    const CodePlace place = code_place(side, group, lane, depth);
    data[place.byte] |= (unsigned char)((code & ((1 << low_bits(side)) - 1)) << place.shift);
    if (side.bits != 3) return;
    const CodePlace high = high_place(side, group, lane, depth);
    data[high.byte] |= (unsigned char)(code >> 2 << high.shift);
}

// float16 lo (which = 0, unless symmetric) or scale (which = 1) of a group, by channel of keys or token of values.
static inline int64_t param_offset(const Side& side, int group, int which) {
    const int index = side.symmetric ? group : 2 * group + which;
    return side.code_bytes + int64_t(index) * side.params_padded * int64_t(sizeof(uint16_t));
}

// Where digits are: bit c of plane 0 or 1 is that of channel c's number of them.
static inline int64_t plane_offset(const Side& side, int plane) {
    return param_offset(side, side.groups, 0) + plane * side.params_padded / 8;
}

static inline int64_t token_offset(const Side& side) { return plane_offset(side, side.digits ? 2 : 0); }
static inline int64_t unit_offset(const Side& side) { return token_offset(side) + (side.tokens ? side.lanes : 0); }

static inline int digits_of(const Side& side, const unsigned char* data, int channel) {
    const auto bit = [&](int plane) { return data[plane_offset(side, plane) + channel / 8] >> channel % 8 & 1; };
    return bit(0) | bit(1) << 1;
}

static inline void put_digits(const Side& side, unsigned char* data, int channel, int digits) {
    for (int plane = 0; plane < 2; ++plane)
        data[plane_offset(side, plane) + channel / 8] |= (unsigned char)((digits >> plane & 1) << channel % 8);
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

// float16 nearest, ties to even; a zero is +0.
static inline uint16_t half_nearest(float value) {
    const float size = value < 0 ? -value : value;
    const uint16_t below = half_of_magnitude(size, false), above = half_of_magnitude(size, true);
    if (above == 0x7c00) {
        if (size >= 65520.0f) return uint16_t(value < 0 ? 0xfc00 : 0x7c00);
        return uint16_t((value < 0 ? 0x8000 : 0) | below);
    }
    const float down = size - half_to_float(below), up = half_to_float(above) - size;
    const uint16_t nearest = down < up || (down == up && !(below & 1)) ? below : above;
    return uint16_t(nearest == 0 ? 0 : (value < 0 ? 0x8000 : 0) | nearest);
}

// float16 toward minus infinity; a zero is +0.
static inline uint16_t half_below(float value) {
    if (value >= 0) return half_of_magnitude(value, false);
    return uint16_t(0x8000 | half_of_magnitude(-value, true));
}

}  // namespace onnx_kivi
