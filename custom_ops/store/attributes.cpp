#include "attributes.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

namespace onnx_kivi {

namespace {

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
    throw Error(ErrorKind::config, std::string(name) + ": expected " + expected + ", got " + got);
}

void between(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
        refuse(name, "an integer from " + std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
    }
}

bool is_printable(char c) { return c >= ' ' && c <= '~'; }

// As Python writes a string that it shows; other bytes than printable ASCII as \x and two digits.
std::string quoted(const std::string& text) {
    constexpr char digits[] = "0123456789abcdef";
    std::string shown = "'";
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        shown += is_printable(c) ? std::string(1, c) : std::string{'\\', 'x', digits[byte / 16], digits[byte % 16]};
    }
    return shown + "'";
}

std::string plain(int64_t value) { return std::to_string(value); }
std::string plain(const std::string& value) { return value; }
std::string shown(int64_t value) { return std::to_string(value); }
std::string shown(const std::string& value) { return quoted(value); }

template <class Value>
bool is_among(const std::vector<Value>& values, const Value& value) {
    return std::find(values.begin(), values.end(), value) != values.end();
}

template <class Value>
std::string joined(const std::vector<Value>& values) {
    std::string list;
    for (const Value& value : values) list += (list.empty() ? "" : ", ") + plain(value);
    return list;
}

// `specified` are values that the spec knows and this library does not serve yet.
template <class Value>
void one_of(const char* name, const Value& value, const std::vector<Value>& allowed,
            const std::vector<Value>& specified = {}) {
    if (is_among(allowed, value)) return;
    const std::string later =
        is_among(specified, value) ? "; " + plain(value) + " is specified but not built yet" : std::string();
    refuse(name, "one of " + joined(allowed), shown(value) + later);
}

void check_model_id(const std::string& model_id) {
    if (model_id.empty()) refuse("model_id", "a non-empty string", "''");
    if (!std::all_of(model_id.begin(), model_id.end(), is_printable)) {
        refuse("model_id", "printable ASCII characters", "others");
    }
}

// Bits of a digit scheme's keys, in quarters, as they are named.
struct Average {
    const char* name;
    int64_t quarters;
};
constexpr Average AVERAGES[] = {{"2", 8}, {"2.25", 9}, {"2.5", 10}, {"3", 12}};
const std::string DIGITS = "digits:";

std::vector<std::string> k_schemes() {
    std::vector<std::string> all{"affine"};
    for (const Average& average : AVERAGES) {
        all.push_back(DIGITS + average.name);
        all.push_back(all.back() + "+token");
    }
    all.insert(all.end(), {"affine+token", "affine+token+rotated"});
    return all;
}

// Throws unless a scheme makes codes of so many bits.
void check_bits(const char* bits_name, int64_t bits, const char* scheme_name, const std::string& scheme,
                const std::vector<int64_t>& allowed) {
    if (is_among(allowed, bits)) return;
    refuse(bits_name, "one of " + joined(allowed) + " with " + scheme_name + " " + scheme, std::to_string(bits));
}

void check_schemes(const RowOptions& row) {
    one_of<std::string>("k_scheme", row.k_scheme, k_schemes());
    one_of<std::string>("v_scheme", row.v_scheme, {"affine", "symmetric+rotated"});
    const bool digits = row.k_scheme.starts_with(DIGITS), affine = row.k_scheme == "affine";
    using Bits = std::vector<int64_t>;
    check_bits("k_bits", row.k_bits, "k_scheme", row.k_scheme,
               digits   ? Bits{2}
               : affine ? Bits{2, 4, 8, 32}
                        : Bits{2, 4});
    check_bits("v_bits", row.v_bits, "v_scheme", row.v_scheme,
               row.has_symmetric_values() ? Bits{2, 3, 4} : Bits{2, 4, 8, 32});
}

// As %g writes it, whatever the locale.
std::string text(double value) {
    char digits[32];
    return {digits, std::to_chars(digits, digits + sizeof digits, value, std::chars_format::general, 6).ptr};
}

}  // namespace

int64_t digits_of(const RowOptions& options, int64_t k_size) {
    const std::string scheme = options.k_scheme.substr(0, options.k_scheme.find('+'));
    for (const Average& average : AVERAGES) {
        if (scheme != DIGITS + average.name) continue;
        const int64_t eighths = k_size * average.quarters, whole = eighths / 8, rest = eighths % 8;
        return whole + (rest > 4 || (rest == 4 && whole % 2 != 0));
    }
    return 0;
}

