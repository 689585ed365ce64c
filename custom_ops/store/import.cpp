#include "import.hpp"

#include <algorithm>

#include "canonical.hpp"
#include "shapes.hpp"

namespace onnx_kivi {

namespace {

using Shape = std::vector<int64_t>;

constexpr const char *FLOAT32 = "float32", *FLOAT16 = "float16", *UINT8 = "uint8";
constexpr uint16_t HALF_INFINITY = 0x7c00, HALF_SMALLEST_NORMAL = 0x0400, HALF_MAGNITUDE = 0x7fff;

std::string text(int64_t value) { return std::to_string(value); }

void check_array(const std::string& where, const ArrayView& array, const Shape& shape, const std::string& type) {
    if (array.is_array && array.shape == shape && array.type == type) return;
    const std::string got = array.is_array ? array.type + " " + tuple_text(array.shape) : array.type;
    throw_cache_error(where + ": expected " + type + " " + tuple_text(shape) + ", got " + got);
}

const Shape& rank_3(const std::string& where, const ArrayView& array) {
    if (!array.is_array || array.shape.size() != 3) {
        const std::string got = array.is_array ? std::to_string(array.shape.size()) : array.type;
        throw_cache_error(where + ": expected arrays of 3 dimensions, got " + got);
    }
    return array.shape;
}

// What the rows of a slot have in common.
struct Sizes {
    int64_t heads, key, value;
};

Sizes sizes_of(const std::string& where, const RowArrays& row) {
    const Shape& key = rank_3(where, row.residual_key);
    const Sizes sizes{key[0], key[2], rank_3(where, row.residual_value)[2]};
    for (const int64_t size : {sizes.heads, sizes.key, sizes.value}) {
        if (1 <= size && size <= MAX_SIZE) continue;
        throw_cache_error(where + ": expected heads and head sizes from 1 to " + text(MAX_SIZE) + ", got " +
                          text(sizes.heads) + ", " + text(sizes.key) + " and " + text(sizes.value));
    }
    return sizes;
}

int64_t count_of(const Shape& shape) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    return count;
}

// Whether all of them are finite and at least `least`, which is not negative.
bool are_at_least(const ArrayView& halves, uint16_t least) {
    const auto* data = static_cast<const uint16_t*>(halves.data);
    return std::all_of(data, data + count_of(halves.shape),
                       [least](uint16_t half) { return least <= half && half < HALF_INFINITY; });
}

bool are_finite(const ArrayView& halves) {
    const auto* data = static_cast<const uint16_t*>(halves.data);
    return std::all_of(data, data + count_of(halves.shape),
                       [](uint16_t half) { return (half & HALF_MAGNITUDE) < HALF_INFINITY; });
}

// Whether nothing is written behind the last code of a row of `count` codes.
bool is_padded_with_zeros(const ArrayView& codes, int64_t count, int64_t bits) {
    const int used = static_cast<int>(count * bits % 8);
    if (used == 0) return true;
    const auto* bytes = static_cast<const unsigned char*>(codes.data);
    const int64_t row = codes.shape.back();
    const int64_t end = count_of(codes.shape);
    for (int64_t last = row - 1; last < end; last += row) {
        if (bytes[last] >> used) return false;
    }
    return true;
}

// What the arrays of a side must be, by its scheme; an absent one has the shape (0).
struct SideShapes {
    Shape dense, codes, lo, scale, digits, token, unit;
};

const Shape ABSENT{0};

int64_t packed(int64_t count, int64_t bits) { return (count * bits + 7) / 8; }

SideShapes key_shapes(const RowOptions& options, const Sizes& sizes) {
    const int64_t tokens = options.block_tokens, digits = digits_of(options, sizes.key);
    const Shape params{sizes.heads, sizes.key};
    const bool scaled = options.has_token_scales();
    return {{sizes.heads, tokens, sizes.key},
            {sizes.heads, digits ? digits : sizes.key, packed(tokens, options.k_bits)},
            params,
            params,
            digits ? Shape{sizes.heads, packed(sizes.key, 2)} : ABSENT,
            scaled ? Shape{sizes.heads, tokens} : ABSENT,
            scaled ? Shape{sizes.heads} : ABSENT};
}

SideShapes value_shapes(const RowOptions& options, const Sizes& sizes) {
    const int64_t tokens = options.block_tokens;
    const int64_t group = options.v_group_size ? options.v_group_size : sizes.value;
    const Shape params{sizes.heads, tokens, (sizes.value + group - 1) / group};
    return {{sizes.heads, tokens, sizes.value},
            {sizes.heads, tokens, packed(sizes.value, options.v_bits)},
            options.has_symmetric_values() ? ABSENT : params,
            params,
            ABSENT,
            ABSENT,
            ABSENT};
}

void check_arrays(const std::string& where, const SideArrays& side, const SideShapes& shapes) {
    check_array(where, side.codes, shapes.codes, UINT8);
    check_array(where, side.lo, shapes.lo, FLOAT16);
    check_array(where, side.scale, shapes.scale, FLOAT16);
    check_array(where, side.digits, shapes.digits, UINT8);
    check_array(where, side.token, shapes.token, UINT8);
    check_array(where, side.unit, shapes.unit, FLOAT16);
}

// Throws unless each head spends `count` digits, and a channel has a scale where it has any.
void check_digits(const std::string& where, const SideArrays& side, int64_t count, int64_t size) {
    const auto* packed_digits = static_cast<const unsigned char*>(side.digits.data);
    const auto* scales = static_cast<const uint16_t*>(side.scale.data);
    const int64_t heads = side.digits.shape[0], row = side.digits.shape[1];
    for (int64_t head = 0; head < heads; ++head) {
        int64_t spent = 0;
        bool fits = true;
        for (int64_t c = 0; c < size; ++c) {
            const int digits = packed_digits[head * row + c / 4] >> c % 4 * 2 & 3;
            const uint16_t scale = scales[head * size + c];
            spent += digits;
            fits = fits && (digits ? scale >= HALF_SMALLEST_NORMAL : scale == 0);
        }
        if (spent == count && fits) continue;
        throw_cache_error(where + ": expected " + text(count) +
                          " digits for each head, and scales of channels that have some, got others");
    }
}

void check_side(const std::string& where, const SideArrays& side, int64_t bits, int64_t count, bool symmetric,
                const SideShapes& shapes) {
    if (side.is_dense) return check_array(where, side.dense, shapes.dense, FLOAT32);
    if (bits == DENSE_BITS) throw_cache_error(where + ": expected f32, as 32 bits say, got codes");
    check_arrays(where, side, shapes);
    const bool digits = shapes.digits != ABSENT;
    const uint16_t least = symmetric || digits ? 0 : HALF_SMALLEST_NORMAL;
    if (!are_finite(side.lo) || !are_at_least(side.scale, least)) {
        throw_cache_error(where + ": expected finite parameters and scales of at least " +
                          (least ? "6.103515625e-05" : "0.0") + ", got others");
    }
    if (!is_padded_with_zeros(side.codes, count, bits) ||
        (digits && !is_padded_with_zeros(side.digits, shapes.scale[1], 2))) {
        throw_cache_error(where + ": expected zeros behind the last code of each row, got others");
    }
    if (digits) check_digits(where, side, shapes.codes[1], shapes.scale[1]);
    const auto* token = static_cast<const unsigned char*>(side.token.data);
    const bool has_zero = std::find(token, token + count_of(side.token.shape), 0) != token + count_of(side.token.shape);
    if (has_zero || !are_at_least(side.unit, HALF_SMALLEST_NORMAL)) {
        throw_cache_error(where +
                          ": expected token scales from 1 on and a unit of at least 6.103515625e-05, got others");
    }
}

void check_block(const std::string& where, const RowOptions& options, const BlockArrays& block, const Sizes& sizes) {
    check_side(where + ", key block", block.key, options.k_bits, options.block_tokens, false,
               key_shapes(options, sizes));
    check_side(where + ", value block", block.value, options.v_bits, sizes.value, options.has_symmetric_values(),
               value_shapes(options, sizes));
}

void check_row(const std::string& where, const RowOptions& options, const RowArrays& row, const Sizes& sizes) {
    const int64_t residual = rank_3(where, row.residual_key)[1], sinks = rank_3(where, row.sink_key)[1];
    check_array(where + ", residual", row.residual_value, {sizes.heads, residual, sizes.value}, FLOAT32);
    check_array(where + ", residual", row.residual_key, {sizes.heads, residual, sizes.key}, FLOAT32);
    check_array(where + ", sinks", row.sink_key, {sizes.heads, sinks, sizes.key}, FLOAT32);
    check_array(where + ", sinks", row.sink_value, {sizes.heads, sinks, sizes.value}, FLOAT32);
    const bool full = sinks == options.sink_length || (row.blocks.empty() && residual == 0 && row.freed == 0);
    const int64_t most = options.residual_length + options.block_tokens;
    if (sinks > options.sink_length || !full || residual >= most) {
        throw_cache_error(where + ": expected " + text(options.sink_length) + " sinks and fewer than " + text(most) +
                          " tokens in the residual, got " + text(sinks) + " and " + text(residual));
    }
    for (const BlockArrays& block : row.blocks) check_block(where, options, block, sizes);
}

int64_t tokens_in_blocks(const RowOptions& options, const RowArrays& row) {
    return row.residual_key.shape[1] + static_cast<int64_t>(row.blocks.size()) * options.block_tokens;
}

// Freed tokens among them: any number of those may be claimed, so that it need not fit an int64_t.
struct RowLength {
    uint64_t wrapped;
    bool is_negative;

