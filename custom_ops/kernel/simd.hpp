// The vector layer of the level being compiled, and exp and tanh on top of it.
//
// Each simd_*.hpp gives: W floats per vector, F (floats), I (int32), M (mask), the arithmetic named after it, and
//   fma(a, b, c)           a * b + c
//   max(a, b)              b where either is NaN
//   max_size(a, b)         the larger of |a| and |b|
//   select(m, a, b)        a where m
//   scale_by_power(a, n)   a * 2^n for integral -126 <= n <= 127
//   load_half(p)           W float16
//   load_bytes(p)          W u8
//   compress(p, a, m)      the lanes of a whose bit of m is set, in order; what follows them, up to W floats, is lost
// and the integer dot product. A line of codes is 64 bytes: 16 lanes of one or more quads (4 depths) each; a vector of
// it holds W of the lanes. `code_bytes<BITS>` takes quad `part` out of it, and `split<BITS>` makes it what `dot` wants;
// `join_bits` puts a highest bit above two lower ones, which `shift_right` may have moved within 16 bits.
// `store_weights` rounds W weights of each of two rows, x * factor of at most MAX_WEIGHT in size, and stores them quad
// by quad, two int32 for each row, which `dot` multiplies with a quad of every lane. Sums are exact while they fit in
// int32. `add_code_bias` makes up in a row's base for what a level's `dot` takes off 8-bit codes.
#pragma once

#if defined(__AVX512F__)
#include "simd_avx512.hpp"
#elif defined(__AVX2__)
#include "simd_avx2.hpp"
#elif defined(__SSE2__)
#include "simd_sse2.hpp"
#else
#include "simd_neon.hpp"
#endif

namespace onnx_kivi::KIVI_ISA {

// Into the second level of cache: the first holds too few outstanding misses to reach the memory's bandwidth.
static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// exp(x) for x <= 88, to 4e-7 of itself (5e-6 without a fused multiply-add, where it is small); 0 below the smallest
// normal result. NaN stays NaN.
static inline F exp(F x) {
    const F n = round(mul(x, set1(0x1.715476p0f)));
    const F r = fma(n, set1(-0x1.62e43p-1f), x);
    F p = fma(set1(0x1.115108p-7f), r, set1(0x1.57661cp-5f));
    p = fma(p, r, set1(0x1.555644p-3f));
    p = fma(p, r, set1(0x1.fffd44p-2f));
    p = fma(p, r, set1(1));
    p = fma(p, r, set1(1));
    return select(greater(set1(-87.3f), x), set1(0), scale_by_power(p, n));
}

template <int BITS>
static inline Codes prepare(I line, int part) {
    return split<BITS>(code_bytes<BITS>(line, part));
}

// Of 3 bits: quad `part` of a line of the two lower ones, quad `high_part` of one of the highest.
static inline Codes prepare_joined(I low, int part, I high, int high_part) {
    return split<3>(join_bits(code_bytes<2>(low, part), code_bytes<1>(high, high_part)));
}

// NaN for what is not finite: which infinity, or NaN, a sum of overflowing products comes to depends on their order.
static inline F finite_or_nan(F x) { return fma(x, set1(0), x); }

static inline F tanh(F x) {
    const F size = abs(x);
    const F capped = select(greater(size, set1(20)), set1(20), size);
    const F e = exp(add(capped, capped));
    const F t = sub(set1(1), div(set1(2), add(e, set1(1))));
    return select(greater(set1(0), x), sub(set1(0), t), t);
}

}  // namespace onnx_kivi::KIVI_ISA
