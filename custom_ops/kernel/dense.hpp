// f32 products for tokens that are not quantized: sinks, residual, new tokens, dense blocks.
#pragma once

#include "codes.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace onnx_kivi::KIVI_ISA {

constexpr int DENSE_ROWS = 4;
constexpr int DENSE_VECTORS = REGISTERS == 32 ? 4 : 2;

// out[row][lane] = or += sum over depth of a[row][depth] * b[depth][lane], for VECTORS * W lanes.
template <int ROWS, int VECTORS, bool ADD>
static inline void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                                 float* out, int64_t out_stride) {
    F sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = ADD ? load(out + r * out_stride + v * W) : set1(0);
    for (int64_t k = 0; k < depth; ++k) {
        F lanes[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) lanes[v] = load(b + k * b_stride + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const F factor = set1(a[r * a_stride + k]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(factor, lanes[v], sums[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(out + r * out_stride + v * W, sums[r][v]);
}

template <int VECTORS, bool ADD>
static inline void multiply_lanes(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride,
                                  int64_t depth, float* out, int64_t out_stride) {
    int64_t r = 0;
    for (; r + DENSE_ROWS <= rows; r += DENSE_ROWS)
        multiply_tile<DENSE_ROWS, VECTORS, ADD>(a + r * a_stride, a_stride, b, b_stride, depth, out + r * out_stride,
                                                out_stride);
    for (; r < rows; ++r)
        multiply_tile<1, VECTORS, ADD>(a + r * a_stride, a_stride, b, b_stride, depth, out + r * out_stride, out_stride);
}

// lanes is a multiple of TILE_LANES.
template <bool ADD>
static void multiply_dense(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride,
                           int64_t depth, int64_t lanes, float* out, int64_t out_stride) {
    int64_t lane = 0;
    for (; lane + DENSE_VECTORS * W <= lanes; lane += DENSE_VECTORS * W)
        multiply_lanes<DENSE_VECTORS, ADD>(a, a_stride, rows, b + lane, b_stride, depth, out + lane, out_stride);
    for (; lane < lanes; lane += W)
        multiply_lanes<1, ADD>(a, a_stride, rows, b + lane, b_stride, depth, out + lane, out_stride);
}

// Keys (tokens <= PANEL_TOKENS, size) -> panel (size, PANEL_TOKENS), zero beyond the tokens up to a whole tile.
static void transpose_keys(const float* keys, int64_t stride, int64_t tokens, int64_t size, float* panel) {
    const int64_t full = tokens / TILE_LANES * TILE_LANES;
    if (full < tokens)
        for (int64_t d = 0; d < size; ++d)
            for (int i = 0; i < TILE_LANES; i += W) store(panel + d * PANEL_TOKENS + full + i, set1(0));
    int64_t token = 0;
#if defined(__SSE2__)
    for (; token + 4 <= tokens; token += 4) {
        const float* from = keys + token * stride;
        int64_t d = 0;
        for (; d + 4 <= size; d += 4) {
            __m128 a = _mm_loadu_ps(from + d), b = _mm_loadu_ps(from + stride + d);
            __m128 c = _mm_loadu_ps(from + 2 * stride + d), e = _mm_loadu_ps(from + 3 * stride + d);
            _MM_TRANSPOSE4_PS(a, b, c, e);
            float* to = panel + d * PANEL_TOKENS + token;
            _mm_storeu_ps(to, a);
            _mm_storeu_ps(to + PANEL_TOKENS, b);
            _mm_storeu_ps(to + 2 * PANEL_TOKENS, c);
            _mm_storeu_ps(to + 3 * PANEL_TOKENS, e);
        }
        for (; d < size; ++d)
            for (int i = 0; i < 4; ++i) panel[d * PANEL_TOKENS + token + i] = from[i * stride + d];
    }
#endif
    for (; token < tokens; ++token)
        for (int64_t d = 0; d < size; ++d) panel[d * PANEL_TOKENS + token] = keys[token * stride + d];
}

// Scores of all rows with dense keys: q (rows, size) -> scores (rows, tokens padded to whole tiles).
static void dense_scores(const float* keys, int64_t stride, int64_t tokens, int64_t size, const float* q,
                         int64_t q_stride, int64_t rows, float* scores, int64_t scores_stride, float* panel) {
    for (int64_t first = 0; first < tokens; first += PANEL_TOKENS) {
        const int64_t count = tokens - first < PANEL_TOKENS ? tokens - first : PANEL_TOKENS;
        const int64_t lanes = (count + TILE_LANES - 1) / TILE_LANES * TILE_LANES;
        transpose_keys(keys + first * stride, stride, count, size, panel);
        multiply_dense<false>(q, q_stride, rows, panel, PANEL_TOKENS, size, lanes, scores + first, scores_stride);
    }
}

// sums (rows, groups * lanes_padded) += p (rows, tokens) times dense values.
static void dense_values(const Side& side, const float* values, int64_t stride, int64_t tokens, const float* p,
                         int64_t p_stride, int64_t rows, float* sums, int64_t sums_stride, float* panel) {
    const bool in_lane_order = side.size % TILE_LANES == 0 && (side.groups == 1 || side.group_size % TILE_LANES == 0) &&
                               side.size == side.groups * side.lanes_padded;
    if (in_lane_order) {
        multiply_dense<true>(p, p_stride, rows, values, stride, tokens, side.size, sums, sums_stride);
        return;
    }
    const int64_t lanes = int64_t(side.groups) * side.lanes_padded;
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
        multiply_dense<true>(p + first, p_stride, rows, panel, lanes, count, lanes, sums, sums_stride);
    }
}

}  // namespace onnx_kivi::KIVI_ISA
