// sum over depth of x * (lo + scale * code) for every lane of a group, the affine part folded out of the inner loop:
// x.lo + step * sum of integer weights times codes, where weight = rint(x * scale / step).
#pragma once

#include "scratch.hpp"
#include "simd.hpp"

namespace onnx_kivi::KIVI_ISA {

constexpr int MAX_ROWS = FOLDED_ROWS;   // rows that share one pass over the codes, and
constexpr int PASS_VECTORS = 2;         // vectors of lanes of a pass: their sums stay in registers
constexpr float LEAST_WEIGHT = 1e-30f;  // products all below it count as zero

// Rows as integer weights, [MAX_ROWS / 2][pair_stride] in scratch: rows in pairs, see store_weights.
struct Folded {
    int32_t* weights;
    int64_t pair_stride;
    float* digits;  // [MAX_ROWS][digit_stride], where keys have digits
    int64_t digit_stride;
    float step[MAX_ROWS];
    float base[MAX_ROWS];

    const int32_t* row(int r) const { return weights + r / 2 * pair_stride + r % 2 * 2; }
    float* digit_row(int r) const { return digits + r * digit_stride; }
};

static inline float weight_limit(const Side& side) {
    const float fits = 2147483392.0f / (float((1 << side.bits) - 1) * float(side.depth_padded));
    return fits < MAX_WEIGHT ? fits : MAX_WEIGHT;
}

// The steps of ROWS rows from the largest sizes of their products, and their weights: product(row, depth) has W of
// them.
template <int ROWS, class Product>
static inline void weigh_rows(Folded& folded, const F* peaks, int depth, float limit, const Product& product) {
    float peak[MAX_ROWS], inverse[MAX_ROWS];
    reduce_max(peaks, peak);
    for (int r = 0; r < ROWS; ++r) {
        inverse[r] = peak[r] > LEAST_WEIGHT ? limit / peak[r] : 0;
        folded.step[r] = peak[r] * (1 / limit);
    }
    for (int i = 0; i < depth; i += W) {
#pragma GCC unroll 2
        for (int r = 0; r < ROWS; r += 2) {
            const bool paired = r + 1 < ROWS;
            const F first = product(r, i), second = paired ? product(r + 1, i) : set1(0);
            store_weights(folded.weights + r / 2 * folded.pair_stride + i, first, inverse[r], second,
                          paired ? inverse[r + 1] : 0);
        }
    }
}

template <int ROWS, bool SYMMETRIC>
static inline void fold_rows(Folded& folded, const float* x, int64_t x_stride, const Side& side,
                             const unsigned char* data, int group) {
    const uint16_t *lo = params(side, data, group, 0), *scale = params(side, data, group, 1);
    const F centre = set1(-0.5f * float((1 << side.bits) - 1));
    F bases[MAX_ROWS], peaks[MAX_ROWS];
    for (int r = 0; r < MAX_ROWS; ++r) bases[r] = peaks[r] = set1(0);
    for (int i = 0; i < side.depth_padded; i += W) {
        const F scales = load_half(scale + i), lows = SYMMETRIC ? mul(scales, centre) : load_half(lo + i);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const F value = load(x + r * x_stride + i);
            bases[r] = fma(value, lows, bases[r]);
            peaks[r] = max_size(mul(value, scales), peaks[r]);
        }
    }
    reduce_add(bases, folded.base);
    weigh_rows<ROWS>(folded, peaks, side.depth_padded, weight_limit(side),
                     [=](int r, int i) { return mul(load(x + r * x_stride + i), load_half(scale + i)); });
}

static inline unsigned plane_bits(const unsigned char* plane, int channel) {
    uint16_t bits;
    std::memcpy(&bits, plane + channel / TILE_LANES * 2, sizeof bits);
    return bits >> channel % TILE_LANES & ((1u << W) - 1);
}

static inline int count_bits(unsigned bits) {
    bits -= bits >> 1 & 0x5555;
    bits = (bits & 0x3333) + (bits >> 2 & 0x3333);
    bits = (bits + (bits >> 4)) & 0x0f0f;
    return int((bits + (bits >> 8)) & 0x1f);
}

