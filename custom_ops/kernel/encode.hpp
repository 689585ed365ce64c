// Sealing: a block of f32 tokens to codes, and back. Plain loops, so that every level computes the same bits.
#pragma once

#include "rotate.hpp"
#include "scratch.hpp"

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

// Codes around zero of one token and group of rotated values.
static inline void centred_codes(const float* values, float scale, int bits, int count, float* codes) {
    const float inverse = scale > 0 ? 1 / scale : 0;
    const float most = float((1 << bits) - 1), centre = most / 2;
    for (int i = 0; i < count; ++i) {
        float code = values[i] * inverse + centre;
        code = code < 0 ? 0 : code;
        code = code > most ? most : code;
        codes[i] = (code + ROUND_TO_INTEGER) - ROUND_TO_INTEGER;
    }
}

constexpr int STARTS = 6;
constexpr float SCALE_STARTS[3][STARTS] = {
    {float(0.8 * 0.996), float(0.9 * 0.996), float(1.0 * 0.996), float(1.1 * 0.996), float(1.2 * 0.996),
     float(1.35 * 0.996)},
    {float(0.8 * 0.586), float(0.9 * 0.586), float(1.0 * 0.586), float(1.1 * 0.586), float(1.2 * 0.586),
     float(1.35 * 0.586)},
    {float(0.8 * 0.335), float(0.9 * 0.335), float(1.0 * 0.335), float(1.1 * 0.335), float(1.2 * 0.335),
     float(1.35 * 0.335)},
};

// Of some scales the one whose codes, scaled anew by least squares, come closest. Not finite if the values are not.
static inline float fitted_scale(const float* values, int bits, int count, float* codes) {
    const float rms = __builtin_sqrtf(sum_of_squares(values, count) / float(count));
    if (!is_finite(rms)) return rms;
    const float most = float((1 << bits) - 1);
    float best = -1, scale = 0;
    for (int start = 0; start < STARTS; ++start) {
        centred_codes(values, rms * SCALE_STARTS[bits - 2][start], bits, count, codes);
        for (int i = 0; i < count; ++i) codes[i] = 2 * codes[i] - most;
        const float along = lane_sum(count, [=](int i) { return values[i] * codes[i]; });
        const float square = sum_of_squares(codes, count);
        const float gain = along * along / square;
        if (!(gain > best)) continue;
        best = gain;
        scale = 2 * (along > 0 ? along : 0) / square;
    }
    return scale;
}

static bool encode_symmetric_group(const Side& side, const float* values, int group, int count, int token, float* room,
                                   unsigned char* data) {
    const float scale = fitted_scale(values, side.bits, count, room);
    if (!is_finite(scale)) return false;
    uint16_t& scale16 = params(side, data, group, 1)[token];
    scale16 = half_nearest(scale);
    if (scale16 == 0x7c00) return false;
    centred_codes(values, half_to_float(scale16), side.bits, count, room);
    for (int first = 0; first < count; first += TILE_LANES) {
        unsigned char codes[TILE_LANES], high[TILE_LANES];
        const int part = at_most(count - first, TILE_LANES);
        for (int i = 0; i < part; ++i) {
            codes[i] = (unsigned char)(int)room[first + i];
            high[i] = codes[i] >> 2;
            if (side.bits == 3) codes[i] &= 3;
        }
        put_codes(side, data, group, first, token, 4, codes, part);
        if (side.bits != 3) continue;
        const CodePlace place = high_place(side, group, first, token);
        for (int i = 0; i < part; ++i) data[place.byte + 4 * i] |= (unsigned char)(high[i] << place.shift);
    }
    return true;
}

static bool encode_symmetric(const Side& side, const float* tokens, int64_t stride, float* row, float* room,
                             unsigned char* data) {
    for (int token = 0; token < side.depth; ++token) {
        std::memcpy(row, tokens + token * stride, size_t(side.size) * sizeof(float));
        rotate(row, side.size);
        for (int group = 0; group < side.groups; ++group) {
            const int first = group * side.group_size;
            const int count = at_most(side.size - first, side.group_size);
            if (!encode_symmetric_group(side, row + first, group, count, token, room, data)) return false;
        }
    }
    return true;
}

