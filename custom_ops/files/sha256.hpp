// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace onnx_kivi {

class Sha256 {
public:
    using Digest = std::array<unsigned char, 32>;

    void update(const void* data, std::size_t bytes);
    // Of all that was given; nothing may be given afterwards.
    Digest digest();

private:
    static constexpr std::size_t BLOCK = 64;

    void take_block(const unsigned char* block);

    std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<unsigned char, BLOCK> open_{};  // a block that is not full
    uint64_t bytes_ = 0;
};

}  // namespace onnx_kivi
