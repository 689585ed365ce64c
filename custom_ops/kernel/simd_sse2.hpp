// Vectors of 4 floats: the x86-64 baseline, SSE2. See simd.hpp for what each function means.
#pragma once

#include <emmintrin.h>

#include <cstdint>

namespace onnx_kivi::KIVI_ISA {

constexpr int W = 4;
constexpr int REGISTERS = 16;
using F = __m128;
using I = __m128i;
using M = __m128;

static inline F load(const float* p) { return _mm_loadu_ps(p); }
static inline void store(float* p, F a) { _mm_storeu_ps(p, a); }
static inline F set1(float x) { return _mm_set1_ps(x); }
static inline F add(F a, F b) { return _mm_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
static inline F max(F a, F b) { return _mm_max_ps(a, b); }
static inline F abs(F a) { return _mm_andnot_ps(_mm_set1_ps(-0.0f), a); }
static inline F max_size(F a, F b) { return max(abs(a), b); }
static inline float reduce_add(F a) {
    const F pair = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
static inline float reduce_max(F a) {
    const F pair = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
static inline void reduce_add(const F v[4], float out[4]) {
    for (int i = 0; i < 4; ++i) out[i] = reduce_add(v[i]);
}
static inline void reduce_max(const F v[4], float out[4]) {
    for (int i = 0; i < 4; ++i) out[i] = reduce_max(v[i]);
}
static inline M greater(F a, F b) { return _mm_cmpgt_ps(a, b); }
static inline bool any(M m) { return _mm_movemask_ps(m) != 0; }
static inline F select(M m, F a, F b) { return _mm_or_ps(_mm_and_ps(m, a), _mm_andnot_ps(m, b)); }
static inline F round(F a) { return _mm_cvtepi32_ps(_mm_cvtps_epi32(a)); }
static inline F scale_by_power(F a, F n) {
    return _mm_mul_ps(a, _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(n), _mm_set1_epi32(127)), 23)));
}
static inline F load_half(const uint16_t* p) {
    const I half = _mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
    const I magnitude = _mm_slli_epi32(_mm_and_si128(half, _mm_set1_epi32(0x7fff)), 13);
    const I sign = _mm_slli_epi32(_mm_and_si128(half, _mm_set1_epi32(0x8000)), 16);
    return _mm_or_ps(_mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0x1p112f)), _mm_castsi128_ps(sign));
}
static inline F load_bytes(const unsigned char* p) {
    int four;
    __builtin_memcpy(&four, p, sizeof four);
    const I zero = _mm_setzero_si128();
    return _mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero), zero));
}
static inline void compress(float* p, F a, unsigned mask) {
    float lanes[W];
    store(lanes, a);
    for (int i = 0, at = 0; i < W; at += mask >> i++ & 1) p[at] = lanes[i];
}
static inline I to_int(F a) { return _mm_cvtps_epi32(a); }
static inline F to_float(I a) { return _mm_cvtepi32_ps(a); }

static inline I load_line(const unsigned char* p) { return _mm_load_si128((const __m128i*)p); }
template <int BITS>
static inline I code_bytes(I line, int part) {
    if (BITS == 8) return line;
    return _mm_and_si128(_mm_srli_epi16(line, part * BITS), _mm_set1_epi8(char((1 << BITS) - 1)));
}
static inline I shift_right(I a, int bits) { return _mm_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
static inline I join_bits(I low, I high) { return _mm_or_si128(low, _mm_slli_epi16(high, 2)); }
template <int BITS>
static inline void add_code_bias(float&, float, const int32_t*, int) {}

// A weight is an int16; a quad's even depths come first, then its odd ones.
constexpr float MAX_WEIGHT = 32767;
struct Codes {
    I even, odd;
};
struct Sum {
    I total;
};
template <int BITS>
static inline Codes split(I codes) {
    return {_mm_and_si128(codes, _mm_set1_epi16(0xff)), _mm_srli_epi16(codes, 8)};
}
static inline Sum zero_sum() { return {_mm_setzero_si128()}; }
static inline void dot(Sum& sum, Codes codes, const int32_t* weights) {
    const I even = _mm_madd_epi16(codes.even, _mm_set1_epi32(weights[0]));
    const I odd = _mm_madd_epi16(codes.odd, _mm_set1_epi32(weights[1]));
    sum.total = _mm_add_epi32(sum.total, _mm_add_epi32(even, odd));
}
static inline F sum_to_float(Sum sum) { return to_float(sum.total); }
static inline void store_weights(int32_t* to, F x, float x_factor, F y, float y_factor) {
    const I x_weights = _mm_shuffle_epi32(to_int(mul(x, set1(x_factor))), _MM_SHUFFLE(3, 1, 2, 0));
    const I y_weights = _mm_shuffle_epi32(to_int(mul(y, set1(y_factor))), _MM_SHUFFLE(3, 1, 2, 0));
    _mm_storeu_si128((__m128i*)to, _mm_packs_epi32(x_weights, y_weights));
}

}  // namespace onnx_kivi::KIVI_ISA
