// Vectors of 8 floats: x86-64-v3. See simd.hpp for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace onnx_kivi::KIVI_ISA {

constexpr int W = 8;
constexpr int REGISTERS = 16;
using F = __m256;
using I = __m256i;
using M = __m256;

static inline F load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
static inline F set1(float x) { return _mm256_set1_ps(x); }
static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
static inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline F max_size(F a, F b) { return max(abs(a), b); }
static inline float reduce_add(F a) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
static inline float reduce_max(F a) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
static inline void reduce_add(const F v[4], float out[4]) {
    for (int i = 0; i < 4; ++i) out[i] = reduce_add(v[i]);
}
static inline void reduce_max(const F v[4], float out[4]) {
    for (int i = 0; i < 4; ++i) out[i] = reduce_max(v[i]);
}
static inline M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline bool any(M m) { return _mm256_movemask_ps(m) != 0; }
static inline F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
static inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F scale_by_power(F a, F n) {
    const I power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(power));
}
static inline F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline F load_bytes(const unsigned char* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
// For each mask the numbers of its bits, a byte each.
struct Orders {
    uint64_t of[256];
    constexpr Orders() : of() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, at = 0; lane < W; ++lane)
                if (mask >> lane & 1) of[mask] |= uint64_t(lane) << 8 * at++;
    }
};
static constexpr Orders ORDERS;
static inline void compress(float* p, F a, unsigned mask) {
    const I order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&ORDERS.of[mask]));
    _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a, order));
}
static inline I to_int(F a) { return _mm256_cvtps_epi32(a); }
static inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }

static inline I load_line(const unsigned char* p) { return _mm256_load_si256((const __m256i*)p); }
template <int BITS>
static inline I code_bytes(I line, int part) {
    if (BITS == 8) return line;
    return _mm256_and_si256(_mm256_srli_epi16(line, part * BITS), _mm256_set1_epi8(char((1 << BITS) - 1)));
}
static inline I shift_right(I a, int bits) { return _mm256_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
static inline I join_bits(I low, I high) { return _mm256_or_si256(low, _mm256_slli_epi16(high, 2)); }
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
    return {_mm256_and_si256(codes, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(codes, 8)};
}
static inline Sum zero_sum() { return {_mm256_setzero_si256()}; }
static inline void dot(Sum& sum, Codes codes, const int32_t* weights) {
    const I even = _mm256_madd_epi16(codes.even, _mm256_set1_epi32(weights[0]));
    const I odd = _mm256_madd_epi16(codes.odd, _mm256_set1_epi32(weights[1]));
    sum.total = _mm256_add_epi32(sum.total, _mm256_add_epi32(even, odd));
}
static inline F sum_to_float(Sum sum) { return to_float(sum.total); }
static inline void store_weights(int32_t* to, F x, float x_factor, F y, float y_factor) {
    const I words = _mm256_packs_epi32(to_int(mul(x, set1(x_factor))), to_int(mul(y, set1(y_factor))));
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm256_storeu_si256((__m256i*)to, _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order)));
}

}  // namespace onnx_kivi::KIVI_ISA
