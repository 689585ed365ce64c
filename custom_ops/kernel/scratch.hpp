// How a task's scratch and the shared workspace are cut up; the plan sizes them, the tasks use them.
// Internal linkage only: this header is compiled into every per-ISA object.
#pragma once

#include "codes.hpp"

namespace onnx_kivi {

constexpr int64_t PANEL_TOKENS = 64;  // dense tokens worked on at a time
constexpr int64_t SUM_LANES = 16;     // lanes of a row's running sum of exponentials
constexpr int64_t FOLDED_ROWS = 4;    // query rows that share one pass over codes

static inline int64_t whole_tiles(int64_t size) { return (size + TILE_LANES - 1) / TILE_LANES * TILE_LANES; }

// Offsets in floats, each on a line; `rows` query rows share the task's kv head.
struct Scratch {
    int64_t query;    // (rows, query_stride)
    int64_t turned;   // (rows, query_stride): queries rotated, where keys are
    int64_t scores;   // (rows, scores_stride)
    int64_t sums;     // (rows, lanes): value sums, behind them those of rotated values, where values are
    int64_t total;    // (rows, SUM_LANES): sum of exponentials
    int64_t peak;     // (rows): largest score so far
    int64_t panel;    // keys (k_size, PANEL_TOKENS) or values (PANEL_TOKENS, lanes)
    int64_t digits;   // (FOLDED_ROWS, digit_stride): queries by digit, where keys have digits
    int64_t weights;  // int32
    int64_t floats;
    int64_t query_stride;
    int64_t scores_stride;
    int64_t digit_stride;
    int64_t lanes;
};

// Lanes of a row's value sums.
static inline int64_t sum_lanes(const Layout& layout) {
    return int64_t(layout.value.lanes) * (layout.value.rotated ? 2 : 1);
}

static inline Scratch make_scratch(const Layout& layout, int64_t rows) {
    Scratch s{};
    const int64_t block = whole_tiles(layout.shape.block_tokens);
    const int64_t depth = layout.key.depth_padded > block ? layout.key.depth_padded : block;
    const int64_t lanes = sum_lanes(layout);
    s.query_stride = layout.key.params_padded;
    s.digit_stride = layout.key.digits ? layout.key.depth_padded + TILE_LANES : 0;
    s.scores_stride = block > PANEL_TOKENS ? block : PANEL_TOKENS;
    s.lanes = lanes;
    s.turned = rows * s.query_stride;
    s.scores = s.turned + (layout.key.rotated ? s.turned : 0);
    s.sums = s.scores + rows * s.scores_stride;
    s.total = s.sums + rows * lanes;
    s.peak = s.total + rows * SUM_LANES;
    s.panel = s.peak + whole_tiles(rows);
    s.digits = s.panel + PANEL_TOKENS * whole_tiles(lanes > layout.shape.k_size ? lanes : layout.shape.k_size);
    s.weights = s.digits + FOLDED_ROWS * s.digit_stride;
    s.floats = s.weights + 2 * depth;
    return s;
}

// A row's share of the workspace where tokens are split: peak, total, value sums.
static inline int64_t partial_floats(const Layout& layout) { return whole_tiles(2) + sum_lanes(layout); }

// Whether other numbers than the keys given are coded, or in another way than a channel at a time.
static inline bool transforms_keys(const Layout& layout) {
    return layout.key.digits || layout.key.tokens || layout.key.rotated;
}

// What sealing needs, in floats. The first are keys as coded, (block_tokens, k_size), or one token's values.
struct EncodeScratch {
    int64_t channels;  // keys in digits (k_size, token_stride)
    int64_t one;       // numbers of one channel, token or group
    int64_t gains;     // (3, k_size), then as many int32, and a byte for each channel
    int64_t floats;
    int64_t token_stride;
};

static inline EncodeScratch make_encode_scratch(const Layout& layout) {
    EncodeScratch s{};
    const int64_t k_size = layout.shape.k_size, v_size = whole_tiles(layout.shape.v_size);
    s.token_stride = whole_tiles(layout.shape.block_tokens);
    const int64_t keys = transforms_keys(layout) ? s.token_stride * k_size : 0;
    s.channels = whole_tiles(keys > v_size ? keys : v_size);
    s.one = s.channels + (layout.key.digits ? keys : 0);
    s.gains = s.one + (s.token_stride > v_size ? s.token_stride : v_size);
    s.floats = s.gains + (layout.key.digits ? whole_tiles(7 * k_size) : 0);
    return s;
}

}  // namespace onnx_kivi
