// Attributes by name, as a node carries them: an int, or text. Parsing and writing are loops over their tables.
#pragma once

#include <map>
#include <string>
#include <type_traits>
#include <variant>

#include "attributes.hpp"

namespace onnx_kivi {

using WireValue = std::variant<int64_t, std::string>;
using Wire = std::map<std::string, WireValue>;

template <class Attributes>
Wire to_wire(const Attributes& attributes) {
    Wire wire;
    Attributes::fields(attributes, attributes.spec_version, [&](const char* name, const auto& member) {
        if constexpr (std::is_same_v<decltype(member), const double&>) {
            wire[name] = decimal(member);
        } else {
            wire[name] = member;
        }
    });
    return wire;
}

template <class Value>
const Value& wire_value(const Wire& wire, const char* name, const char* type) {
    const auto found = wire.find(name);
    if (found == wire.end()) refuse_type(name, type, "none");
    const auto* value = std::get_if<Value>(&found->second);
    if (!value) refuse_type(name, type, "another type");
    return *value;
}

// Throws Error(config) for a value that is missing, unknown or outside the spec, Error(spec_mismatch) for another
// version.
template <class Attributes>
Attributes from_wire(const Wire& wire) {
    const bool has_version = wire.contains("spec_version");
    const int64_t version = has_version ? wire_value<int64_t>(wire, "spec_version", "int") : FIRST_VERSION;
    check_version(version);
    const std::vector<std::string> known = field_names<Attributes>(version);
    for (const auto& [name, value] : wire) {
        if (std::find(known.begin(), known.end(), name) == known.end()) refuse_unknown(name, known);
    }
    Attributes attributes;
    Attributes::fields(attributes, version, [&](const char* name, auto& member) {
        using Member = std::remove_reference_t<decltype(member)>;
        if constexpr (std::is_same_v<Member, double>) {
            member = parse_decimal(name, wire_value<std::string>(wire, name, "float"));
        } else {
            member = wire_value<Member>(wire, name, std::is_same_v<Member, int64_t> ? "int" : "string");
        }
    });
    validate(attributes);
    return attributes;
}

}  // namespace onnx_kivi
