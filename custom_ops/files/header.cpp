#include "header.hpp"

#include <algorithm>

#include "../store/shapes.hpp"
#include "json.hpp"

namespace onnx_kivi {

namespace {

constexpr int64_t LARGEST_SIZE = int64_t{1} << 32;

// One visit of the fields, sorted by name, both writes them and reads them.

template <class Json, class Row>
void visit_row(Json& json, Row& row, int64_t version) {
    const auto field = [&](const char* name, auto& value) { json.name(name), json.value(value); };
    json.object([&] {
        if (version == 1) field("blocks", row.blocks);
        field("heads", row.heads);
        field("k_head_size", row.k_size);
        if (version == 1) field("residual", row.residual), field("sinks", row.sinks);
        if (version > 1) {
            json.name("segments");
            json.items([&] {
                json.pair("sinks", row.sinks);
                json.pair("freed", row.freed);
                json.pair("sealed", row.blocks);
                json.pair("dense", row.residual);
            });
        }
        field("v_head_size", row.v_size);
    });
}

void visit_attributes(JsonWriter& json, const auto& attributes) { json.value(to_wire(attributes)); }

template <class Attributes>
void visit_attributes(JsonReader& json, Attributes& attributes) {
    Wire wire;
    json.value(wire);
    attributes = from_wire<Attributes>(wire);
}

template <class Json, class AnyHeader>
void visit(Json& json, AnyHeader& header, std::vector<int64_t>& lengths, int64_t version) {
    json.object([&] {
        if (version == 1) {
            json.name("length"), json.value(lengths[0]);
        } else {
            json.name("lengths"), json.list(lengths, [&](int64_t& length) { json.value(length); });
        }
        json.name("slots");
        json.list(header.slots, [&](auto& slot) {
            json.object([&] {
                json.name("attributes"), visit_attributes(json, slot.attributes);
                json.name("rows"), json.list(slot.rows, [&](auto& row) { visit_row(json, row, version); });
            });
        });
        json.name("step"), json.nullable(header.step, [&](auto& step) { visit_attributes(json, step); });
    });
}

// The lengths as a header of that version has them: of version 1 it is one.
std::vector<int64_t> said_lengths(const Header& header, int64_t version) {
    if (version > 1) return header.lengths;
    return {header.lengths.empty() ? 0 : *std::max_element(header.lengths.begin(), header.lengths.end())};
}

// Each row's length, of which version 1 says one.
std::vector<int64_t> row_lengths(const Header& header, int64_t length) {
    std::size_t rows = 0;
    for (const SlotHeader& slot : header.slots) rows = std::max(rows, slot.rows.size());
    if (length > 0 && rows == 0) {
        throw_cache_error("expected rows that hold the " + std::to_string(length) + " tokens, got none");
    }
    return std::vector<int64_t>(rows, length);
}

void check_size(int64_t size) {
    if (size < 0 || size >= LARGEST_SIZE) throw_cache_error("expected a size, got " + std::to_string(size));
}

void check_letters(const std::string& letters) {
    const std::size_t other = letters.find_first_not_of("qd");
    if (other == std::string::npos && letters.size() % 2 == 0) return;
    const std::string got = other == std::string::npos ? std::to_string(letters.size()) + " of them" : "others";
    throw_cache_error("expected blocks of letters q and d, two for each, got " + got);
}

void check_row(const RowHeader& row) {
    for (const int64_t size : {row.sinks, row.freed, row.residual}) check_size(size);
    for (const int64_t size : {row.heads, row.k_size, row.v_size}) {
        if (1 <= size && size <= MAX_SIZE) continue;
        throw_cache_error("expected heads and head sizes from 1 to " + std::to_string(MAX_SIZE) + ", got " +
                          std::to_string(size));
    }
    check_letters(row.blocks);
}

RowHeader row_header(const SlotLayout& layout, const Row& row) {
    const SlotShape& shape = layout.blocks.shape;
    RowHeader header{shape.kv_heads, shape.k_size, shape.v_size, row.sink_tokens(layout), row.freed(), 0, {}};
    header.residual = row.residual_tokens(layout);
    for (int64_t i = 0; i < row.sealed_blocks(); ++i) {
        for (const DenseSides side : {KEY_DENSE, VALUE_DENSE}) header.blocks += row.block(i).dense & side ? 'd' : 'q';
    }
    return header;
}

}  // namespace

Header header_of(const State& state) {
    Header header{state.step, state.lengths, {}};
    for (const auto& [index, from] : state.slots) {
        SlotHeader& slot = header.slots.emplace_back(SlotHeader{*from.attributes, {}});
        for (const Row& row : from.rows) slot.rows.push_back(row_header(*from.layout, row));
    }
    return header;
}

int64_t least_version(const Header& header) {
    const std::vector<int64_t>& lengths = header.lengths;
    int64_t version = header.step ? header.step->spec_version : FIRST_FORMAT;
    if (std::adjacent_find(lengths.begin(), lengths.end(), std::not_equal_to<>()) != lengths.end()) version = 2;
    for (const SlotHeader& slot : header.slots) {
        version = std::max(version, slot.attributes.spec_version);
        for (const RowHeader& row : slot.rows) version = std::max<int64_t>(version, row.freed > 0 ? 2 : 1);
    }
    return version;
}

std::string header_text(const Header& header, int64_t version) {
    JsonWriter json;
    std::vector<int64_t> lengths = said_lengths(header, version);
    visit(json, header, lengths, version);
    return json.text();
}

Header parse_header(std::string_view text, int64_t version) {
    Header header;
    JsonReader json(text);
    std::vector<int64_t> lengths(version == 1 ? 1 : 0);
    try {
        visit(json, header, lengths, version);
    } catch (const Error& error) {
        if (error.kind == ErrorKind::cache) throw;
        throw_cache_error(std::string("expected a header that describes a cache, got ") + error.what() +
                          "; it may be damaged");
    }
    json.finish();
    std::for_each(lengths.begin(), lengths.end(), check_size);
    for (const SlotHeader& slot : header.slots) std::for_each(slot.rows.begin(), slot.rows.end(), check_row);
    header.lengths = version == 1 ? row_lengths(header, lengths[0]) : std::move(lengths);
    if (version != least_version(header) || header_text(header, version) != text) {
        throw_cache_error("expected the header that saving this cache writes, got one that says it otherwise");
    }
    return header;
}

}  // namespace onnx_kivi
