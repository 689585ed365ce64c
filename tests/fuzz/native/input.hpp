// A fuzzer's bytes, taken off as numbers; zeros when they are used up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace onnx_kivi::fuzz {

class Input {
public:
    Input(const uint8_t* data, std::size_t size) : data_(data), left_(size) {}

    std::size_t left() const { return left_; }

    uint8_t byte() {
        if (left_ == 0) return 0;
        --left_;
        return *data_++;
    }

    // 0 to most - 1.
    int64_t below(int64_t most) { return byte() % most; }

    // Small as a rule, and now and then any number at all.
    int64_t number() {
        const uint8_t first = byte();
        if (first < 0xf0) return first % 40;
        int64_t value = 0;
        for (int i = 0; i < 8; ++i) value = static_cast<int64_t>(static_cast<uint64_t>(value) << 8 | byte());
        return first < 0xf8 ? value >> (first % 8 * 8) : value;
    }

    std::string text() {
        std::string text(static_cast<std::size_t>(below(24)), '\0');
        for (char& c : text) c = static_cast<char>(byte());
        return text;
    }

    // Fills memory of exactly that size, so that a sanitizer sees who reads beyond it.
    std::unique_ptr<unsigned char[]> bytes(std::size_t size) {
        auto memory = std::make_unique<unsigned char[]>(size);
        const std::size_t given = size < left_ ? size : left_;
        if (given > 0) std::memcpy(memory.get(), data_, given);
        data_ += given;
        left_ -= given;
        return memory;
    }

private:
    const uint8_t* data_;
    std::size_t left_;
};

}  // namespace onnx_kivi::fuzz
