// One node's tensors, as a host hands them over.
#pragma once

#include <cstdint>
#include <vector>

namespace onnx_kivi {

// Contiguous f32, or `other_type` names what it is instead.
struct Tensor {
    const float* data = nullptr;
    std::vector<int64_t> shape;
    const char* other_type = nullptr;

    int64_t size() const {
        int64_t product = 1;
        for (const int64_t size : shape) product *= size;
        return product;
    }
};

// The inputs of one QuantizedKvSdpa node, and its output, (B, Hq, S, Dv).
struct Call {
    Tensor query, key, value, attn_mask, head_sink;
    float* output = nullptr;
};

}  // namespace onnx_kivi