// Divides each of the keys (tokens, size) by the scale of its token. False if float16 can't hold their unit.
static bool divide_by_tokens(const Side& side, float* keys, float* sizes, unsigned char* data) {
    float largest = 0;
    for (int token = 0; token < side.group_size; ++token) {
        sizes[token] = __builtin_sqrtf(sum_of_squares(keys + int64_t(token) * side.size, side.size) / float(side.size));
        if (!is_finite(sizes[token])) return false;
        largest = sizes[token] > largest ? sizes[token] : largest;
    }
    uint16_t unit = half_of_magnitude(largest / 255, true);
    if (unit == 0x7c00) return false;
    if (unit < 0x0400) unit = 0x0400;
    std::memcpy(data + unit_offset(side), &unit, sizeof unit);
    for (int token = 0; token < side.group_size; ++token) {
        float count = sizes[token] / half_to_float(unit);
        count = count < 1 ? 1 : count;
        count = count > 255 ? 255 : count;
        count = (count + ROUND_TO_INTEGER) - ROUND_TO_INTEGER;
        data[token_offset(side) + token] = (unsigned char)(int)count;
        const float scale = count * half_to_float(unit);
        for (int i = 0; i < side.size; ++i) keys[int64_t(token) * side.size + i] /= scale;
    }
    return true;
}

// One channel of keys over the tokens of a block.
struct Channel {
    const float* keys;
    int tokens;
    float lowest;
    float highest;
};

static inline bool start_channel(Channel& channel) {
    uint32_t not_finite = 0;
    channel.lowest = __builtin_inff();
    channel.highest = -__builtin_inff();
    for (int i = 0; i < channel.tokens; ++i) {
        const float key = channel.keys[i];
        uint32_t bits;
        std::memcpy(&bits, &key, sizeof bits);
        not_finite |= (bits & 0x7f800000) == 0x7f800000;
        channel.lowest = key < channel.lowest ? key : channel.lowest;
        channel.highest = key > channel.highest ? key : channel.highest;
    }
    return !not_finite;
}

// Its parameters with so many digits; false if float16 can't hold them.
static inline bool digit_params(const Channel& channel, int digits, uint16_t& lo, uint16_t& scale) {
    if (digits > 0) return make_params(channel.lowest, channel.highest, 2 * digits, lo, scale);
    const float* keys = channel.keys;
    lo = half_nearest(lane_sum(channel.tokens, [keys](int i) { return keys[i]; }) / float(channel.tokens));
    scale = 0;
    return true;
}

static inline float code_of(float key, float lo, float scale, float levels) {
    float code = (key - lo) / scale;
    code = code < 0 ? 0 : code;
    code = code > levels ? levels : code;
    return (code + ROUND_TO_INTEGER) - ROUND_TO_INTEGER;
}

// Squared error of a channel with so many digits; false if float16 can't hold its parameters.
static inline bool digit_error(const Channel& channel, int digits, float& error) {
    uint16_t lo16, scale16;
    if (!digit_params(channel, digits, lo16, scale16)) return false;
    const float lo = half_to_float(lo16), scale = half_to_float(scale16), levels = float((1 << 2 * digits) - 1);
    const float* keys = channel.keys;
    error = digits == 0 ? lane_sum(channel.tokens,
                                   [=](int i) {
                                       const float off = keys[i] - lo;
                                       return off * off;
                                   })
                        : lane_sum(channel.tokens, [=](int i) {
                              const float off = keys[i] - (lo + scale * code_of(keys[i], lo, scale, levels));
                              return off * off;
                          });
    return true;
}

constexpr int MOST_DIGITS = 3;

