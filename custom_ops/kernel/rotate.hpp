// Rotations and sums whose order of operations is that of onnx_kivi/runtime/numpy_backend/sums.py, because codes depend
// on them. Plain loops, so that every level computes the same bits.
#pragma once

#include "codes.hpp"

namespace onnx_kivi::KIVI_ISA {

constexpr int SUM_WIDTH = 16;

// Lane i adds the terms i, i + 16, ... in order; then the upper half of the lanes is added to the lower, four times.
struct LaneSum {
    float lanes[SUM_WIDTH];
};

static inline void clear(LaneSum& sum) {
    for (int i = 0; i < SUM_WIDTH; ++i) sum.lanes[i] = 0;
}

static inline float total(const LaneSum& sum) {
    LaneSum s = sum;
    for (int i = 0; i < 8; ++i) s.lanes[i] += s.lanes[i + 8];
    for (int i = 0; i < 4; ++i) s.lanes[i] += s.lanes[i + 4];
    return (s.lanes[0] + s.lanes[2]) + (s.lanes[1] + s.lanes[3]);
}

// Of term(i) for i below count.
template <class Term>
static inline float lane_sum(int count, const Term& term) {
    LaneSum sum;
    clear(sum);
    int first = 0;
    for (; first + SUM_WIDTH <= count; first += SUM_WIDTH)
        for (int i = 0; i < SUM_WIDTH; ++i) sum.lanes[i] += term(first + i);
    for (int i = 0; first + i < count; ++i) sum.lanes[i] += term(first + i);
    return total(sum);
}

static inline float sum_of_squares(const float* x, int count) {
    return lane_sum(count, [x](int i) { return x[i] * x[i]; });
}

static inline bool is_finite(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7f800000) != 0x7f800000;
}

// By a Hadamard matrix of orthonormal rows; size is a power of two.
static inline void rotate_part(float* x, int64_t size) {
    float factor = 1;
    bool odd = false;
    for (int64_t half = 1; half < size; half *= 2, odd = !odd) {
        for (int64_t start = 0; start < size; start += 2 * half)
            for (int64_t i = start; i < start + half; ++i) {
                const float first = x[i], second = x[i + half];
                x[i] = first + second;
                x[i + half] = first - second;
            }
        if (odd) factor *= 0.5f;
    }
    if (odd) factor *= 0x1.6a09e6p-1f;
    for (int64_t i = 0; i < size; ++i) x[i] *= factor;
}

// One matrix for each power of two that adds up to the size, the largest first.
static inline void rotate(float* x, int64_t size) {
    for (int64_t left = size; left > 0;) {
        int64_t part = 1;
        while (part * 2 <= left) part *= 2;
        rotate_part(x, part);
        x += part;
        left -= part;
    }
}

}  // namespace onnx_kivi::KIVI_ISA