// Products by digit, [ROWS][digit_stride] in scratch: those of all channels with a digit 4^0, then 4^1, then 4^2.
template <int ROWS>
static inline void spread_digits(const Folded& folded, const float* x, int64_t x_stride, const Side& side,
                                 const unsigned char* data) {
    const uint16_t* scale = params(side, data, 0, 1);
    const unsigned char *low = data + plane_offset(side, 0), *high = data + plane_offset(side, 1);
    int at = 0;
    for (int digit = 0; digit < 3; ++digit) {
        const F factor = set1(float(1 << 2 * digit));
        for (int i = 0; i < side.params_padded; i += W) {
            const unsigned a = plane_bits(low, i), b = plane_bits(high, i);
            const unsigned has = digit == 0 ? a | b : digit == 1 ? b : a & b;
            const F scales = mul(load_half(scale + i), factor);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r)
                compress(folded.digit_row(r) + at, mul(load(x + r * x_stride + i), scales), has);
            at += count_bits(has);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int i = at; i < side.depth_padded; ++i) folded.digit_row(r)[i] = 0;
}

template <int ROWS>
static inline void fold_digits(Folded& folded, const float* x, int64_t x_stride, const Side& side,
                               const unsigned char* data) {
    const uint16_t* lo = params(side, data, 0, 0);
    F bases[MAX_ROWS], peaks[MAX_ROWS];
    for (int r = 0; r < MAX_ROWS; ++r) bases[r] = peaks[r] = set1(0);
    for (int i = 0; i < side.params_padded; i += W)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) bases[r] = fma(load(x + r * x_stride + i), load_half(lo + i), bases[r]);
    reduce_add(bases, folded.base);
    spread_digits<ROWS>(folded, x, x_stride, side, data);
    for (int i = 0; i < side.depth_padded; i += W)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) peaks[r] = max_size(load(folded.digit_row(r) + i), peaks[r]);
    weigh_rows<ROWS>(folded, peaks, side.depth_padded, weight_limit(side),
                     [&folded](int r, int i) { return load(folded.digit_row(r) + i); });
}

// VECTORS * W lanes for ROWS rows, in `lines` lines of codes: out[row][lane] = or += base + step * sum. `=` is for
// scores.
template <int BITS, int ROWS, int VECTORS, bool ADD>
static inline void dot_lanes(const unsigned char* codes, const unsigned char* ahead, int64_t line_stride, int lines,
                             const Folded& folded, float* out, int64_t out_stride) {
    constexpr int VECTOR_BYTES = 4 * W;
    constexpr int LOW_BITS = BITS == 3 ? 2 : BITS;
    constexpr int PARTS = 8 / LOW_BITS;
    const int64_t highest = lines * line_stride;
    Sum sums[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = zero_sum();
    int64_t quad = 0;
    for (int line = 0; line < lines; ++line, codes += line_stride, ahead += line_stride) {
        I bytes[VECTORS], high[VECTORS];
        if constexpr (BITS == 3) {
            const unsigned char* const top = codes + highest - (line + 1) / 2 * line_stride;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) high[v] = shift_right(load_line(top + v * VECTOR_BYTES), line % 2 * 4);
            if (line % 2 == 0) prefetch(ahead + (top - codes));
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) bytes[v] = load_line(codes + v * VECTOR_BYTES);
#pragma GCC unroll 4
        for (int at = 0; at < VECTORS * VECTOR_BYTES; at += LINE_BYTES) prefetch(ahead + at);
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part, quad += 4) {
            Codes prepared[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v)
                if constexpr (BITS == 3)
                    prepared[v] = prepare_joined(bytes[v], part, high[v], part);
                else
                    prepared[v] = prepare<BITS>(bytes[v], part);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) dot(sums[r][v], prepared[v], folded.row(r) + quad);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            float* to = out + r * out_stride + v * W;
            const F lanes = fma(sum_to_float(sums[r][v]), set1(folded.step[r]), set1(folded.base[r]));
            store(to, ADD ? add(load(to), lanes) : finite_or_nan(lanes));
        }
}

