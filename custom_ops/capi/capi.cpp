// The functions of include/onnx_kivi.h over the store.
#include <string>

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

KIVI_API int64_t kivi_cache_length(int64_t handle) {
    return guarded(int64_t{-1}, [=] { return onnx_kivi::cache_length(handle); });
}

KIVI_API int64_t kivi_cache_sealed_tokens(int64_t handle) {
    return guarded(int64_t{-1}, [=] { return onnx_kivi::sealed_tokens(onnx_kivi::cache_state(handle)); });
}

KIVI_API int64_t kivi_cache_nbytes(int64_t handle) {
    return guarded(int64_t{-1}, [=] { return onnx_kivi::nbytes(onnx_kivi::cache_state(handle)); });
}

KIVI_API int kivi_watch_interrupts(void) { return onnx_kivi::watch_interrupts() ? 0 : -1; }

KIVI_API const char* kivi_last_error(void) { return last_error.c_str(); }

KIVI_API const char* kivi_isa(void) {
    return guarded<const char*>(nullptr, [] { return onnx_kivi::active_kernel().name; });
}

}  // extern "C"
