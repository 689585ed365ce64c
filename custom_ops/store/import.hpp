// A cache from arrays in the canonical layout, whoever made them: nothing about them is taken on trust but that `data`
// has as many elements as type and shape say. The checks and their words are those of onnx_kivi/runtime/state.py.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "state.hpp"

namespace onnx_kivi {

// A contiguous array; `type` is what NumPy calls its elements, or what else was given in place of an array.
struct ArrayView {
    const void* data = nullptr;
    std::string type;
    std::vector<int64_t> shape;
    bool is_array = true;
};

// One side of a block: tokens in `dense`, or codes with their parameters.
struct SideArrays {
    bool is_dense = false;
    ArrayView dense;
    ArrayView codes, lo, scale, digits, token, unit;
};

// A side of these arrays, in the order of files.
KIVI_API SideArrays side_arrays(const std::vector<ArrayView>& arrays, bool dense);

struct BlockArrays {
    SideArrays key, value;
};

struct RowArrays {
    ArrayView sink_key, sink_value;
    int64_t freed = 0;
    std::vector<BlockArrays> blocks;
    ArrayView residual_key, residual_value;
};

struct SlotArrays {
    SdpaAttributes attributes;  // valid
    std::vector<RowArrays> rows;
};

struct StateArrays {
    std::optional<StepAttributes> step;
    std::vector<int64_t> lengths;
    std::vector<SlotArrays> slots;
};

// What `state` says, copied. Throws Error(cache) unless appending could have left it.
KIVI_API State import_state(const StateArrays& state);

}  // namespace onnx_kivi