// gains[digits * size + channel]: by how much a further digit lowers the error, at most the gain of the one before.
static bool digit_gains(const Side& side, const float* keys, int64_t stride, float* gains) {
    for (int c = 0; c < side.size; ++c) {
        Channel channel{keys + c * stride, side.group_size, 0, 0};
        float before, after;
        if (!start_channel(channel) || !digit_error(channel, 0, before)) return false;
        for (int digits = 1; digits <= MOST_DIGITS; ++digits, before = after) {
            if (!digit_error(channel, digits, after)) return false;
            float gain = before - after;
            if (digits > 1) {
                const float last = gains[(digits - 2) * side.size + c];
                gain = gain < last ? gain : last;
            }
            gains[(digits - 1) * side.size + c] = gain;
        }
    }
    return true;
}

// The digits of one channel; next[e] is the depth of the next digit 4^e.
static void put_channel(const Side& side, const Channel& channel, int c, int digits, int* next, unsigned char* codes,
                        unsigned char* data) {
    uint16_t& lo16 = params(side, data, 0, 0)[c];
    uint16_t& scale16 = params(side, data, 0, 1)[c];
    digit_params(channel, digits, lo16, scale16);
    put_digits(side, data, c, digits);
    if (digits == 0) return;
    const float lo = half_to_float(lo16), scale = half_to_float(scale16), levels = float((1 << 2 * digits) - 1);
    for (int i = 0; i < channel.tokens; ++i) codes[i] = (unsigned char)(int)code_of(channel.keys[i], lo, scale, levels);
    for (int e = 0; e < digits; ++next[e], ++e)
        for (int first = 0; first < channel.tokens; first += TILE_LANES) {
            unsigned char line[TILE_LANES];
            const int part = at_most(channel.tokens - first, TILE_LANES);
            for (int i = 0; i < part; ++i) line[i] = codes[first + i] >> 2 * e & 3;
            put_codes(side, data, 0, first, next[e], 4, line, part);
        }
}

// One head's keys, channel by channel, in the digits that lower the squared error most.
static bool encode_digits(const Side& side, const float* keys, int64_t stride, float* gains, unsigned char* codes,
                          unsigned char* data) {
    if (!digit_gains(side, keys, stride, gains)) return false;
    int32_t* const order = reinterpret_cast<int32_t*>(gains + MOST_DIGITS * side.size);
    unsigned char* const digits = reinterpret_cast<unsigned char*>(order + MOST_DIGITS * side.size);
    choose_digits(gains, side.size, side.depth, order, digits);
    int next[MOST_DIGITS] = {0, 0, 0};
    for (int c = 0; c < side.size; ++c) {
        next[1] += digits[c] > 0;
        next[2] += (digits[c] > 0) + (digits[c] > 1);
    }
    for (int c = 0; c < side.size; ++c) {
        Channel channel{keys + c * stride, side.group_size, 0, 0};
        start_channel(channel);
        put_channel(side, channel, c, digits[c], next, codes, data);
    }
    return true;
}

static void transpose(const float* from, int rows, int columns, float* to, int64_t to_stride) {
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) to[c * to_stride + r] = from[int64_t(r) * columns + c];
}

// One head's keys of a scheme that codes other numbers than those given.
static bool encode_transformed(const Layout& layout, const float* tokens, int64_t stride, float* scratch,
                               unsigned char* data) {
    const Side& side = layout.key;
    const EncodeScratch s = make_encode_scratch(layout);
    float* const keys = scratch;
    for (int token = 0; token < side.group_size; ++token) {
        float* const key = keys + int64_t(token) * side.size;
        std::memcpy(key, tokens + token * stride, size_t(side.size) * sizeof(float));
        if (side.rotated) rotate(key, side.size);
    }
    if (side.tokens && !divide_by_tokens(side, keys, scratch + s.one, data)) return false;
    if (!side.digits) return encode_keys(side, keys, side.size, data);
    transpose(keys, side.group_size, side.size, scratch + s.channels, s.token_stride);
    return encode_digits(side, scratch + s.channels, s.token_stride, scratch + s.gains,
                         reinterpret_cast<unsigned char*>(scratch + s.one), data);
}

