// The header of a cache file (onnx_kivi/SPEC.md): what a cache holds, but for the arrays.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../store/state.hpp"

namespace onnx_kivi {

constexpr int64_t FIRST_FORMAT = 1, LAST_FORMAT = 2;

struct RowHeader {
    int64_t heads = 0, k_size = 0, v_size = 0;
    int64_t sinks = 0, freed = 0, residual = 0;
    std::string blocks;  // two letters for each, keys and values: q for codes, d for f32
};

struct SlotHeader {
    SdpaAttributes attributes;
    std::vector<RowHeader> rows;
};

struct Header {
    std::optional<StepAttributes> step;
    std::vector<int64_t> lengths;
    std::vector<SlotHeader> slots;
};

Header header_of(const State& state);

// The lowest format version that can say it.
int64_t least_version(const Header& header);

std::string header_text(const Header& header, int64_t version);

// Throws Error(cache) unless `text` is what header_text writes, in the lowest version, of sizes that can be.
Header parse_header(std::string_view text, int64_t version);

}  // namespace onnx_kivi