    RowLength(const RowOptions& options, const RowArrays& row)
        : wrapped(static_cast<uint64_t>(row.sink_key.shape[1] + tokens_in_blocks(options, row)) +
                  static_cast<uint64_t>(row.freed)),
          is_negative(row.freed < 0 && static_cast<int64_t>(wrapped) < 0) {}

    bool is(int64_t length) const { return wrapped == static_cast<uint64_t>(length); }
    std::string shown() const { return is_negative ? text(static_cast<int64_t>(wrapped)) : std::to_string(wrapped); }
};

void check_freed(const std::string& where, const SdpaAttributes& attributes, const RowArrays& row) {
    if (row.freed == 0) return;
    const RowOptions& options = attributes.row;
    const bool is_hidden = attributes.evict && tokens_in_blocks(options, row) >= attributes.window - 1;
    if (row.freed > 0 && row.freed % options.block_tokens == 0 && is_hidden) return;
    throw_cache_error(where + ": expected freed tokens in whole blocks that the window of " + text(attributes.window) +
                      " hides, got " + text(row.freed) + " of " + RowLength(options, row).shown());
}

void check_slot(const SlotArrays& slot, const std::vector<int64_t>& lengths) {
    const std::string where = "cache state, slot " + text(slot.attributes.slot);
    const RowOptions& options = slot.attributes.row;
    const int64_t longest = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
    if (!slot.rows.empty() && slot.rows.size() != lengths.size()) {
        throw_cache_error(where + ": expected as many rows in each slot, " + std::to_string(lengths.size()) + ", got " +
                          std::to_string(slot.rows.size()));
    }
    if (longest > 0 && !options.is_cross() && slot.rows.empty()) {
        throw_cache_error(where + ": expected " + text(longest) + " tokens, got no rows");
    }
    for (std::size_t b = 0; b < slot.rows.size(); ++b) {
        const RowArrays& row = slot.rows[b];
        check_row(where, options, row, sizes_of(where, slot.rows.front()));
        const RowLength held(options, row);
        if (!options.is_cross() && !held.is(lengths[b])) {
            throw_cache_error(where + ": expected " + text(lengths[b]) + " tokens in the row, got " + held.shown());
        }
        check_freed(where, slot.attributes, row);
    }
}

void check_cache(const StateArrays& state) {
    const auto [least, most] = std::minmax_element(state.lengths.begin(), state.lengths.end());
    const int64_t longest = state.lengths.empty() ? 0 : *most;
    if (!state.lengths.empty() && *least < 0) {
        throw_cache_error("cache state: expected a length >= 0, got " + text(*least));
    }
    if (!state.slots.empty() && !state.step) throw_cache_error("cache state: expected the step's attributes, got none");
    Shape numbers;
    bool grows = false;
    for (const SlotArrays& slot : state.slots) {
        numbers.push_back(slot.attributes.slot);
        grows = grows || (!slot.attributes.row.is_cross() && !slot.rows.empty());
    }
    if (std::adjacent_find(numbers.begin(), numbers.end(), std::greater_equal<>()) != numbers.end()) {
        throw_cache_error("cache state: expected slots in ascending order, each once, got " + list_text(numbers));
    }
    if (longest > 0 && !grows) {
        throw_cache_error("cache state: expected slots that hold the " + text(longest) + " tokens, got none");
    }
}

template <class T>
T* data_of(const ArrayView& array) {
    return static_cast<T*>(const_cast<void*>(array.data));
}

TokensState tokens_state(const ArrayView& key, const ArrayView& value) {
    return {data_of<float>(key), data_of<float>(value), key.shape[1]};
}

SideState side_state(const SideArrays& side) {
    if (side.is_dense) return {data_of<float>(side.dense), {}};
    return {nullptr,
            {data_of<unsigned char>(side.codes), data_of<uint16_t>(side.lo), data_of<uint16_t>(side.scale),
             data_of<unsigned char>(side.digits), data_of<unsigned char>(side.token), data_of<uint16_t>(side.unit)}};
}

Row row_of(const SlotLayout& layout, const RowArrays& row) {
    std::vector<BlockState> blocks;
    for (const BlockArrays& block : row.blocks) blocks.push_back({side_state(block.key), side_state(block.value)});
    return import_row(layout, tokens_state(row.sink_key, row.sink_value), row.freed, blocks,
                      tokens_state(row.residual_key, row.residual_value));
}

}  // namespace

SideArrays side_arrays(const std::vector<ArrayView>& arrays, bool dense) {
    if (dense) return {true, arrays[0], {}, {}, {}, {}, {}, {}};
    return {false, {}, arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5]};
}

State import_state(const StateArrays& state) {
    check_cache(state);
    for (const SlotArrays& slot : state.slots) check_slot(slot, state.lengths);
    State result{state.step, state.lengths, {}};
    for (const SlotArrays& from : state.slots) {
        Slot& slot = result.slots[from.attributes.slot];
        slot.attributes = std::make_shared<const SdpaAttributes>(from.attributes);
        if (from.rows.empty()) continue;
        const Shape &key = from.rows[0].residual_key.shape, &value = from.rows[0].residual_value.shape;
        slot.layout =
            std::make_shared<const SlotLayout>(make_slot_layout(from.attributes.row, key[0], key[2], value[2]));
        for (const RowArrays& row : from.rows) slot.rows.push_back(row_of(*slot.layout, row));
    }
    return result;
}

}  // namespace onnx_kivi
