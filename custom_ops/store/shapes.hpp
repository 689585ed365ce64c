// Binds the dimension letters of the op's inputs, as check_shapes of onnx_kivi/spec.py does, with its messages.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "error.hpp"

namespace onnx_kivi {

enum Letter { B, HQ, HKV, S, N, T, DK, DV, P, LETTERS };

constexpr int64_t UNBOUND = -1;
constexpr int64_t MAX_SIZE = 1 << 16;  // of B, Hq, Hkv, Dk and Dv, which are at least 1

struct Dims : std::array<int64_t, LETTERS> {
    Dims() { fill(UNBOUND); }
};

struct TensorSpec {
    const char* name;
    std::vector<Letter> shape;
    bool optional = false;
    bool broadcast = false;
};

// The float inputs of QuantizedKvSdpa, in order.
KIVI_API const std::array<TensorSpec, 5>& sdpa_tensors();
KIVI_API const char* letter_name(Letter letter);

// A shape as Python writes a tuple does.
std::string tuple_text(const std::vector<int64_t>& shape);
// Numbers as Python writes a list.
std::string list_text(const std::vector<int64_t>& numbers);

// Extends `dims` by one input's shape. Throws Error(cache) naming `where`, the input, expected and got.
void check_shape(const std::string& where, const TensorSpec& spec, const std::vector<int64_t>& shape, Dims& dims);

}  // namespace onnx_kivi
