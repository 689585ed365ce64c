// f32 products for tokens that are not quantized: sinks, residual, new tokens, dense blocks.
#pragma once

#include "codes.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace onnx_kivi::KIVI_ISA {

constexpr int DENSE_ROWS = 4;                           // rows and
constexpr int DENSE_VECTORS = REGISTERS == 32 ? 4 : 2;  // vectors of lanes whose sums stay in registers

// Lanes by depth: row k of 16 lanes at `data + k * row_stride`, the next 16 lanes `tile_stride` on.
struct Lanes {
    const float* data;
    int64_t row_stride;
    int64_t tile_stride;

    const float* vector(int v) const { return data + v * W / TILE_LANES * tile_stride + v * W % TILE_LANES; }
    Lanes from(int64_t lane) const {
        return {data + lane / TILE_LANES * tile_stride + lane % TILE_LANES, row_stride, tile_stride};
    }
};

// out[row][lane] = or += sum over depth of a[row][depth] * b[depth][lane], for VECTORS * W lanes. `=` is for scores.
template <int ROWS, int VECTORS, bool ADD>
static inline void multiply_tile(const float* a, int64_t a_stride, Lanes b, int64_t depth, float* out,
                                 int64_t out_stride) {
    F sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = ADD ? load(out + r * out_stride + v * W) : set1(0);
    for (int64_t k = 0; k < depth; ++k, b.data += b.row_stride) {
        F lanes[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) lanes[v] = load(b.vector(v));
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const F factor = set1(a[r * a_stride + k]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(factor, lanes[v], sums[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
            store(out + r * out_stride + v * W, ADD ? sums[r][v] : finite_or_nan(sums[r][v]));
}

// As many rows at a time as ROWS, then half as many, and so on.
template <int ROWS, int VECTORS, bool ADD>
static inline void multiply_lanes(const float* a, int64_t a_stride, int64_t rows, Lanes b, int64_t depth, float* out,
                                  int64_t out_stride) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_stride, out += ROWS * out_stride)
        multiply_tile<ROWS, VECTORS, ADD>(a, a_stride, b, depth, out, out_stride);
    if constexpr (ROWS > 1) multiply_lanes<ROWS / 2, VECTORS, ADD>(a, a_stride, rows, b, depth, out, out_stride);
}

// lanes is a multiple of TILE_LANES.
template <bool ADD>
static void multiply_dense(const float* a, int64_t a_stride, int64_t rows, Lanes b, int64_t depth, int64_t lanes,
                           float* out, int64_t out_stride) {
    int64_t lane = 0;
    for (; lane + DENSE_VECTORS * W <= lanes; lane += DENSE_VECTORS * W)
        multiply_lanes<DENSE_ROWS, DENSE_VECTORS, ADD>(a, a_stride, rows, b.from(lane), depth, out + lane, out_stride);
    for (; lane < lanes; lane += W)
        multiply_lanes<DENSE_ROWS, 1, ADD>(a, a_stride, rows, b.from(lane), depth, out + lane, out_stride);
}

// Keys (up to 16 tokens, size) -> tile (size, 16), zero for tokens that are not there.
static inline void transpose_tile(const float* keys, int64_t stride, int64_t tokens, int64_t size, float* tile) {
    if (tokens < TILE_LANES) std::memset(tile, 0, size_t(size) * TILE_LANES * sizeof(float));
    int64_t token = 0;
#if defined(__SSE2__)
    for (; token + 4 <= tokens; token += 4) {
        const float* from = keys + token * stride;
        int64_t d = 0;
        for (; d + 4 <= size; d += 4) {
            __m128 row0 = _mm_loadu_ps(from + d), row1 = _mm_loadu_ps(from + stride + d);
            __m128 row2 = _mm_loadu_ps(from + 2 * stride + d), row3 = _mm_loadu_ps(from + 3 * stride + d);
            _MM_TRANSPOSE4_PS(row0, row1, row2, row3);
            float* to = tile + d * TILE_LANES + token;
            _mm_storeu_ps(to, row0);
            _mm_storeu_ps(to + TILE_LANES, row1);
            _mm_storeu_ps(to + 2 * TILE_LANES, row2);
            _mm_storeu_ps(to + 3 * TILE_LANES, row3);
        }
        for (; d < size; ++d)
            for (int i = 0; i < 4; ++i) tile[d * TILE_LANES + token + i] = from[i * stride + d];
    }
#endif
    for (; token < tokens; ++token)
        for (int64_t d = 0; d < size; ++d) tile[d * TILE_LANES + token] = keys[token * stride + d];
}

// Scores of all rows with dense keys: q (rows, size) -> scores (rows, tokens padded to whole tiles).
static void dense_scores(const float* keys, int64_t stride, int64_t tokens, int64_t size, const float* q,
                         int64_t q_stride, int64_t rows, float* scores, int64_t scores_stride, float* panel) {
    for (int64_t first = 0; first < tokens; first += PANEL_TOKENS) {
        const int64_t count = tokens - first < PANEL_TOKENS ? tokens - first : PANEL_TOKENS;
        const int64_t lanes = (count + TILE_LANES - 1) / TILE_LANES * TILE_LANES;
        for (int64_t lane = 0; lane < lanes; lane += TILE_LANES)
            transpose_tile(keys + (first + lane) * stride, stride,
                           count - lane < TILE_LANES ? count - lane : TILE_LANES, size, panel + lane * size);
        multiply_dense<false>(q, q_stride, rows, {panel, TILE_LANES, TILE_LANES * size}, size, lanes, scores + first,
                              scores_stride);
    }
}

static inline bool are_finite(const float* x, int64_t count) {
    uint32_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        found |= (bits & 0x7f800000) == 0x7f800000;
    }
    return !found;
}

// sums (rows, side.lanes) += p (rows, tokens) times dense values.
static void dense_values(const Side& side, const float* values, int64_t stride, int64_t tokens, const float* p,
                         int64_t p_stride, int64_t rows, float* sums, int64_t sums_stride, float* panel) {
    const bool in_lane_order = side.size == side.lanes && (side.groups == 1 || side.group_size == side.lanes_padded);
    if (in_lane_order) {
        multiply_dense<true>(p, p_stride, rows, {values, stride, TILE_LANES}, tokens, side.size, sums, sums_stride);
        return;
    }
    const int64_t lanes = side.lanes;
    for (int64_t first = 0; first < tokens; first += PANEL_TOKENS) {
        const int64_t count = tokens - first < PANEL_TOKENS ? tokens - first : PANEL_TOKENS;
        std::memset(panel, 0, size_t(count * lanes) * sizeof(float));
        for (int64_t token = 0; token < count; ++token)
            for (int group = 0; group < side.groups; ++group) {
                const int begin = group * side.group_size;
                const int size = side.size - begin < side.group_size ? side.size - begin : side.group_size;
                std::memcpy(panel + token * lanes + int64_t(group) * side.lanes_padded,
                            values + (first + token) * stride + begin, size_t(size) * sizeof(float));
            }
        multiply_dense<true>(p + first, p_stride, rows, {panel, lanes, TILE_LANES}, count, lanes, sums, sums_stride);
    }
}

}  // namespace onnx_kivi::KIVI_ISA
