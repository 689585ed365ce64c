// What a cache holds, as a value: copies share all blocks.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "row.hpp"

namespace onnx_kivi {

struct Slot {
    std::shared_ptr<const SdpaAttributes> attributes;  // of the node that made it
    std::shared_ptr<const SlotLayout> layout;          // set where there are rows
    std::vector<Row> rows;
};

using Slots = std::map<int64_t, Slot>;

struct State {
    std::optional<StepAttributes> step;
    std::vector<int64_t> lengths;  // of each row; empty for a cache that holds none
    Slots slots;

    int64_t length() const;  // the most tokens of any row
    // Drops rows of which none has a token: an empty cache takes any number of them.
    void settle();
};

// Sums over a state: see onnx_kivi/runtime/backend.py.
KIVI_API int64_t sealed_tokens(const State& state);
KIVI_API int64_t nbytes(const State& state);
KIVI_API int64_t dense_nbytes(const State& state);

}  // namespace onnx_kivi
