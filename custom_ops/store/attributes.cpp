#include "attributes.hpp"

#include <cmath>
#include <cstdlib>
#include <initializer_list>

namespace onnx_kivi {

namespace {

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
    throw Error(ErrorKind::config, std::string(name) + ": expected " + expected + ", got " + got);
}

void at_least(const char* name, int64_t value, int64_t least) {
    if (value < least) refuse(name, "an integer >= " + std::to_string(least), std::to_string(value));
}

void one_of(const char* name, int64_t value, std::initializer_list<int64_t> allowed) {
    std::string list;
    for (const int64_t candidate : allowed) {
        if (candidate == value) return;
        list += (list.empty() ? "" : ", ") + std::to_string(candidate);
    }
    refuse(name, "one of " + list, std::to_string(value));
}

void check_version(int64_t version) {
    if (version != SPEC_VERSION) {
        throw Error(ErrorKind::spec_mismatch, "spec_version: expected " + std::to_string(SPEC_VERSION) + ", got " +
                                                  std::to_string(version) +
                                                  "; rewrite the original model with this version of onnx_kivi");
    }
}

}  // namespace

void validate(const StepAttributes& attributes) {
    check_version(attributes.spec_version);
    if (attributes.model_id.empty()) refuse("model_id", "a non-empty string", "''");
    at_least("layers", attributes.layers, 1);
}

void validate(const SdpaAttributes& a) {
    check_version(a.spec_version);
    at_least("slot", a.slot, 0);
    one_of("k_bits", a.row.k_bits, {2, 4, 8, 32});
    one_of("v_bits", a.row.v_bits, {2, 4, 8, 32});
    at_least("block_tokens", a.row.block_tokens, 1);
    if (a.row.block_tokens > MAX_BLOCK_TOKENS) {
        refuse("block_tokens", "at most " + std::to_string(MAX_BLOCK_TOKENS), std::to_string(a.row.block_tokens));
    }
    at_least("v_group_size", a.row.v_group_size, 0);
    at_least("residual_length", a.row.residual_length, 0);
    at_least("sink_length", a.row.sink_length, 0);
    if (a.row.kind != "self" && a.row.kind != "cross") refuse("kind", "one of self, cross", "'" + a.row.kind + "'");
    one_of("is_causal", a.is_causal, {0, 1});
    one_of("nan_to_zero", a.nan_to_zero, {0, 1});
    at_least("window", a.window, 0);
    if (!std::isfinite(a.scale)) refuse("scale", "a finite number", std::to_string(a.scale));
    if (!(std::isfinite(a.softcap) && a.softcap >= 0)) {
        refuse("softcap", "a finite number >= 0", std::to_string(a.softcap));
    }
}

double parse_decimal(const char* name, const std::string& text) {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0') refuse(name, "float", "'" + text + "'");
    return value;
}

}  // namespace onnx_kivi
