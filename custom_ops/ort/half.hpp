// Arrays of float16 and bfloat16 to float32, exactly, and back, rounded to nearest, ties to even. NaN stays NaN.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace onnx_kivi {

inline float from_bfloat16(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

inline uint16_t to_bfloat16(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}

inline float from_float16(uint16_t x) {
    const uint32_t magnitude = uint32_t{x} << 13 & 0x0fffe000;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;    // normals and subnormals alike
    const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // infinity and NaN
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | (uint32_t{x} & 0x8000) << 16);
}

inline uint16_t to_float16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    // Below the smallest normal, adding 0.5 shifts the mantissa to where float16 has it, rounded by the addition.
    const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3f000000;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t finite = magnitude < 0x38800000 ? small : normal;
    const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000 ? large : finite));
}

template <auto Convert, class From, class To>
void convert(const From* from, To* to, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) to[i] = Convert(from[i]);
}

}  // namespace onnx_kivi
