#include "json.hpp"

#include <algorithm>
#include <charconv>

namespace onnx_kivi {

namespace {

constexpr std::size_t MOST_DIGITS = 18;
constexpr std::string_view SHORT = "\"\\bfnrt", MEANT = "\"\\\b\f\n\r\t";
constexpr uint32_t HIGH_SURROGATE = 0xd800, LOW_SURROGATE = 0xdc00, SURROGATES_END = 0xe000, BEYOND_16_BITS = 0x10000;
constexpr uint32_t NOT_UTF8 = UINT32_MAX;

bool is_printable(char c) { return c >= ' ' && c <= '~'; }

// The code point at `at`, which moves behind it.
uint32_t code_point(std::string_view text, std::size_t& at) {
    constexpr uint32_t least[] = {0, 0x80, 0x800, BEYOND_16_BITS};
    const auto first = static_cast<unsigned char>(text[at++]);
    if (first < 0x80) return first;
    const std::size_t more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
    if (first < 0xc0 || first >= 0xf8 || text.size() - at < more) return NOT_UTF8;
    uint32_t point = first & (0x3f >> more);
    for (std::size_t i = 0; i < more; ++i) {
        const auto next = static_cast<unsigned char>(text[at++]);
        if ((next & 0xc0) != 0x80) return NOT_UTF8;
        point = point << 6 | (next & 0x3f);
    }
    const bool is_surrogate = point >= HIGH_SURROGATE && point < SURROGATES_END;
    return point < least[more] || point > 0x10ffff || is_surrogate ? NOT_UTF8 : point;
}

void append_utf8(std::string& text, uint32_t point) {
    const auto tail = [&](int shift) { text += static_cast<char>(0x80 | (point >> shift & 0x3f)); };
    if (point < 0x80) {
        text += static_cast<char>(point);
    } else if (point < 0x800) {
        text += static_cast<char>(0xc0 | point >> 6), tail(0);
    } else if (point < BEYOND_16_BITS) {
        text += static_cast<char>(0xe0 | point >> 12), tail(6), tail(0);
    } else {
        text += static_cast<char>(0xf0 | point >> 18), tail(12), tail(6), tail(0);
    }
}

void append_unit(std::string& text, uint32_t unit) {
    constexpr char digits[] = "0123456789abcdef";
    text += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) text += digits[unit >> shift & 15];
}

void append_escaped(std::string& text, uint32_t point) {
    const std::size_t at = point < 0x80 ? MEANT.find(static_cast<char>(point)) : std::string_view::npos;
    if (at != std::string_view::npos) {
        text += '\\', text += SHORT[at];
    } else if (point < 0x80 && is_printable(static_cast<char>(point))) {
        text += static_cast<char>(point);
    } else if (point < BEYOND_16_BITS) {
        append_unit(text, point);
    } else {
        append_unit(text, HIGH_SURROGATE + ((point - BEYOND_16_BITS) >> 10));
        append_unit(text, LOW_SURROGATE + ((point - BEYOND_16_BITS) & 0x3ff));
    }
}

}  // namespace

void JsonWriter::string(std::string_view text) {
    text_ += '"';
    for (std::size_t at = 0; at < text.size();) {
        const uint32_t point = code_point(text, at);
        if (point == NOT_UTF8) throw_cache_error("expected text in UTF-8, got other bytes");
        append_escaped(text_, point);
    }
    text_ += '"';
}

void JsonWriter::value(const Wire& wire) {
    object([&] {
        for (const auto& [key, held] : wire) {
            name(key);
            std::visit([this](const auto& one) { value(one); }, held);
        }
    });
}

void JsonReader::refuse() const {
    throw_cache_error("expected a header that describes a cache, got another text from its byte " +
                      std::to_string(at_) + " on; it may be damaged");
}

bool JsonReader::takes(std::string_view expected) {
    if (!text_.substr(at_).starts_with(expected)) return false;
    at_ += expected.size();
    return true;
}

void JsonReader::take(char expected) {
    if (!takes({&expected, 1})) refuse();
}

void JsonReader::separate() {
    const char last = text_[at_ - 1];
    if (last != '{' && last != '[') take(',');
}

void JsonReader::name(std::string_view name) {
    separate();
    const std::string expected = "\"" + std::string(name) + "\":";
    if (!takes(expected)) refuse();
}

void JsonReader::value(int64_t& number) {
    const std::string_view left = text_.substr(at_);
    const std::size_t sign = left.starts_with('-') ? 1 : 0;
    const std::size_t end = std::min(left.find_first_not_of("0123456789", sign), left.size());
    if (end == sign || end - sign > MOST_DIGITS) refuse();
    std::from_chars(left.data(), left.data() + end, number);
    at_ += end;
}

void JsonReader::value(std::string& text) {
    take('"');
    while (!takes("\"")) {
        if (at_ == text_.size() || !is_printable(text_[at_])) refuse();
        if (takes("\\")) {
            escaped(text);
        } else {
            text += text_[at_++];
        }
    }
}

void JsonReader::escaped(std::string& text) {
    const std::size_t at = at_ < text_.size() ? SHORT.find(text_[at_]) : std::string_view::npos;
    if (at != std::string_view::npos) {
        text += MEANT[at], ++at_;
        return;
    }
    const uint32_t unit = code_unit();
    if (unit < HIGH_SURROGATE || unit >= SURROGATES_END) return append_utf8(text, unit);
    take('\\');
    const uint32_t second = code_unit();
    if (unit >= LOW_SURROGATE || second < LOW_SURROGATE || second >= SURROGATES_END) refuse();
    append_utf8(text, BEYOND_16_BITS + ((unit - HIGH_SURROGATE) << 10) + (second - LOW_SURROGATE));
}

uint32_t JsonReader::code_unit() {
    take('u');
    const std::string_view digits = text_.substr(at_, 4);
    uint32_t unit = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), unit, 16);
    if (digits.size() != 4 || end != digits.data() + 4) refuse();
    at_ += 4;
    return unit;
}

void JsonReader::value(Wire& wire) {
    take('{');
    while (!takes("}")) {
        separate();
        std::string key;
        value(key);
        if (!std::all_of(key.begin(), key.end(), is_printable)) refuse();
        take(':');
        WireValue& held = wire[key];
        if (text_.substr(at_).starts_with('"')) {
            value(held.emplace<std::string>());
        } else {
            value(held.emplace<int64_t>());
        }
    }
}

void JsonReader::finish() const {
    if (at_ != text_.size()) refuse();
}

}  // namespace onnx_kivi
