// Runs the kernel's tasks for one call of the op.
#pragma once

#include "../threads/scheduler.hpp"
#include "cache.hpp"
#include "shapes.hpp"

namespace onnx_kivi {

// Attention of call.query over `rows` and the new tokens, into call.output. `dims` holds all letters but T;
// new_tokens has one view per row.
void run_attention(const SdpaAttributes& attributes, const Layout& layout, const Kernel& kernel, const Dims& dims,
                   int64_t position, const std::vector<RowCache>& rows, const std::vector<DenseTokens>& new_tokens,
                   const Call& call, Scheduler& scheduler);

// The N new tokens of each row.
std::vector<DenseTokens> new_tokens_of(const Call& call, const Dims& dims);

}  // namespace onnx_kivi
