// The caches of models with ghost I/O, found by the stamps that hosts carry. Every function may be called from any
// thread, and throws Error(cache).
//
// A host never says that it has dropped a past. So caches are freed when all caches of the process take more than a
// budget, those that were used longest ago first; a past whose cache is gone is refused.
#pragma once

#include "../store/attributes.hpp"
#include "call.hpp"

namespace onnx_kivi {

// Bytes that a model's caches may take: what its node says, else ONNX_KIVI_KV_BYTES, else a quarter of the machine's
// memory. Throws Error(config) for an environment that says no number.
int64_t budget_of(const GhostAttributes& attributes);

// Handle of a cache that holds exactly the past that the stamps name: the one that wrote it where nothing came after,
// its rows perhaps in another order, or a copy.
int64_t open_ghost(const GhostAttributes& attributes, int64_t budget, const GhostCall& call);

// Writes the stamps of past and new tokens, of present_shape(), once a step is open on that cache. Where `key` and
// `value` are the past itself, a buffer, those of the past stay.
void stamp_ghost(int64_t handle, const GhostCall& call, float* key, float* value);

}  // namespace onnx_kivi
