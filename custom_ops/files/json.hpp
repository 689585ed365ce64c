// JSON of one spelling: fields in the order in which they are visited, no spaces, whole numbers, text in ASCII, others
// escaped as Python's json does. A JsonWriter writes what it is shown; a JsonReader, shown the same fields, reads them.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../store/wire.hpp"

namespace onnx_kivi {

class JsonWriter {
public:
    template <class Body>
    void object(Body&& body) {
        text_ += '{';
        body();
        text_ += '}';
    }

    template <class Items, class Body>
    void list(Items& items, Body&& body) {
        text_ += '[';
        for (auto& item : items) separate(), body(item);
        text_ += ']';
    }

    template <class Value, class Body>
    void nullable(const std::optional<Value>& value, Body&& body) {
        if (value) {
            body(*value);
        } else {
            text_ += "null";
        }
    }

    template <class Body>
    void items(Body&& body) {
        text_ += '[';
        body();
        text_ += ']';
    }

    // An item that is a list of two values; left out where the second is none.
    template <class Value>
    void pair(const char* tag, const Value& value) {
        if (value == Value()) return;
        separate();
        text_ += std::string("[\"") + tag + "\",";
        this->value(value);
        text_ += ']';
    }

    void name(std::string_view name) { separate(), string(name), text_ += ':'; }
    void value(int64_t number) { text_ += std::to_string(number); }
    void value(const std::string& text) { string(text); }
    void value(const Wire& wire);

    const std::string& text() const { return text_; }

private:
    void separate() {
        const char last = text_.back();
        if (last != '{' && last != '[') text_ += ',';
    }
    void string(std::string_view text);

    std::string text_;
};

// Throws Error(cache) for anything else than a JsonWriter writes.
class JsonReader {
public:
    explicit JsonReader(std::string_view text) : text_(text) {}

    template <class Body>
    void object(Body&& body) {
        take('{');
        body();
        take('}');
    }

    template <class Item, class Body>
    void list(std::vector<Item>& items, Body&& body) {
        take('[');
        while (!takes("]")) {
            separate();
            body(items.emplace_back());
        }
    }

    template <class Body>
    void items(Body&& body) {
        take('[');
        body();
        take(']');
    }

    template <class Value, class Body>
    void nullable(std::optional<Value>& value, Body&& body) {
        if (!takes("null")) body(value.emplace());
    }

    template <class Value>
    void pair(const char* tag, Value& value) {
        const std::string begin = std::string(text_[at_ - 1] == '[' ? "" : ",") + "[\"" + tag + "\",";
        if (!takes(begin)) return;
        this->value(value);
        take(']');
    }

    void name(std::string_view name);
    void value(int64_t& number);
    void value(std::string& text);
    void value(Wire& wire);

    void finish() const;

private:
    [[noreturn]] void refuse() const;
    void take(char expected);
    bool takes(std::string_view expected);
    void separate();
    uint32_t code_unit();
    void escaped(std::string& text);

    std::string_view text_;
    std::size_t at_ = 0;
};

}  // namespace onnx_kivi
