#include "block.hpp"

#include <cstring>

namespace onnx_kivi {

DenseTokens dense_tokens(const Layout& layout, const Block& block, int64_t begin, int64_t tokens) {
    const auto floats = [](int64_t bytes) { return bytes / static_cast<int64_t>(sizeof(float)); };
    const auto* data = reinterpret_cast<const float*>(block.memory.data());
    const bool key_dense = block.dense & KEY_DENSE, value_dense = block.dense & VALUE_DENSE;
    const int64_t head_stride = floats(block_bytes(layout, block.dense) / layout.shape.kv_heads);
    const int64_t value_offset = floats(key_dense ? layout.key.dense_bytes : layout.key.quantized_bytes);
    return slice({key_dense ? data : nullptr, value_dense ? data + value_offset : nullptr, begin + tokens, head_stride,
                  layout.key.size, head_stride, layout.value.size},
                 begin, tokens);
}

DenseTokens slice(const DenseTokens& from, int64_t begin, int64_t tokens) {
    DenseTokens part = from;
    if (part.key) part.key += begin * from.key_token_stride;
    if (part.value) part.value += begin * from.value_token_stride;
    part.tokens = tokens;
    return part;
}

namespace {

void copy_side(int32_t heads, int64_t tokens, int32_t size, const float* from, int64_t from_head, int64_t from_token,
               const float* to, int64_t to_head, int64_t to_token) {
    if (from == nullptr || to == nullptr) return;
    for (int32_t h = 0; h < heads; ++h) {
        for (int64_t t = 0; t < tokens; ++t) {
            std::memcpy(const_cast<float*>(to) + h * to_head + t * to_token, from + h * from_head + t * from_token,
                        static_cast<std::size_t>(size) * sizeof(float));
        }
    }
}

}  // namespace

void copy_tokens(const Layout& layout, const DenseTokens& from, const DenseTokens& to) {
    const int32_t heads = layout.shape.kv_heads;
    copy_side(heads, from.tokens, layout.shape.k_size, from.key, from.key_head_stride, from.key_token_stride, to.key,
              to.key_head_stride, to.key_token_stride);
    copy_side(heads, from.tokens, layout.shape.v_size, from.value, from.value_head_stride, from.value_token_stride,
              to.value, to.value_head_stride, to.value_token_stride);
}

}  // namespace onnx_kivi
