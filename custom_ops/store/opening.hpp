// What a step may be opened on: which caches together, and which lengths of their rows. The words are those of
// onnx_kivi/runtime/numpy_backend/opening.py.
#pragma once

#include "cache.hpp"

namespace onnx_kivi {

// Throws Error(cache) unless these handles may be the rows of one step.
void check_rows(const std::vector<int64_t>& handles);

// P of each row of each cache; zeros for empty caches. `has_all_nodes`: see open_rows. Throws Error(cache), naming the
// row where there are several caches. The caches are locked.
std::vector<std::vector<int64_t>> check_lengths(const std::vector<CachePtr>& caches,
                                                const std::vector<int64_t>& past_lengths,
                                                const std::vector<int64_t>& new_lengths, const StepAttributes& step,
                                                bool has_all_nodes);

}  // namespace onnx_kivi