static bool encode_side(const Layout& layout, bool key, const float* tokens, int64_t stride, float* scratch,
                        unsigned char* data) {
    if (!key && layout.value.symmetric)
        return encode_symmetric(layout.value, tokens, stride, scratch, scratch + make_encode_scratch(layout).one, data);
    if (!key) return encode_values(layout.value, tokens, stride, data);
    if (!transforms_keys(layout)) return encode_keys(layout.key, tokens, stride, data);
    return encode_transformed(layout, tokens, stride, scratch, data);
}

static void copy_dense(const Side& side, int block_tokens, const float* tokens, int64_t stride, unsigned char* data) {
    for (int token = 0; token < block_tokens; ++token)
        std::memcpy(data + int64_t(token) * side.size * int64_t(sizeof(float)), tokens + token * stride,
                    size_t(side.size) * sizeof(float));
}

static uint32_t encode_block(const Layout& layout, uint32_t dense, const DenseTokens& tokens, unsigned char* block,
                             void* scratch) {
    float* const room = static_cast<float*>(scratch);
    uint32_t must_be_dense = least_dense(layout);
    std::memset(block, 0, size_t(block_bytes(layout, dense)));
    for (int head = 0; head < layout.shape.kv_heads; ++head) {
        unsigned char* key = block + side_offset(layout, dense, head, true);
        unsigned char* value = block + side_offset(layout, dense, head, false);
        const float* key_tokens = tokens.key + head * tokens.key_head_stride;
        const float* value_tokens = tokens.value + head * tokens.value_head_stride;
        if (dense & KEY_DENSE)
            copy_dense(layout.key, layout.shape.block_tokens, key_tokens, tokens.key_token_stride, key);
        else if (!encode_side(layout, true, key_tokens, tokens.key_token_stride, room, key))
            must_be_dense |= KEY_DENSE;
        if (dense & VALUE_DENSE)
            copy_dense(layout.value, layout.shape.block_tokens, value_tokens, tokens.value_token_stride, value);
        else if (!encode_side(layout, false, value_tokens, tokens.value_token_stride, room, value))
            must_be_dense |= VALUE_DENSE;
    }
    return must_be_dense | dense;
}

static inline float code_in_digits(const Side& side, const unsigned char* data, int lane, int digits, int* next) {
    int code = 0;
    for (int e = 0; e < digits; ++e) code |= code_at(side, data, 0, lane, next[e]++) << 2 * e;
    return float(code);
}

// The depths at which the digits 4^e begin.
static inline void first_digits(const Side& side, const unsigned char* data, int next[MOST_DIGITS]) {
    next[0] = next[1] = next[2] = 0;
    for (int c = 0; c < side.size; ++c) {
        const int digits = digits_of(side, data, c);
        next[1] += digits > 0;
        next[2] += (digits > 0) + (digits > 1);
    }
}

static inline void decode_key(const Side& side, const unsigned char* data, int token, float* out) {
    int next[MOST_DIGITS];
    if (side.digits) first_digits(side, data, next);
    uint16_t unit = 0;
    if (side.tokens) std::memcpy(&unit, data + unit_offset(side), sizeof unit);
    for (int c = 0; c < side.size; ++c) {
        const float lo = half_to_float(params(side, data, 0, 0)[c]), scale = half_to_float(params(side, data, 0, 1)[c]);
        const float code = side.digits ? code_in_digits(side, data, token, digits_of(side, data, c), next)
                                       : float(code_at(side, data, 0, token, c));
        out[c] = lo + scale * code;
        if (side.tokens) out[c] *= float(data[token_offset(side) + token]) * half_to_float(unit);
    }
}

static inline void decode_value(const Side& side, const unsigned char* data, int token, float* out) {
    const float centre = float((1 << side.bits) - 1) / 2;
    for (int c = 0; c < side.size; ++c) {
        const int group = c / side.group_size;
        const float scale = half_to_float(params(side, data, group, 1)[token]);
        const float lo = side.symmetric ? scale * -centre : half_to_float(params(side, data, group, 0)[token]);
        out[c] = lo + scale * float(code_at(side, data, group, c % side.group_size, token));
    }
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
        key ? decode_key(side, data, int(token), out) : decode_value(side, data, int(token), out);
        if (side.rotated) rotate(out, side.size);
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
