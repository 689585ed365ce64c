// Vectors of 4 floats: arm64 with the dot product extension. See simd.hpp for what each function means.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace onnx_kivi::KIVI_ISA {

constexpr int W = 4;
constexpr int REGISTERS = 32;
using F = float32x4_t;
using I = int32x4_t;
using M = uint32x4_t;

static inline F load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, F a) { vst1q_f32(p, a); }
static inline F set1(float x) { return vdupq_n_f32(x); }
static inline F add(F a, F b) { return vaddq_f32(a, b); }
static inline F sub(F a, F b) { return vsubq_f32(a, b); }
static inline F mul(F a, F b) { return vmulq_f32(a, b); }
static inline F div(F a, F b) { return vdivq_f32(a, b); }
static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
static inline M greater(F a, F b) { return vcgtq_f32(a, b); }
static inline F select(M m, F a, F b) { return vbslq_f32(m, a, b); }
static inline F max(F a, F b) { return select(greater(a, b), a, b); }
static inline F abs(F a) { return vabsq_f32(a); }
static inline F max_size(F a, F b) { return vmaxq_f32(vabsq_f32(a), b); }
static inline float reduce_add(F a) { return vaddvq_f32(a); }
static inline float reduce_max(F a) { return vmaxvq_f32(a); }
static inline void reduce_add(const F v[4], float out[4]) {
    for (int i = 0; i < 4; ++i) out[i] = reduce_add(v[i]);
}
static inline void reduce_max(const F v[4], float out[4]) {
    for (int i = 0; i < 4; ++i) out[i] = reduce_max(v[i]);
}
static inline bool any(M m) { return vmaxvq_u32(m) != 0; }
static inline F round(F a) { return vrndnq_f32(a); }
static inline F scale_by_power(F a, F n) {
    const I power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(a, vreinterpretq_f32_s32(power));
}
static inline F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline F load_bytes(const unsigned char* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    const uint16x8_t words = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)));
}
static inline void compress(float* p, F a, unsigned mask) {
    float lanes[W];
    store(lanes, a);
    for (int i = 0, at = 0; i < W; at += mask >> i++ & 1) p[at] = lanes[i];
}
static inline I to_int(F a) { return vcvtnq_s32_f32(a); }
static inline F to_float(I a) { return vcvtq_f32_s32(a); }

static inline I load_line(const unsigned char* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }

// A weight is 256 * high + low, both int8. There is no dot product of mixed signs: 8-bit codes are taken less 128, and
// add_code_bias puts back 128 times the sum of the weights.
constexpr float MAX_WEIGHT = 127 * 256 + 127;
struct Codes {
    int8x16_t bytes;
};
struct Sum {
    I high, low;
};
template <int BITS>
static inline I code_bytes(I line, int part) {
    if (BITS == 8) return line;
    const uint8x16_t moved = vshlq_u8(vreinterpretq_u8_s32(line), vdupq_n_s8(int8_t(-part * BITS)));
    return vreinterpretq_s32_u8(vandq_u8(moved, vdupq_n_u8((1 << BITS) - 1)));
}
static inline I shift_right(I a, int bits) {
    return vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(a), vdupq_n_s16(int16_t(-bits))));
}
static inline I join_bits(I low, I high) { return vorrq_s32(low, vshlq_n_s32(high, 2)); }
template <int BITS>
static inline Codes split(I codes) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(codes);
    return {vreinterpretq_s8_u8(BITS == 8 ? veorq_u8(bytes, vdupq_n_u8(0x80)) : bytes)};
}
static inline Sum zero_sum() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline void dot(Sum& sum, Codes codes, const int32_t* weights) {
    sum.high = vdotq_s32(sum.high, codes.bytes, vreinterpretq_s8_s32(vdupq_n_s32(weights[0])));
    sum.low = vdotq_s32(sum.low, codes.bytes, vreinterpretq_s8_s32(vdupq_n_s32(weights[1])));
}
template <int BITS>
static inline void add_code_bias(float& base, float step, const int32_t* weights, int depth) {
    if (BITS != 8) return;
    Sum sum = zero_sum();
    for (int i = 0; i < depth; i += 4) dot(sum, {vdupq_n_s8(64)}, weights + i);
    base += 2 * step * float(256 * int64_t(vgetq_lane_s32(sum.high, 0)) + vgetq_lane_s32(sum.low, 0));
}
static inline F sum_to_float(Sum sum) { return to_float(vaddq_s32(vshlq_n_s32(sum.high, 8), sum.low)); }
static inline void store_weights(int32_t* to, F x, float x_factor, F y, float y_factor) {
    const I half = vdupq_n_s32(128);
    const I x_weights = to_int(mul(x, set1(x_factor))), y_weights = to_int(mul(y, set1(y_factor)));
    const int16x8_t high = vcombine_s16(vmovn_s32(vshrq_n_s32(vaddq_s32(x_weights, half), 8)),
                                        vmovn_s32(vshrq_n_s32(vaddq_s32(y_weights, half), 8)));
    const int16x8_t low = vcombine_s16(vmovn_s32(x_weights), vmovn_s32(y_weights));
    const int32x2x2_t rows = vzip_s32(vreinterpret_s32_s8(vmovn_s16(high)), vreinterpret_s32_s8(vmovn_s16(low)));
    vst1_s32(to, rows.val[0]);
    vst1_s32(to + 2, rows.val[1]);
}

}  // namespace onnx_kivi::KIVI_ISA
