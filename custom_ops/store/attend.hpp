// Runs the kernel's tasks for one call of the op.
#pragma once

#include "../kernel/kernel.hpp"
#include "../threads/scheduler.hpp"
#include "attributes.hpp"
#include "call.hpp"
#include "shapes.hpp"

namespace onnx_kivi {

// Attention of call.query over the rows, one for each of `rows`, into call.output, zeros where a row has no query or
// no tokens. `dims` holds all letters.
void run_attention(const SdpaAttributes& attributes, const Layout& layout, const Kernel& kernel, const Dims& dims,
                   const std::vector<RowCall>& rows, const Call& call, Scheduler& scheduler);

}  // namespace onnx_kivi
