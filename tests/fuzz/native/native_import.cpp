// Fuzzes the importer: whatever arrays it is given, it refuses them in words, or makes a cache that can be used. The
// arrays are as large as their shapes say and not a byte more.
#include <cmath>

#include "../../../custom_ops/store/canonical.hpp"
#include "../../../custom_ops/store/import.hpp"
#include "../../../custom_ops/store/store.hpp"
#include "input.hpp"

using namespace onnx_kivi;

namespace {

constexpr int64_t MOST_BYTES = 1 << 16;

class Arrays {
public:
    explicit Arrays(fuzz::Input& input) : input_(input) {}

    // Of the given shape as a rule; now and then of one that lies.
    ArrayView make(const std::string& type, std::vector<int64_t> shape) {
        const int64_t lie = input_.below(32);
        if (lie == 0) return {nullptr, "<class 'list'>", {}, false};
        if (lie == 1) shape.push_back(input_.below(3));
        if (lie == 2) shape.pop_back();
        if (lie == 3 && !shape.empty()) shape[static_cast<std::size_t>(input_.byte()) % shape.size()] = input_.below(9);
        const std::string named = lie == 4 ? "float64" : type;
        int64_t bytes = named == "float64" ? 8 : named == "float32" ? 4 : named == "float16" ? 2 : 1;
        for (int64_t& size : shape) {
            if (size < 0 || (size > 0 && bytes > MOST_BYTES / size)) size = 1;
            bytes *= size;
        }
        memory_.push_back(input_.bytes(static_cast<std::size_t>(bytes)));
        if (type == "float16" && input_.byte() % 8 != 0) make_normal(bytes);
        return {memory_.back().get(), named, shape, true};
    }

private:
    // Halves that a quantizer may have written.
    void make_normal(int64_t bytes) {
        for (int64_t i = 1; i < bytes; i += 2) memory_.back()[static_cast<std::size_t>(i)] = 0x3c;
    }