void check_version(int64_t version) {
    if (version < FIRST_VERSION || version > LAST_VERSION) {
        throw Error(ErrorKind::spec_mismatch, "spec_version: expected 1 or 2, got " + std::to_string(version) +
                                                  "; rewrite the original model with this version of onnx_kivi");
    }
}

void refuse_unknown(const std::string& name, const std::vector<std::string>& known) {
    refuse(("attribute " + name).c_str(), "one of " + joined(known), "an unknown one");
}

void validate(const StepAttributes& attributes) {
    check_version(attributes.spec_version);
    check_model_id(attributes.model_id);
    between("layers", attributes.layers, 1, MAX_LAYERS);
}

void validate(const GhostAttributes& attributes) {
    check_version(attributes.spec_version);
    check_model_id(attributes.model_id);
    between("kv_bytes", attributes.kv_bytes, 0, MAX_KV_BYTES);
}

void validate(const SdpaAttributes& a) {
    check_version(a.spec_version);
    between("slot", a.slot, 0, MAX_SLOT);
    one_of<int64_t>("k_bits", a.row.k_bits, {2, 4, 8, 32});
    one_of<int64_t>("v_bits", a.row.v_bits, {2, 3, 4, 8, 32});
    between("block_tokens", a.row.block_tokens, 1, MAX_BLOCK_TOKENS);
    between("v_group_size", a.row.v_group_size, 0, MAX_V_GROUP_SIZE);
    between("residual_length", a.row.residual_length, 0, MAX_RESIDUAL_LENGTH);
    between("sink_length", a.row.sink_length, 0, MAX_SINK_LENGTH);
    one_of<std::string>("kind", a.row.kind, {"self", "cross"}, {"latent"});
    one_of<int64_t>("is_causal", a.is_causal, {0, 1});
    one_of<int64_t>("nan_to_zero", a.nan_to_zero, {0, 1});
    between("window", a.window, 0, MAX_WINDOW);
    between("window_sinks", a.window_sinks, 0, MAX_SINK_LENGTH);
    one_of<int64_t>("evict", a.evict, {0, 1});
    if (a.evict != 0 && (a.window == 0 || a.row.is_cross())) {
        refuse("evict", "0 without a window over a slot that grows", std::to_string(a.evict));
    }
    if (a.window_sinks > a.row.sink_length || (a.window_sinks > 0 && a.window == 0)) {
        refuse("window_sinks", "at most sink_length, " + std::to_string(a.row.sink_length) + ", and a window",
               std::to_string(a.window_sinks) + " and window " + std::to_string(a.window));
    }
    check_schemes(a.row);
    one_of<std::string>("dense_element", a.row.dense_element, {"float32"}, {"float16"});
    if (!std::isfinite(a.scale)) refuse("scale", "a finite number", text(a.scale));
    if (!(std::isfinite(a.softcap) && a.softcap >= 0)) {
        refuse("softcap", "a finite number >= 0", text(a.softcap));
    }
}

double parse_decimal(const char* name, const std::string& text) {
    const char* const end = text.data() + text.size();
    double value = 0;
    const auto [stopped, error] = std::from_chars(text.data(), end, value);
    const bool spelled = text.find_first_not_of("0123456789.eE+-") == std::string::npos;  // not inf, nor nan
    const std::string digits = text.substr(0, text.find_first_of("eE"));
    const bool vanished = value == 0 && digits.find_first_of("123456789") != std::string::npos;
    if (!spelled || stopped != end || error != std::errc{} || !std::isfinite(value) || vanished) {
        refuse_type(name, "float", quoted(text));
    }
    return value;
}

std::string decimal(double value) {
    char digits[32];
    const auto written = [&](std::chars_format format) {
        return std::string(digits, std::to_chars(digits, digits + sizeof digits, value, format).ptr);
    };
    const std::string scientific = written(std::chars_format::scientific);
    const int exponent = std::atoi(scientific.c_str() + scientific.find('e') + 1);
    if (exponent < -4 || exponent >= 16) return scientific;
    const std::string fixed = written(std::chars_format::fixed);
    return fixed.find('.') == std::string::npos ? fixed + ".0" : fixed;
}

void refuse_type(const char* name, const char* expected, const std::string& got) {
    refuse((std::string("attribute ") + name).c_str(), expected, got);
}

}  // namespace onnx_kivi
