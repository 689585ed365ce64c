// Cache files: the same bytes for the same state as onnx_kivi/runtime/cache_file.py. Loading trusts nothing: every way
// in which a file can lie is an Error, found before memory is taken for it.
#pragma once

#include <cstdio>
#include <string>

#include "../store/state.hpp"

namespace onnx_kivi {

// Under a temporary name until it is complete and synced. Throws Error(cache) that names the file.
void save_cache(const std::string& path, const State& state);
State load_cache(const std::string& path);

// The same on files that are open; `bytes` is what there is to read. Throws Error.
KIVI_API void write_cache(std::FILE* file, const State& state);
KIVI_API State read_cache(std::FILE* file, int64_t bytes);

}  // namespace onnx_kivi
