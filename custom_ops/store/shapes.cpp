#include "shapes.hpp"

#include <algorithm>

namespace onnx_kivi {

namespace {

std::string joined(const std::vector<int64_t>& numbers) {
    std::string text;
    for (const int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
    return text;
}

std::string expected_text(const TensorSpec& spec, const Dims& dims) {
    std::string text;
    for (const Letter letter : spec.shape) {
        text += (text.empty() ? "" : ", ") + std::string(letter_name(letter));
        if (dims[letter] != UNBOUND) text += "=" + std::to_string(dims[letter]);
    }
    return "(" + text + ")" + (spec.broadcast ? " (each may be 1)" : "");
}

void check_sizes(const std::string& where, const std::vector<Letter>& letters, const std::vector<int64_t>& shape) {
    for (std::size_t i = 0; i < letters.size(); ++i) {
        if (letters[i] == S || letters[i] == N || letters[i] == T || (1 <= shape[i] && shape[i] <= MAX_SIZE)) continue;
        throw_cache_error(where + ": expected " + letter_name(letters[i]) + " from 1 to " + std::to_string(MAX_SIZE) +
                          ", got shape " + tuple_text(shape));
    }
}

}  // namespace

std::string tuple_text(const std::vector<int64_t>& shape) {
    return "(" + joined(shape) + (shape.size() == 1 ? ",)" : ")");
}

std::string list_text(const std::vector<int64_t>& numbers) { return "[" + joined(numbers) + "]"; }

const std::array<TensorSpec, 5>& sdpa_tensors() {
    static const std::array<TensorSpec, 5> tensors{{
        {"query", {B, HQ, S, DK}},
        {"key", {B, HKV, N, DK}},
        {"value", {B, HKV, N, DV}},
        {"attn_mask", {B, HQ, S, T}, true, true},
        {"head_sink", {HQ}, true},
    }};
    return tensors;
}

const char* letter_name(Letter letter) {
    static constexpr const char* names[LETTERS] = {"B", "Hq", "Hkv", "S", "N", "T", "Dk", "Dv", "P"};
    return names[letter];
}

void check_shape(const std::string& where, const TensorSpec& spec, const std::vector<int64_t>& shape, Dims& dims) {
    if (spec.optional && shape == std::vector<int64_t>{0}) return;
    bool ok = shape.size() == spec.shape.size();
    for (std::size_t i = 0; i < std::min(shape.size(), spec.shape.size()); ++i) {
        int64_t& bound = dims[spec.shape[i]];
        if (bound == UNBOUND) bound = spec.shape[i] == T ? dims[P] + dims[N] : shape[i];
        ok = ok && (shape[i] == bound || (spec.broadcast && shape[i] == 1));
    }
    if (!ok) {
        throw_cache_error(where + ": " + spec.name + ": expected shape " + expected_text(spec, dims) + ", got " +
                          tuple_text(shape));
    }
    check_sizes(where + ": " + spec.name, spec.shape, shape);
}

}  // namespace onnx_kivi
