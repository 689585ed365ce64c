// Vectors of 16 floats: x86-64-v4, with or without VNNI. See simd.hpp for what each function means.
#pragma once

#include <cstdint>

// GCC 12 takes its own header's _mm512_undefined_ps() for a mistake of ours (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

namespace onnx_kivi::KIVI_ISA {

constexpr int W = 16;
constexpr int REGISTERS = 32;
using F = __m512;
using I = __m512i;
using M = __mmask16;

static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
static inline F set1(float x) { return _mm512_set1_ps(x); }
static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
static inline F max_size(F a, F b) { return _mm512_range_ps(a, b, 0b1011); }
static inline F abs(F a) { return _mm512_abs_ps(a); }
static inline float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
static inline float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
static inline __m128 rows_of_lanes(F abcd) {
    return _mm512_castps512_ps128(
        _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), abcd));
}
static inline void reduce_add(const F v[4], float out[4]) {
    const F ab = add(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
    const F cd = add(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
    const F abcd = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    const F pairs = add(abcd, _mm512_permute_ps(abcd, 0x4e));
    _mm_storeu_ps(out, rows_of_lanes(add(pairs, _mm512_permute_ps(pairs, 0xb1))));
}
static inline void reduce_max(const F v[4], float out[4]) {
    const F ab = max(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
    const F cd = max(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
    const F abcd = max(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    const F pairs = max(abcd, _mm512_permute_ps(abcd, 0x4e));
    _mm_storeu_ps(out, rows_of_lanes(max(pairs, _mm512_permute_ps(pairs, 0xb1))));
}
static inline M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline bool any(M m) { return m != 0; }
static inline F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
static inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F scale_by_power(F a, F n) { return _mm512_scalef_ps(a, n); }
static inline F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline F load_bytes(const unsigned char* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline void compress(float* p, F a, unsigned mask) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(mask), a));
}
static inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
static inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }

static inline I load_line(const unsigned char* p) { return _mm512_load_si512(p); }
template <int BITS>
static inline I code_bytes(I line, int part) {
    if (BITS == 8) return line;
    return _mm512_and_si512(_mm512_srli_epi16(line, unsigned(part * BITS)), _mm512_set1_epi8(char((1 << BITS) - 1)));
}
static inline I shift_right(I a, int bits) { return _mm512_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
static inline I join_bits(I low, I high) { return _mm512_or_si512(low, _mm512_slli_epi16(high, 2)); }
template <int BITS>
static inline void add_code_bias(float&, float, const int32_t*, int) {}

#if defined(__AVX512VNNI__)
// A weight is 256 * high + low, both int8.
constexpr float MAX_WEIGHT = 127 * 256 + 127;
struct Codes {
    I bytes;
};
struct Sum {
    I high, low;
};
template <int BITS>
static inline Codes split(I codes) {
    return {codes};
}
static inline Sum zero_sum() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
// Written out, because GCC copies or even spills the sums around the intrinsic.
static inline void dot_bytes(I& sum, I codes, I weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
}
static inline void dot(Sum& sum, Codes codes, const int32_t* weights) {
    dot_bytes(sum.high, codes.bytes, _mm512_set1_epi32(weights[0]));
    dot_bytes(sum.low, codes.bytes, _mm512_set1_epi32(weights[1]));
}
static inline F sum_to_float(Sum sum) { return to_float(_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low)); }
static inline void store_weights(int32_t* to, F x, float x_factor, F y, float y_factor) {
    const F integer = set1(0x1.8p23f + 128);  // its bits end in the integer, plus 128 to carry into the high byte
    const I x_bytes = _mm512_castps_si512(fma(x, set1(x_factor), integer));
    const I y_bytes = _mm512_castps_si512(fma(y, set1(y_factor), integer));
    const I order = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12));
    const I both = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(x_bytes, order), 0xff00ff00ff00ff00, y_bytes, order);
    _mm512_storeu_si512(to, _mm512_xor_si512(both, _mm512_set1_epi64(int64_t(0x8080808000000000))));
}
#else
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
    return {_mm512_and_si512(codes, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(codes, 8)};
}
static inline Sum zero_sum() { return {_mm512_setzero_si512()}; }
static inline void dot(Sum& sum, Codes codes, const int32_t* weights) {
    const I even = _mm512_madd_epi16(codes.even, _mm512_set1_epi32(weights[0]));
    const I odd = _mm512_madd_epi16(codes.odd, _mm512_set1_epi32(weights[1]));
    sum.total = _mm512_add_epi32(sum.total, _mm512_add_epi32(even, odd));
}
static inline F sum_to_float(Sum sum) { return to_float(sum.total); }
static inline void store_weights(int32_t* to, F x, float x_factor, F y, float y_factor) {
    const I words = _mm512_packs_epi32(to_int(mul(x, set1(x_factor))), to_int(mul(y, set1(y_factor))));
    const I order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    _mm512_storeu_si512(to, _mm512_shuffle_epi8(words, order));
}
#endif

}  // namespace onnx_kivi::KIVI_ISA
