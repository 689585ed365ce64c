// All caches of the process, by handle. The contract is that of onnx_kivi/runtime/backend.py's Backend.
//
// Handles are even (those of the NumPy backend are odd) and below 2^31. Every function may be called from any
// thread and throws Error(cache) for a handle that is closed or was never given out. The locks of a step's caches are
// held to look and to write, never while computing: rows are immutable, so a run computes on what it saw, and writes
// only if its ticket is still the open step's.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "call.hpp"
#include "shapes.hpp"
#include "state.hpp"

namespace onnx_kivi {

KIVI_API int64_t new_cache(State state = {});
KIVI_API void close_cache(int64_t handle);

// (P of each row, ticket) of a new step over the rows of these caches. Handle 0 is the default cache of the model.
// `has_all_nodes`: the host knows that the model has as many nodes as it says, so that a step of which some never ran
// was stopped. Throws Error(cache), after which no cache has changed.
KIVI_API std::pair<std::vector<int64_t>, int64_t> open_rows(std::vector<int64_t> handles,
                                                            const std::vector<int64_t>& past_lengths,
                                                            const std::vector<int64_t>& new_lengths,
                                                            const StepAttributes& attributes,
                                                            bool has_all_nodes = false);
// The whole op: attends, appends, seals. Throws Error(cache), and poisons the step unless the ticket is stale.
KIVI_API void attend(int64_t ticket, const SdpaAttributes& attributes, const Call& call, Scheduler& scheduler);
// Handles of the caches whose rows the step covers; none for a ticket that is not known any more.
KIVI_API std::vector<int64_t> step_members(int64_t ticket);

KIVI_API std::vector<int64_t> cache_lengths(int64_t handle);
KIVI_API int64_t cache_length(int64_t handle);
// What is committed, whatever step is open.
KIVI_API State cache_state(int64_t handle);
KIVI_API int64_t cache_shared_nbytes(int64_t handle);
KIVI_API void crop_cache(int64_t handle, int64_t length);
KIVI_API void crop_rows(int64_t handle, const std::vector<int64_t>& lengths);
KIVI_API void reset_cache(int64_t handle);
KIVI_API int64_t fork_cache(int64_t handle);
KIVI_API void reorder_cache(int64_t handle, const std::vector<int64_t>& index);
// A new cache whose row i is a copy of row rows[i] = (handle, row).
KIVI_API int64_t gather_rows(const std::vector<std::pair<int64_t, int64_t>>& rows);

}  // namespace onnx_kivi