// ROWS rows of one group.
template <int BITS, int ROWS, bool ADD>
static void multiply_group(const Side& side, const unsigned char* data, const unsigned char* ahead, int group,
                           const float* x, int64_t x_stride, float* out, int64_t out_stride, Folded& folded) {
    if (BITS == 2 && !ADD && side.digits)
        fold_digits<ROWS>(folded, x, x_stride, side, data);
    else if (BITS != 8 && ADD && side.symmetric)
        fold_rows<ROWS, true>(folded, x, x_stride, side, data, group);
    else
        fold_rows<ROWS, false>(folded, x, x_stride, side, data, group);
    for (int r = 0; r < ROWS; ++r)
        add_code_bias<BITS>(folded.base[r], folded.step[r], folded.row(r), side.depth_padded);
    const int lines = side.depth_padded * (BITS == 3 ? 2 : BITS) / 32;
    const int lanes = group_lanes(side, group);
    for (int lane = 0; lane < lanes; lane += PASS_VECTORS * W) {
        const TileLines tile = tile_lines(side, group, lane / TILE_LANES);
        const int64_t at = tile.first + lane % TILE_LANES * 4;
        if (lane + PASS_VECTORS * W <= lanes)
            dot_lanes<BITS, ROWS, PASS_VECTORS, ADD>(data + at, ahead + at, tile.stride, lines, folded, out + lane,
                                                     out_stride);
        else
            dot_lanes<BITS, ROWS, 1, ADD>(data + at, ahead + at, tile.stride, lines, folded, out + lane, out_stride);
    }
}

template <int BITS, bool ADD>
static void multiply_rows(const Side& side, const unsigned char* data, const unsigned char* ahead, const float* x,
                          int64_t x_stride, int64_t rows, float* out, int64_t out_stride, Folded& folded) {
    for (int group = 0; group < side.groups; ++group, out += side.lanes_padded) {
        const float* from = x;
        float* to = out;
        for (int64_t left = rows; left > 0; left -= MAX_ROWS, from += MAX_ROWS * x_stride, to += MAX_ROWS * out_stride)
            switch (left) {
                case 1:
                    multiply_group<BITS, 1, ADD>(side, data, ahead, group, from, x_stride, to, out_stride, folded);
                    break;
                case 2:
                    multiply_group<BITS, 2, ADD>(side, data, ahead, group, from, x_stride, to, out_stride, folded);
                    break;
                case 3:
                    multiply_group<BITS, 3, ADD>(side, data, ahead, group, from, x_stride, to, out_stride, folded);
                    break;
                default: multiply_group<BITS, 4, ADD>(side, data, ahead, group, from, x_stride, to, out_stride, folded);
            }
    }
}

// All groups and rows of one side: x (rows, params_padded; zero beyond params) -> out (rows, side.lanes).
// `ahead` is the side's data in the block that comes next: it is prefetched while this one is read.
template <bool ADD>
static void multiply_quantized(const Side& side, const unsigned char* data, const unsigned char* ahead, const float* x,
                               int64_t x_stride, int64_t rows, float* out, int64_t out_stride, Folded folded) {
    for (int64_t at = side.code_bytes; at < side.quantized_bytes; at += LINE_BYTES) prefetch(ahead + at);
    switch (side.bits) {
        case 2: return multiply_rows<2, ADD>(side, data, ahead, x, x_stride, rows, out, out_stride, folded);
        case 3:
            if constexpr (ADD) multiply_rows<3, ADD>(side, data, ahead, x, x_stride, rows, out, out_stride, folded);
            return;
        case 4: return multiply_rows<4, ADD>(side, data, ahead, x, x_stride, rows, out, out_stride, folded);
        default: return multiply_rows<8, ADD>(side, data, ahead, x, x_stride, rows, out, out_stride, folded);
    }
}

// scores (rows, side.lanes) times the scales of their tokens.
static void scale_scores(const Side& side, const unsigned char* data, int64_t rows, float* scores, int64_t stride) {
    uint16_t unit;
    std::memcpy(&unit, data + unit_offset(side), sizeof unit);
    for (int i = 0; i < side.lanes; i += W) {
        const F scales = mul(load_bytes(data + token_offset(side) + i), set1(half_to_float(unit)));
        for (int64_t r = 0; r < rows; ++r) {
            float* const at = scores + r * stride + i;
            store(at, finite_or_nan(mul(load(at), scales)));
        }
    }
}

}  // namespace onnx_kivi::KIVI_ISA
