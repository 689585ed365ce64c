// sum over depth of x * (lo + scale * code) for every lane of a group, the affine part folded out of the inner loop:
// x.lo + step * sum of integer weights times codes, where weight = rint(x * scale / step).
#pragma once

#include "codes.hpp"
#include "simd.hpp"

namespace onnx_kivi::KIVI_ISA {

constexpr int MAX_ROWS = 4;                                // rows that share one pass over the codes
constexpr int LINE_VECTORS = TILE_LANES / W;               // vectors of one line of codes
constexpr float LEAST_WEIGHT = 1e-30f;                     // products all below it count as zero
constexpr int QUANT_TILES = REGISTERS == 32 && W == 16 ? 2 : 1;  // tiles whose sums fit in the registers

// Rows as integer weights. Scratch of `weights` is [MAX_ROWS][depth_padded / 2], of `products` [depth_padded].
struct Folded {
    int32_t* weights;
    float* products;
    int64_t stride;
    float step[MAX_ROWS];
    float base[MAX_ROWS];
};

static inline float weight_limit(const Side& side) {
    const float fits = 2147483392.0f / (float((1 << side.bits) - 1) * float(side.depth_padded));
    return fits < MAX_WEIGHT ? fits : MAX_WEIGHT;
}

static inline void fold_row(Folded& folded, int row, const float* x, const uint16_t* lo, const uint16_t* scale,
                            int depth, float limit) {
    F base = set1(0), largest = set1(0);
    for (int i = 0; i < depth; i += W) {
        const F value = load(x + i);
        const F product = mul(value, load_half(scale + i));
        base = fma(value, load_half(lo + i), base);
        largest = max(abs(product), largest);
        store(folded.products + i, product);
    }
    const float peak = reduce_max(largest);
    const float inverse = peak > LEAST_WEIGHT ? limit / peak : 0;
    folded.step[row] = peak / limit;
    folded.base[row] = reduce_add(base);
    int32_t* weights = folded.weights + row * folded.stride;
    for (int i = 0; i < depth; i += W)
        store_weights(weights + i / 2, to_int(mul(load(folded.products + i), set1(inverse))));
}

// Lanes of TILES tiles for ROWS rows: out[row][lane] = or += base + step * sum.
template <int BITS, int ROWS, int TILES, bool ADD>
static inline void dot_tiles(const Side& side, const unsigned char* codes, const unsigned char* ahead,
                             const Folded& folded, float* out, int64_t out_stride) {
    constexpr int VECTORS = TILES * LINE_VECTORS;
    constexpr int PARTS = 8 / BITS;
    const int64_t size = tile_bytes(side);
    Sum sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = zero_sum();
    const int32_t* weights = folded.weights;
    for (int64_t at = 0; at < size; at += LINE_BYTES) {
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t) __builtin_prefetch(ahead + t * size + at);
        I bytes[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
            bytes[v] = load_codes(codes + v / LINE_VECTORS * size + at + v % LINE_VECTORS * (4 * W));
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part, weights += 2) {
            Codes prepared[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v)
                prepared[v] = prepare(BITS == 8 ? bytes[v] : low_codes<BITS>(bytes[v], part * BITS));
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) dot(sums[r][v], prepared[v], weights + r * folded.stride);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            float* to = out + r * out_stride + v * W;
            const F lanes = fma(sum_to_float(sums[r][v]), set1(folded.step[r]), set1(folded.base[r]));
            store(to, ADD ? add(load(to), lanes) : lanes);
        }
}

template <int BITS, int ROWS, bool ADD>
static void dot_group(const Side& side, const unsigned char* codes, const unsigned char* ahead, const Folded& folded,
                      float* out, int64_t out_stride) {
    const int64_t size = tile_bytes(side);
    const int tiles = side.lanes_padded / TILE_LANES;
    int tile = 0;
    for (; tile + QUANT_TILES <= tiles; tile += QUANT_TILES)
        dot_tiles<BITS, ROWS, QUANT_TILES, ADD>(side, codes + tile * size, ahead + tile * size, folded,
                                                out + tile * TILE_LANES, out_stride);
    for (; tile < tiles; ++tile)
        dot_tiles<BITS, ROWS, 1, ADD>(side, codes + tile * size, ahead + tile * size, folded, out + tile * TILE_LANES,
                                      out_stride);
}

template <int BITS, bool ADD>
static void dot_rows(const Side& side, const unsigned char* codes, const unsigned char* ahead, const Folded& folded,
                     int rows, float* out, int64_t out_stride) {
    switch (rows) {
        case 1: return dot_group<BITS, 1, ADD>(side, codes, ahead, folded, out, out_stride);
        case 2: return dot_group<BITS, 2, ADD>(side, codes, ahead, folded, out, out_stride);
        case 3: return dot_group<BITS, 3, ADD>(side, codes, ahead, folded, out, out_stride);
        default: return dot_group<BITS, 4, ADD>(side, codes, ahead, folded, out, out_stride);
    }
}

// All groups and rows of one side: x (rows, depth_padded; zero beyond depth) -> out (rows, groups * lanes_padded).
// `ahead` is the side's data in the block that comes next: it is prefetched while this one is read.
template <bool ADD>
static void multiply_quantized(const Side& side, const unsigned char* data, const unsigned char* ahead, const float* x,
                               int64_t x_stride, int rows, float* out, int64_t out_stride, Folded folded) {
    const float limit = weight_limit(side);
    for (int group = 0; group < side.groups; ++group) {
        const int64_t at = group * group_code_bytes(side);
        for (int first = 0; first < rows; first += MAX_ROWS) {
            const int count = rows - first < MAX_ROWS ? rows - first : MAX_ROWS;
            for (int r = 0; r < count; ++r)
                fold_row(folded, r, x + (first + r) * x_stride, params(side, data, group, 0),
                         params(side, data, group, 1), side.depth_padded, limit);
            float* to = out + first * out_stride + group * side.lanes_padded;
            switch (side.bits) {
                case 2: dot_rows<2, ADD>(side, data + at, ahead + at, folded, count, to, out_stride); break;
                case 4: dot_rows<4, ADD>(side, data + at, ahead + at, folded, count, to, out_stride); break;
                default: dot_rows<8, ADD>(side, data + at, ahead + at, folded, count, to, out_stride);
            }
        }
    }
}

}  // namespace onnx_kivi::KIVI_ISA
