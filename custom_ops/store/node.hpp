// One node of a step over its rows: shapes checked, each row attended at its own place, its new tokens appended. The
// words are those of onnx_kivi/runtime/numpy_backend/node.py.
#pragma once

#include "call.hpp"
#include "step.hpp"

namespace onnx_kivi {

// Writes the output. Gives the slot's rows with the new tokens; none where the node gives none. Throws Error(cache).
Slot attend_node(const Step& step, const SdpaAttributes& attributes, const Held& held, const Call& call,
                 Scheduler& scheduler);

}  // namespace onnx_kivi
