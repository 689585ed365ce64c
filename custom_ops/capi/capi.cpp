// The functions of include/onnx_kivi.h over the store.
#include <algorithm>
#include <string>

#include "../files/cache_file.hpp"
#include "../include/onnx_kivi.h"
#include "../store/kernel_choice.hpp"
#include "../store/store.hpp"
#include "../threads/interrupts.hpp"

namespace {

thread_local std::string last_error;

template <class Result, class Body>
Result guarded(Result on_error, const Body& body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        last_error = error.what();
    } catch (...) {
        last_error = "unknown exception";
    }
    return on_error;
}

}  // namespace

extern "C" {

KIVI_API int64_t kivi_new_cache(void) {
    return guarded(int64_t{-1}, [] { return onnx_kivi::new_cache(); });
}

KIVI_API int kivi_free_cache(int64_t handle) {
    return guarded(-1, [=] { return onnx_kivi::close_cache(handle), 0; });
}

KIVI_API int64_t kivi_fork_cache(int64_t handle) {
    return guarded(int64_t{-1}, [=] { return onnx_kivi::fork_cache(handle); });
}

KIVI_API int kivi_crop_cache(int64_t handle, int64_t length) {
    return guarded(-1, [=] { return onnx_kivi::crop_cache(handle, length), 0; });
}

KIVI_API int64_t kivi_gather_rows(const int64_t* handles, const int64_t* rows, int64_t count) {
    return guarded(int64_t{-1}, [=] {
        std::vector<std::pair<int64_t, int64_t>> sources;
        for (int64_t i = 0; i < count; ++i) sources.emplace_back(handles[i], rows[i]);
        return onnx_kivi::gather_rows(sources);
    });
}

KIVI_API int kivi_reorder_cache(int64_t handle, const int64_t* rows, int64_t count) {
    return guarded(-1, [=] { return onnx_kivi::reorder_cache(handle, {rows, rows + count}), 0; });
}

KIVI_API int kivi_crop_rows(int64_t handle, const int64_t* lengths, int64_t count) {
    return guarded(-1, [=] { return onnx_kivi::crop_rows(handle, {lengths, lengths + count}), 0; });
}

KIVI_API int kivi_reset_cache(int64_t handle) {
    return guarded(-1, [=] { return onnx_kivi::reset_cache(handle), 0; });
}

KIVI_API int64_t kivi_cache_lengths(int64_t handle, int64_t* lengths, int64_t room) {
    return guarded(int64_t{-1}, [=] {
        const std::vector<int64_t> held = onnx_kivi::cache_lengths(handle);
        const auto rows = static_cast<int64_t>(held.size());
        std::copy_n(held.begin(), std::min(std::max<int64_t>(room, 0), rows), lengths);
        return rows;
    });
}

KIVI_API int64_t kivi_cache_length(int64_t handle) {
    return guarded(int64_t{-1}, [=] { return onnx_kivi::cache_length(handle); });
}

KIVI_API int64_t kivi_cache_sealed_tokens(int64_t handle) {
    return guarded(int64_t{-1}, [=] { return onnx_kivi::sealed_tokens(onnx_kivi::cache_state(handle)); });
}

KIVI_API int64_t kivi_cache_nbytes(int64_t handle) {
    return guarded(int64_t{-1}, [=] { return onnx_kivi::nbytes(onnx_kivi::cache_state(handle)); });
}

KIVI_API int64_t kivi_cache_shared_nbytes(int64_t handle) {
    return guarded(int64_t{-1}, [=] { return onnx_kivi::cache_shared_nbytes(handle); });
}

KIVI_API int kivi_save_cache(int64_t handle, const char* path) {
    return guarded(-1, [=] { return onnx_kivi::save_cache(path, onnx_kivi::cache_state(handle)), 0; });
}

KIVI_API int64_t kivi_load_cache(const char* path) {
    return guarded(int64_t{-1}, [=] { return onnx_kivi::new_cache(onnx_kivi::load_cache(path)); });
}

KIVI_API int kivi_watch_interrupts(void) { return onnx_kivi::watch_interrupts() ? 0 : -1; }

KIVI_API const char* kivi_last_error(void) { return last_error.c_str(); }

KIVI_API const char* kivi_isa(void) {
    return guarded<const char*>(nullptr, [] { return onnx_kivi::active_kernel().name; });
}

}  // extern "C"
