// How a task's scratch and the shared workspace are cut up; the plan sizes them, the tasks use them.
// Internal linkage only: this header is compiled into every per-ISA object.
#pragma once

#include "codes.hpp"

namespace onnx_kivi {

constexpr int64_t PANEL_TOKENS = 64;  // dense tokens worked on at a time
constexpr int64_t SUM_LANES = 16;     // lanes of a row's running sum of exponentials

static inline int64_t whole_tiles(int64_t size) { return (size + TILE_LANES - 1) / TILE_LANES * TILE_LANES; }

// Offsets in floats, each on a line; `rows` query rows share the task's kv head.
struct Scratch {
    int64_t query;    // (rows, query_stride)
    int64_t scores;   // (rows, scores_stride)
    int64_t sums;     // (rows, lanes): value sums
    int64_t total;    // (rows, SUM_LANES): sum of exponentials
    int64_t peak;     // (rows): largest score so far
    int64_t panel;    // keys (k_size, PANEL_TOKENS) or values (PANEL_TOKENS, lanes)
    int64_t weights;  // int32
    int64_t floats;
    int64_t query_stride;
    int64_t scores_stride;
    int64_t lanes;
};

static inline Scratch make_scratch(const Layout& layout, int64_t rows) {
    Scratch s{};
    const int64_t block = whole_tiles(layout.shape.block_tokens);
    const int64_t depth = layout.key.depth_padded > block ? layout.key.depth_padded : block;
    const int64_t lanes = layout.value.lanes;
    s.query_stride = layout.key.depth_padded;
    s.scores_stride = block > PANEL_TOKENS ? block : PANEL_TOKENS;
    s.lanes = lanes;
    s.scores = rows * s.query_stride;
    s.sums = s.scores + rows * s.scores_stride;
    s.total = s.sums + rows * lanes;
    s.peak = s.total + rows * SUM_LANES;
    s.panel = s.peak + whole_tiles(rows);
    s.weights = s.panel + PANEL_TOKENS * whole_tiles(lanes > layout.shape.k_size ? lanes : layout.shape.k_size);
    s.floats = s.weights + 2 * depth;
    return s;
}

// A row's share of the workspace where tokens are split: peak, total, value sums.
static inline int64_t partial_floats(const Layout& layout) { return whole_tiles(2) + layout.value.lanes; }

}  // namespace onnx_kivi
