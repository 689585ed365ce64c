// Attributes of the ops, in all versions of the spec. `onnx_kivi/spec.py` defines them; a test holds these tables to
// it.
//
// fields(self, version, visit) calls visit(name, member) in the spec's order for what nodes of that version have:
// parsing, writing and that test are loops over it. A node must have the first REQUIRED of them; the others have the
// defaults written here. Members are int64_t (an int in the node), std::string, or double (a decimal string in the
// node, because a float attribute reaches a Python op as text of 6 digits).
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "error.hpp"

namespace onnx_kivi {

constexpr int64_t FIRST_VERSION = 1, LAST_VERSION = 2;
constexpr int64_t DEFAULT_HANDLE = 0;
constexpr int64_t COMMITTED_LENGTH = -1;
constexpr int64_t ALL_NEW = -1;
constexpr int64_t NO_STEP = -1;
constexpr int64_t MAX_BLOCK_TOKENS = 1024;
constexpr int64_t MAX_LAYERS = 1 << 16, MAX_SLOT = 1 << 16, MAX_SINK_LENGTH = 1 << 16;
constexpr int64_t MAX_RESIDUAL_LENGTH = 1 << 20, MAX_V_GROUP_SIZE = 1 << 20;
constexpr int64_t MAX_WINDOW = int64_t{1} << 40, MAX_KV_BYTES = int64_t{1} << 40;

struct StepAttributes {
    static constexpr int REQUIRED = 2;

    std::string model_id;
    int64_t layers = 0;
    std::string one_length;
    int64_t spec_version = FIRST_VERSION;

    bool operator==(const StepAttributes&) const = default;

    template <class Self, class Visitor>
    static void fields(Self& self, int64_t version, Visitor&& visit) {
        visit("model_id", self.model_id);
        visit("layers", self.layers);
        if (version >= 2) visit("one_length", self.one_length);
        visit("spec_version", self.spec_version);
    }
};

// What all nodes of a slot agree on, because its rows are made with it.
struct RowOptions {
    std::string kind = "self";
    int64_t k_bits = 8;
    int64_t v_bits = 8;
    int64_t block_tokens = 64;
    int64_t v_group_size = 64;
    int64_t residual_length = 128;
    int64_t sink_length = 4;
    std::string k_scheme = "affine";
    std::string v_scheme = "affine";
    std::string dense_element = "float32";

    bool operator==(const RowOptions&) const = default;
    bool is_cross() const { return kind == "cross"; }
    bool has_token_scales() const { return k_scheme.find("+token") != std::string::npos; }
    bool rotates_keys() const { return k_scheme.find("+rotated") != std::string::npos; }
    bool has_symmetric_values() const { return v_scheme == "symmetric+rotated"; }

    template <class Self, class Visitor>
    static void fields(Self& self, Visitor&& visit) {
        visit("kind", self.kind);
        visit("k_bits", self.k_bits);
        visit("v_bits", self.v_bits);
        visit("block_tokens", self.block_tokens);
        visit("v_group_size", self.v_group_size);
        visit("residual_length", self.residual_length);
        visit("sink_length", self.sink_length);
    }

    template <class Self, class Visitor>
    static void scheme_fields(Self& self, Visitor&& visit) {
        visit("k_scheme", self.k_scheme);
        visit("v_scheme", self.v_scheme);
        visit("dense_element", self.dense_element);
    }
};

// Digits of two bits that a block spends on one head's keys; 0 where each channel has a code of k_bits.
KIVI_API int64_t digits_of(const RowOptions& options, int64_t k_size);

struct SdpaAttributes {
    static constexpr int REQUIRED = 1;

    int64_t slot = 0;
    RowOptions row;
    double scale = 1.0;
    double softcap = 0.0;
    int64_t is_causal = 0;
    int64_t window = 0;
    int64_t nan_to_zero = 0;
    int64_t evict = 0;
    int64_t window_sinks = 0;
    int64_t spec_version = FIRST_VERSION;

    template <class Self, class Visitor>
    static void fields(Self& self, int64_t version, Visitor&& visit) {
        visit("slot", self.slot);
        RowOptions::fields(self.row, visit);
        visit("scale", self.scale);
        visit("softcap", self.softcap);
        visit("is_causal", self.is_causal);
        visit("window", self.window);
        visit("nan_to_zero", self.nan_to_zero);
        if (version >= 2) {
            visit("evict", self.evict);
            visit("window_sinks", self.window_sinks);
            RowOptions::scheme_fields(self.row, visit);
        }
        visit("spec_version", self.spec_version);
    }
};

struct GhostAttributes {
    static constexpr int REQUIRED = 1;

    std::string model_id;
    int64_t kv_bytes = 0;
    int64_t spec_version = 2;

    template <class Self, class Visitor>
    static void fields(Self& self, int64_t, Visitor&& visit) {
        visit("model_id", self.model_id);
        visit("kv_bytes", self.kv_bytes);
        visit("spec_version", self.spec_version);
    }
};

// Names of what nodes of that version have, in order.
template <class Attributes>
std::vector<std::string> field_names(int64_t version) {
    std::vector<std::string> names;
    Attributes none;
    Attributes::fields(none, version, [&](const char* name, const auto&) { names.emplace_back(name); });
    return names;
}

// Throws Error(spec_mismatch) unless it is a version of the spec.
KIVI_API void check_version(int64_t version);

// Throws Error(config) naming what may be given in place of `name`.
[[noreturn]] KIVI_API void refuse_unknown(const std::string& name, const std::vector<std::string>& known);

// All throw Error(spec_mismatch) for another spec version, Error(config) for a value outside the spec.
KIVI_API void validate(const StepAttributes& attributes);
KIVI_API void validate(const SdpaAttributes& attributes);
KIVI_API void validate(const GhostAttributes& attributes);

// The number that a decimal string says: digits, perhaps a sign, a point, an exponent, and nothing else, whatever the
// locale. Throws Error(config) naming the attribute, as spec.py does.
KIVI_API double parse_decimal(const char* name, const std::string& text);

// The shortest decimal string that parses to this number, as Python's repr writes it.
KIVI_API std::string decimal(double value);

// Throws Error(config): the attribute has not the type that it should have.
[[noreturn]] KIVI_API void refuse_type(const char* name, const char* expected, const std::string& got);

}  // namespace onnx_kivi
