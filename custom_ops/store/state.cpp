#include "state.hpp"

#include <algorithm>

namespace onnx_kivi {

int64_t State::length() const { return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end()); }

void State::settle() {
    if (length() > 0) return;
    bool has_rows = false;
    for (auto& [index, slot] : slots) {
        if (!slot.attributes->row.is_cross()) slot.rows.clear();
        has_rows = has_rows || !slot.rows.empty();
    }
    if (!has_rows) lengths.clear();
}

int64_t sealed_tokens(const State& state) {
    std::optional<int64_t> least;
    for (const auto& [index, slot] : state.slots) {
        const RowOptions& options = slot.attributes->row;
        if (std::min(options.k_bits, options.v_bits) >= DENSE_BITS) continue;
        if (slot.rows.empty()) least = 0;
        for (const Row& row : slot.rows) {
            const int64_t tokens = row.quantized_tokens(*slot.layout);
            least = std::min(least.value_or(tokens), tokens);
        }
    }
    return least.value_or(0);
}

int64_t nbytes(const State& state) {
    int64_t bytes = 0;
    for (const auto& [index, slot] : state.slots) {
        for (const Row& row : slot.rows) bytes += row.nbytes(*slot.layout);
    }
    return bytes;
}

int64_t dense_nbytes(const State& state) {
    int64_t floats = 0;
    for (const auto& [index, slot] : state.slots) {
        if (slot.rows.empty()) continue;
        const SlotShape& shape = slot.layout->blocks.shape;
        const int64_t per_token = int64_t{shape.kv_heads} * (shape.k_size + shape.v_size);
        for (const Row& row : slot.rows) floats += row.tokens() * per_token;
    }
    return floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace onnx_kivi
