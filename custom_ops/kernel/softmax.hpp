// The softmax of a tile of scores, online: exponentials relative to the largest score so far, literal about what a
// finite fill, infinities and NaN do in a softmax over the whole row.
#pragma once

#include "scratch.hpp"
#include "simd.hpp"

namespace onnx_kivi::KIVI_ISA {

// Running state of one row: peak, total (SUM_LANES), sums (lanes) are relative to exp(peak).
struct RowState {
    float* peak;
    float* total;
    float* sums;
    int64_t lanes;
};

static inline void scale_floats(float* x, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i += W) store(x + i, mul(load(x + i), set1(factor)));
}

static inline void cap_scores(float* scores, int64_t count, float softcap) {
    for (int64_t i = 0; i < count; i += W)
        store(scores + i, mul(tanh(div(load(scores + i), set1(softcap))), set1(softcap)));
}

// mask_stride is 0 or 1; the mask is read for `tokens` scores only.
static inline void add_mask(float* scores, int64_t tokens, const float* mask, int64_t mask_stride) {
    int64_t i = 0;
    if (mask_stride)
        for (; i + W <= tokens; i += W) store(scores + i, add(load(scores + i), load(mask + i)));
    for (; i < tokens; ++i) scores[i] += mask[i * mask_stride];
}

static inline void hide(float* scores, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scores[i] = -__builtin_inff();
}

// exp(x) as a scalar, of the same function.
static inline float exp1(float x) {
    float lanes[W];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

// scores (count, a multiple of W) become exponentials; the row's state follows its peak.
static inline void exponentials(float* scores, int64_t count, RowState row) {
    const F old_peak = set1(*row.peak);
    F largest = old_peak;
    for (int64_t i = 0; i < count; i += W) largest = max(load(scores + i), largest);
    if (any(greater(largest, old_peak))) {
        const float peak = reduce_max(largest);
        const float factor = exp1(*row.peak - peak);
        scale_floats(row.sums, row.lanes, factor);
        scale_floats(row.total, SUM_LANES, factor);
        *row.peak = peak;
    }
    const F zero_point = set1(*row.peak == -__builtin_inff() ? 0 : *row.peak);
    F total = set1(0);
    for (int64_t i = 0; i < count; i += W) {
        const F e = exp(sub(load(scores + i), zero_point));
        store(scores + i, e);
        total = add(total, e);
    }
    store(row.total, add(load(row.total), total));
}

static inline float row_total(const float* total) {
    F sum = load(total);
    for (int i = W; i < SUM_LANES; i += W) sum = add(sum, load(total + i));
    return reduce_add(sum);
}

}  // namespace onnx_kivi::KIVI_ISA
