// A cache made of rows of other caches: fork, select, repeat and join are all this. The words are those of
// onnx_kivi/runtime/numpy_backend/gather.py.
#pragma once

#include "cache.hpp"

namespace onnx_kivi {

// The state whose row i is row rows[i].second of cache rows[i].first, sharing its blocks. `caches` has all of them, and
// they are locked. Throws Error(cache).
State gathered(const std::vector<CachePtr>& caches, const std::vector<std::pair<int64_t, int64_t>>& rows);

}  // namespace onnx_kivi
