// Sealing: a block of f32 tokens to codes, and back. Plain loops, so that every level computes the same bits.
#pragma once

#include "codes.hpp"

namespace onnx_kivi::KIVI_ISA {

constexpr int CHUNK = 64;                      // channels worked on at a time
constexpr float ROUND_TO_INTEGER = 0x1.8p23f;  // adding it rounds to even at the unit

struct Range {
    float lowest[CHUNK];
    float highest[CHUNK];
    uint32_t not_finite;
};

static inline void start_range(Range& range, int count) {
    range.not_finite = 0;
    for (int i = 0; i < count; ++i) {
        range.lowest[i] = __builtin_inff();
        range.highest[i] = -__builtin_inff();
    }
}

static inline void widen_range(Range& range, const float* values, int count) {
    for (int i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        range.not_finite |= (bits & 0x7f800000) == 0x7f800000;
        range.lowest[i] = values[i] < range.lowest[i] ? values[i] : range.lowest[i];
        range.highest[i] = values[i] > range.highest[i] ? values[i] : range.highest[i];
    }
}

// Parameters of one group: rounded outward, so that its extremes stay within half a step. False if float16 can't
// hold them.
static inline bool make_params(float lowest, float highest, int bits, uint16_t& lo, uint16_t& scale) {
    lo = half_below(lowest);
    if (lo == 0xfc00) return false;
    const float step = (highest - half_to_float(lo)) / float((1 << bits) - 1);
    const uint16_t least = 0x0400;
    scale = half_of_magnitude(step, true);
    scale = scale < least ? least : scale;
    return scale != 0x7c00;
}

static inline void make_codes(const float* values, const float* lo, const float* scale, float levels, int count,
                              unsigned char* codes) {
    for (int i = 0; i < count; ++i) {
        float code = (values[i] - lo[i]) / scale[i];
        code = code < 0 ? 0 : code;
        code = code > levels ? levels : code;
        codes[i] = (unsigned char)(int)((code + ROUND_TO_INTEGER) - ROUND_TO_INTEGER);
    }
}

// Codes whose bytes are `step` apart: up to 4 depths of one lane (step 1), or up to 16 lanes of one tile (step 4).
static inline void put_codes(const Side& side, unsigned char* data, int group, int lane, int depth, int step,
                             const unsigned char* codes, int count) {
    const CodePlace place = code_place(side, group, lane, depth);
    for (int i = 0; i < count; ++i) data[place.byte + i * step] |= (unsigned char)(codes[i] << place.shift);
}

static inline int at_most(int count, int most) { return count < most ? count : most; }

// One head's keys: a group is a channel over all tokens of the block.
static bool encode_keys(const Side& side, const float* tokens, int64_t stride, unsigned char* data) {
    const float levels = float((1 << side.bits) - 1);
    for (int first = 0; first < side.size; first += CHUNK) {
        const int count = at_most(side.size - first, CHUNK);
        Range range;
        start_range(range, count);
        for (int token = 0; token < side.group_size; ++token)
            widen_range(range, tokens + token * stride + first, count);
        if (range.not_finite) return false;
        float lo[CHUNK], scale[CHUNK];
        for (int i = 0; i < count; ++i) {
            uint16_t& lo16 = params(side, data, 0, 0)[first + i];
            uint16_t& scale16 = params(side, data, 0, 1)[first + i];
            if (!make_params(range.lowest[i], range.highest[i], side.bits, lo16, scale16)) return false;
            lo[i] = half_to_float(lo16);
            scale[i] = half_to_float(scale16);
        }
        for (int token = 0; token < side.group_size; ++token) {
            unsigned char codes[CHUNK];
            make_codes(tokens + token * stride + first, lo, scale, levels, count, codes);
            for (int i = 0; i < count; i += 4)
                put_codes(side, data, 0, token, first + i, 1, codes + i, at_most(count - i, 4));
        }
    }
    return true;
}

// One token's values of one group of channels.
static bool encode_value_group(const Side& side, const float* values, int group, int count, int token,
                               unsigned char* data) {
    Range range;
    start_range(range, CHUNK);
    for (int first = 0; first < count; first += CHUNK)
        widen_range(range, values + first, at_most(count - first, CHUNK));
    if (range.not_finite) return false;
    float lowest = range.lowest[0], highest = range.highest[0];
    for (int i = 1; i < CHUNK; ++i) {
        lowest = range.lowest[i] < lowest ? range.lowest[i] : lowest;
        highest = range.highest[i] > highest ? range.highest[i] : highest;
    }
    uint16_t& lo16 = params(side, data, group, 0)[token];
    uint16_t& scale16 = params(side, data, group, 1)[token];
    if (!make_params(lowest, highest, side.bits, lo16, scale16)) return false;
    float lo[CHUNK], scale[CHUNK];
    for (int i = 0; i < CHUNK; ++i) {
        lo[i] = half_to_float(lo16);
        scale[i] = half_to_float(scale16);
    }
    for (int first = 0; first < count; first += CHUNK) {
        const int part = at_most(count - first, CHUNK);
        unsigned char codes[CHUNK];
        make_codes(values + first, lo, scale, float((1 << side.bits) - 1), part, codes);
        for (int i = 0; i < part; i += TILE_LANES)
            put_codes(side, data, group, first + i, token, 4, codes + i, at_most(part - i, TILE_LANES));
    }
    return true;
}

static bool encode_values(const Side& side, const float* tokens, int64_t stride, unsigned char* data) {
    for (int token = 0; token < side.depth; ++token)
        for (int group = 0; group < side.groups; ++group) {
            const int first = group * side.group_size;
            const int count = at_most(side.size - first, side.group_size);
            if (!encode_value_group(side, tokens + token * stride + first, group, count, token, data)) return false;
        }
    return true;
}

static void copy_dense(const Side& side, int block_tokens, const float* tokens, int64_t stride, unsigned char* data) {
    for (int token = 0; token < block_tokens; ++token)
        std::memcpy(data + int64_t(token) * side.size * int64_t(sizeof(float)), tokens + token * stride,
                    size_t(side.size) * sizeof(float));
}

static uint32_t encode_block(const Layout& layout, uint32_t dense, const DenseTokens& tokens, unsigned char* block) {
    uint32_t must_be_dense = least_dense(layout);
    std::memset(block, 0, size_t(block_bytes(layout, dense)));
    for (int head = 0; head < layout.shape.kv_heads; ++head) {
        unsigned char* key = block + side_offset(layout, dense, head, true);
        unsigned char* value = block + side_offset(layout, dense, head, false);
        const float* key_tokens = tokens.key + head * tokens.key_head_stride;
        const float* value_tokens = tokens.value + head * tokens.value_head_stride;
        if (dense & KEY_DENSE)
            copy_dense(layout.key, layout.shape.block_tokens, key_tokens, tokens.key_token_stride, key);
        else if (!encode_keys(layout.key, key_tokens, tokens.key_token_stride, key))
            must_be_dense |= KEY_DENSE;
        if (dense & VALUE_DENSE)
            copy_dense(layout.value, layout.shape.block_tokens, value_tokens, tokens.value_token_stride, value);
        else if (!encode_values(layout.value, value_tokens, tokens.value_token_stride, value))
            must_be_dense |= VALUE_DENSE;
    }
    return must_be_dense | dense;
}

static void decode_side(const Layout& layout, bool key, bool dense, const unsigned char* data, int64_t begin,
                        int64_t end, float* to, int64_t stride) {
    const Side& side = key ? layout.key : layout.value;
    for (int64_t token = begin; token < end; ++token) {
        float* out = to + (token - begin) * stride;
        if (dense) {
            std::memcpy(out, data + token * side.size * int64_t(sizeof(float)), size_t(side.size) * sizeof(float));
            continue;
        }
        for (int channel = 0; channel < side.size; ++channel) {
            const int group = key ? 0 : channel / side.group_size;
            const int lane = key ? int(token) : channel % side.group_size;
            const int depth = key ? channel : int(token);
            const float lo = half_to_float(params(side, data, group, 0)[depth]);
            const float scale = half_to_float(params(side, data, group, 1)[depth]);
            out[channel] = lo + scale * float(code_at(side, data, group, lane, depth));
        }
    }
}

static void decode_block(const Layout& layout, BlockRef block, int64_t begin, int64_t end, const DenseTokens& to) {
    for (int head = 0; head < layout.shape.kv_heads; ++head) {
        decode_side(layout, true, block.dense & KEY_DENSE, block.data + side_offset(layout, block.dense, head, true),
                    begin, end, const_cast<float*>(to.key) + head * to.key_head_stride, to.key_token_stride);
        decode_side(layout, false, block.dense & VALUE_DENSE,
                    block.data + side_offset(layout, block.dense, head, false), begin, end,
                    const_cast<float*>(to.value) + head * to.value_head_stride, to.value_token_stride);
    }
}

}  // namespace onnx_kivi::KIVI_ISA
