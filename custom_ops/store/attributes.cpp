#include "attributes.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <initializer_list>

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

void one_of(const char* name, int64_t value, std::initializer_list<int64_t> allowed) {
    std::string list;
    for (const int64_t candidate : allowed) {
        if (candidate == value) return;
        list += (list.empty() ? "" : ", ") + std::to_string(candidate);
    }
    refuse(name, "one of " + list, std::to_string(value));
}

// As %g writes it, whatever the locale.
std::string text(double value) {
    char digits[32];
    return {digits, std::to_chars(digits, digits + sizeof digits, value, std::chars_format::general, 6).ptr};
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
    if (!std::all_of(attributes.model_id.begin(), attributes.model_id.end(), is_printable)) {
        refuse("model_id", "printable ASCII characters", "others");
    }
    between("layers", attributes.layers, 1, MAX_LAYERS);
}

void validate(const SdpaAttributes& a) {
    check_version(a.spec_version);
    between("slot", a.slot, 0, MAX_SLOT);
    one_of("k_bits", a.row.k_bits, {2, 4, 8, 32});
    one_of("v_bits", a.row.v_bits, {2, 4, 8, 32});
    between("block_tokens", a.row.block_tokens, 1, MAX_BLOCK_TOKENS);
    between("v_group_size", a.row.v_group_size, 0, MAX_V_GROUP_SIZE);
    between("residual_length", a.row.residual_length, 0, MAX_RESIDUAL_LENGTH);
    between("sink_length", a.row.sink_length, 0, MAX_SINK_LENGTH);
    if (a.row.kind != "self" && a.row.kind != "cross") refuse("kind", "one of self, cross", quoted(a.row.kind));
    one_of("is_causal", a.is_causal, {0, 1});
    one_of("nan_to_zero", a.nan_to_zero, {0, 1});
    between("window", a.window, 0, MAX_WINDOW);
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

void refuse_type(const char* name, const char* expected, const std::string& got) {
    refuse((std::string("attribute ") + name).c_str(), expected, got);
}

}  // namespace onnx_kivi