    fuzz::Input& input_;
    std::vector<std::unique_ptr<unsigned char[]>> memory_;
};

struct Sizes {
    int64_t heads, key, value;
};

void set_schemes(fuzz::Input& input, RowOptions& options) {
    const char* const k_schemes[] = {"affine", "affine+token", "affine+token+rotated"};
    const char* const digits[] = {"digits:2", "digits:2.25+token", "digits:2.5+token", "digits:3"};
    if (options.k_bits != DENSE_BITS) options.k_scheme = k_schemes[input.below(3)];
    if (options.k_bits == 2 && input.below(2)) options.k_scheme = digits[input.below(4)];
    if (options.v_bits > 4 || input.below(2)) return;
    options.v_scheme = "symmetric+rotated";
    options.v_bits = 2 + input.below(3);
}

SdpaAttributes attributes_of(fuzz::Input& input, int64_t slot) {
    constexpr int64_t bits[] = {2, 4, 8, 32};
    SdpaAttributes a;
    a.slot = slot;
    a.row.kind = input.below(4) == 0 ? "cross" : "self";
    a.row.k_bits = bits[input.below(4)];
    a.row.v_bits = bits[input.below(4)];
    set_schemes(input, a.row);
    a.row.block_tokens = 1 + input.below(9);
    a.row.v_group_size = input.below(9);
    a.row.residual_length = input.below(5);
    a.row.sink_length = input.below(4);
    a.window = input.below(3) == 0 ? 1 + input.below(20) : 0;
    a.evict = a.window > 0 && !a.row.is_cross();
    a.spec_version = LAST_VERSION;
    return a;
}

// Parts that a scheme may have: shapes, (0) where it has them not.
struct Extras {
    std::vector<int64_t> lo, digits{0}, token{0}, unit{0};
};

SideArrays side_of(fuzz::Input& input, Arrays& arrays, int64_t bits, std::vector<int64_t> dense, int64_t rows,
                   int64_t columns, std::vector<int64_t> parameters, const Extras& extras) {
    SideArrays side;
    side.is_dense = (bits == DENSE_BITS) != (input.below(8) == 0);
    if (side.is_dense) {
        side.dense = arrays.make("float32", std::move(dense));
    } else {
        side.codes = arrays.make("uint8", {dense[0], rows, (columns * bits + 7) / 8});
        side.lo = arrays.make("float16", extras.lo);
        side.scale = arrays.make("float16", parameters);
        side.digits = arrays.make("uint8", extras.digits);
        side.token = arrays.make("uint8", extras.token);
        side.unit = arrays.make("float16", extras.unit);
    }
    return side;
}

RowArrays row_of(fuzz::Input& input, Arrays& arrays, const RowOptions& options, const Sizes& sizes, int64_t sinks,
                 int64_t blocks, int64_t residual) {
    const int64_t freed = input.below(4) ? 0 : input.below(8) ? input.below(5) * options.block_tokens : input.number();
    RowArrays row{arrays.make("float32", {sizes.heads, sinks, sizes.key}),
                  arrays.make("float32", {sizes.heads, sinks, sizes.value}),
                  freed,
                  {},
                  arrays.make("float32", {sizes.heads, residual, sizes.key}),
                  arrays.make("float32", {sizes.heads, residual, sizes.value})};
    const int64_t tokens = options.block_tokens;
    const int64_t group = options.v_group_size ? options.v_group_size : std::max<int64_t>(sizes.value, 1);
    for (int64_t b = 0; b < blocks; ++b) {
        const std::vector<int64_t> k_params{sizes.heads, sizes.key};
        const std::vector<int64_t> v_params{sizes.heads, tokens, (sizes.value + group - 1) / group};
        Extras key{k_params}, value{options.has_symmetric_values() ? std::vector<int64_t>{0} : v_params};
        const int64_t digits = digits_of(options, sizes.key);
        if (digits) key.digits = {sizes.heads, (sizes.key + 3) / 4};
        if (options.has_token_scales()) key.token = {sizes.heads, tokens}, key.unit = {sizes.heads};
        row.blocks.push_back({side_of(input, arrays, options.k_bits, {sizes.heads, tokens, sizes.key},
                                      digits ? digits : sizes.key, tokens, k_params, key),
                              side_of(input, arrays, options.v_bits, {sizes.heads, tokens, sizes.value}, tokens,
                                      sizes.value, v_params, value)});
    }
    return row;
}

StateArrays state_of(fuzz::Input& input, Arrays& arrays) {
    StateArrays state;
    const int64_t slots = input.below(4), rows = input.below(4);
    if (input.below(16) != 0) state.step = StepAttributes{"fuzz", std::max<int64_t>(slots, 1), "", LAST_VERSION};
    const int64_t blocks = input.below(4);
    for (int64_t i = 0; i < slots; ++i) {
        SlotArrays slot{attributes_of(input, input.below(16) ? i : input.number() & 7), {}};
        const Sizes sizes{input.below(4), input.below(20), input.below(20)};
        const int64_t sinks = input.below(16) ? slot.attributes.row.sink_length : input.below(4);
        const int64_t residual = input.below(14);
        for (int64_t r = input.below(16) ? 0 : input.below(2); r < rows; ++r) {
            slot.rows.push_back(row_of(input, arrays, slot.attributes.row, sizes, sinks, blocks, residual));
        }
        state.lengths.clear();
        for (const RowArrays& row : slot.rows) {
            state.lengths.push_back(sinks + residual + blocks * slot.attributes.row.block_tokens +
                                    row.freed % (int64_t{1} << 40));
        }
        state.slots.push_back(std::move(slot));
    }
    if (input.below(16) == 0) state.lengths.push_back(input.number());
    return state;
}

// One run of the model on the cache: a token for each slot, or none for those that are cross.
void run(int64_t handle, const State& state) {
    const int64_t ticket = open_rows({handle}, {COMMITTED_LENGTH}, {ALL_NEW}, *state.step, true).second;
    Serial serial;
    for (const auto& [index, slot] : state.slots) {
        if (slot.rows.empty()) return;
        const SlotShape& shape = slot.layout->blocks.shape;
        const auto rows = static_cast<int64_t>(slot.rows.size());
        const int64_t count = slot.attributes->row.is_cross() ? 0 : 1, heads = shape.kv_heads;
        const std::vector<float> numbers(static_cast<std::size_t>(rows * heads * (shape.k_size + shape.v_size)), 0.5F);
        std::vector<float> output(static_cast<std::size_t>(rows * heads * shape.v_size));
        const Call call{{numbers.data(), {rows, heads, 1, shape.k_size}},
                        {numbers.data(), {rows, heads, count, shape.k_size}},
                        {numbers.data(), {rows, heads, count, shape.v_size}},
                        {nullptr, {0}},
                        {nullptr, {0}},
                        output.data()};
        attend(ticket, *slot.attributes, call, serial);
    }
}

// What is read when a cache is saved.
void export_all(const State& state) {
    for (const auto& [index, slot] : state.slots) {
        if (slot.rows.empty()) continue;
        const SlotShape& shape = slot.layout->blocks.shape;
        for (const Row& row : slot.rows) {
            const int64_t tokens = std::max(row.sink_tokens(*slot.layout), row.residual_tokens(*slot.layout));
            std::vector<float> key(static_cast<std::size_t>(shape.kv_heads * tokens * shape.k_size));
            std::vector<float> value(static_cast<std::size_t>(shape.kv_heads * tokens * shape.v_size));
            export_sinks(*slot.layout, row, {key.data(), value.data(), row.sink_tokens(*slot.layout)});
            export_residual(*slot.layout, row, {key.data(), value.data(), row.residual_tokens(*slot.layout)});
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    Arrays arrays(input);
    const StateArrays state = state_of(input, arrays);
    int64_t handle = 0;
    try {
        handle = new_cache(import_state(state));
    } catch (const Error&) {
        return 0;
    }
    const State held = cache_state(handle);
    if (held.lengths != state.lengths || nbytes(held) < 0) {
        __builtin_trap();
    }
    export_all(held);
    try {
        if (held.step) run(handle, held);
        crop_cache(handle, cache_length(handle) / 2);
        reorder_cache(handle, {0, 0});
        close_cache(gather_rows({{handle, 1}, {handle, 0}}));
    } catch (const Error&) {
    }
    close_cache(handle);
    return 0;
}
