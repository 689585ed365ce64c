// The one exception type of the library: its kind tells the bindings which public class to raise.
#pragma once

#include <stdexcept>
#include <string>

#define KIVI_API __attribute__((visibility("default")))

namespace onnx_kivi {

enum class ErrorKind { cache, config, spec_mismatch };

// The class that onnx_kivi.errors has for it.
inline const char* class_name(ErrorKind kind) {
    return kind == ErrorKind::cache ? "CacheError" : kind == ErrorKind::config ? "ConfigError" : "SpecMismatchError";
}

class KIVI_API Error : public std::runtime_error {
public:
    Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind(kind) {}
    const ErrorKind kind;
};

[[noreturn]] inline void throw_cache_error(const std::string& message) { throw Error(ErrorKind::cache, message); }

}  // namespace onnx_kivi
