// What a node of ghost I/O is given, and whether it fits together.
#pragma once

#include <string>
#include <vector>

#include "../store/error.hpp"
#include "stamp.hpp"

namespace onnx_kivi {

// One tensor of stamps.
struct Stamps {
    StampSide side;
    const float* data;
    StampShape shape;

    std::string where(int64_t row, int64_t token) const;
};

class GhostCall {
public:
    // new_shape: (B, S). mask_shape: (B, T). Throws Error(cache) unless all of it fits.
    GhostCall(const std::string& op, const std::vector<int64_t>& new_shape, const std::vector<int64_t>& mask_shape,
              const std::vector<int64_t>& key_shape, const float* key, const std::vector<int64_t>& value_shape,
              const float* value);

    int64_t rows() const { return rows_; }
    int64_t past() const { return total_ - new_; }
    int64_t total() const { return total_; }
    const Stamps& key() const { return key_; }
    const Stamps& value() const { return value_; }
    // Of what CacheStamp gives: as the past, with room for all tokens.
    StampShape present_shape() const;
    // The stamp of a token of one side. Throws Error(cache) if there is none, or that of another side or process.
    Stamp read(const Stamps& stamps, int64_t row, int64_t token) const;
    [[noreturn]] void refuse(const std::string& what) const;

private:
    int64_t rows_, new_, total_;
    std::string op_;
    Stamps key_, value_;
};

// A number that no other process has, most likely; a forked process has its own.
uint32_t process_nonce();

}  // namespace onnx_kivi
