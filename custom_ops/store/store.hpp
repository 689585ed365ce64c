// All caches of the process, by handle. The contract is that of onnx_kivi/runtime/backend.py's Backend.
//
// Handles are even (those of the NumPy backend are odd) and below 2^31. Every function may be called from any
// thread and throws Error(cache) for a handle that is closed or was never given out.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cache.hpp"

namespace onnx_kivi {

KIVI_API int64_t new_cache(Snapshot state = {});
KIVI_API void close_cache(int64_t handle);

// (P, ticket). Handle 0 is the default cache of the model. See Cache::open_step for has_all_nodes.
KIVI_API std::pair<int64_t, int64_t> open_step(int64_t handle, int64_t past_length, const StepAttributes& attributes,
                                               bool has_all_nodes = false);
KIVI_API void attend(int64_t ticket, const SdpaAttributes& attributes, const Call& call, Scheduler& scheduler);

KIVI_API int64_t cache_length(int64_t handle);
KIVI_API Snapshot cache_snapshot(int64_t handle);
KIVI_API void crop_cache(int64_t handle, int64_t length);
KIVI_API void reset_cache(int64_t handle);
KIVI_API int64_t fork_cache(int64_t handle);
KIVI_API void reorder_cache(int64_t handle, const std::vector<int64_t>& index);

}  // namespace onnx_kivi
