#include "node.hpp"

#include <algorithm>
#include <array>
#include <set>

#include "attend.hpp"
#include "kernel_choice.hpp"

namespace onnx_kivi {

namespace {

std::string text(int64_t value) { return std::to_string(value); }

// What a node works on.
struct Node {
    const std::string where;
    const Step& step;
    const SdpaAttributes& attributes;
    const Held& held;
    const Call& call;

    [[noreturn]] void refuse(const std::string& what) const { throw_cache_error(where + what); }
    bool is_cross() const { return attributes.row.is_cross(); }
    int64_t given() const { return call.key.shape.size() == 4 ? call.key.shape[2] : 0; }
    bool holds(std::size_t row) const { return row < held.rows.size() && held.rows[row]; }
};

using Inputs = std::array<const Tensor*, 5>;

void check_rows_hold(const Node& node) {
    for (std::size_t b = 0; b < static_cast<std::size_t>(node.step.rows.value_or(1)); ++b) {
        const int64_t past = node.step.past_of(b);
        if (!node.is_cross() && past > 0 && !node.holds(b)) {
            node.refuse(": expected " + text(past) + " tokens, as the step, got an empty slot; use a new cache");
        }
    }
    const auto& rows = node.held.rows;
    const bool all_hold = !rows.empty() && std::all_of(rows.begin(), rows.end(), [](const auto& row) { return !!row; });
    if (node.is_cross() && node.call.key.shape.size() == 4 && node.given() == 0 && !all_hold) {
        node.refuse(": expected an encoder's keys and values in the first run, got none; feed them once");
    }
}

// Columns that a mask has beside those of the tokens a node is given: of the longest row, and padded.
int64_t columns(const Node& node) {
    if (!node.is_cross()) return node.step.longest() + node.held.given;
    std::set<int64_t> lengths;
    for (const auto& row : node.held.rows) {
        if (row) lengths.insert(row->tokens());
    }
    if (lengths.size() > 1) {
        node.refuse(": expected an encoder's keys of one length in all rows, got " +
                    list_text({lengths.begin(), lengths.end()}));
    }
    return lengths.empty() ? 0 : *lengths.begin();
}

int64_t known_rows(const Node& node) {
    if (!node.held.rows.empty()) return static_cast<int64_t>(node.held.rows.size());
    if (node.step.rows) return *node.step.rows;
    return node.step.new_lengths.size() > 1 ? static_cast<int64_t>(node.step.new_lengths.size()) : UNBOUND;
}

// Sizes by the spec's letters, once all shapes agree.
Dims check_call(const Node& node) {
    const Call& call = node.call;
    const Inputs inputs{&call.query, &call.key, &call.value, &call.attn_mask, &call.head_sink};
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        if (!inputs[i]->other_type) continue;
        node.refuse(std::string(": ") + sdpa_tensors()[i].name + ": expected float32, got " + inputs[i]->other_type);
    }
    check_rows_hold(node);
    Dims dims;
    dims[P] = columns(node);
    if (node.held.layout) {
        const SlotShape& shape = node.held.layout->blocks.shape;
        dims[HKV] = shape.kv_heads;
        dims[DK] = shape.k_size;
        dims[DV] = shape.v_size;
    }
    dims[B] = known_rows(node);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        check_shape(node.where, sdpa_tensors()[i], inputs[i]->shape, dims);
    }
    if (dims[HQ] % dims[HKV] != 0) {
        node.refuse(": query: expected a multiple of the " + text(dims[HKV]) + " key/value heads, got " +
                    text(dims[HQ]) + " heads");
    }
    return dims;
}

// The last `tokens` of the N that row b is given.
DenseTokens new_tokens(const Call& call, const Dims& dims, int64_t b, int64_t tokens) {
    const int64_t n = dims[N], head = b * dims[HKV];
    const DenseTokens all{call.key.data + head * n * dims[DK],
                          call.value.data + head * n * dims[DV],
                          n,
                          n * dims[DK],
                          dims[DK],
                          n * dims[DV],
                          dims[DV]};
    return slice(all, n - tokens, tokens);
}

// Row b's part of the call; it holds `row`.
RowCall row_call(const Node& node, const SlotLayout& layout, const Dims& dims, std::size_t b, const Row& row) {
    const int64_t queries = node.step.new_of(b, dims[S]), given = dims[N];
    const bool grows = given > 0 && !node.is_cross();
    const int64_t added = grows ? node.step.new_of(b, given) : given;
    if (queries > dims[S] || added > given) {
        throw_cache_error(node.where + ", row " + text(static_cast<int64_t>(b)) + ": new_length: expected at most " +
                          text(dims[S]) + ", the tokens given, got " + text(queries));
    }
    const int64_t first_query = dims[S] - queries;
    return {row.view(layout), new_tokens(node.call, dims, static_cast<int64_t>(b), added), first_query,
            node.step.past_of(b) - first_query, dims[P] + given - row.tokens() - added};
}

}  // namespace

Slot attend_node(const Step& step, const SdpaAttributes& attributes, const Held& held, const Call& call,
                 Scheduler& scheduler) {
    static const Held nothing;
    const bool fills = attributes.row.is_cross() && call.key.shape.size() == 4 && call.key.shape[2] > 0;
    const Node node{"QuantizedKvSdpa, slot " + text(attributes.slot), step, attributes, fills ? nothing : held, call};
    const Dims dims = check_call(node);
    Slot slot{nullptr, node.held.layout, {}};
    if (!slot.layout) {
        slot.layout =
            std::make_shared<const SlotLayout>(make_slot_layout(attributes.row, dims[HKV], dims[DK], dims[DV]));
    }
    std::vector<RowCall> calls;
    std::vector<DenseTokens> tokens;
    for (std::size_t b = 0; b < static_cast<std::size_t>(dims[B]); ++b) {
        slot.rows.push_back(node.holds(b) ? *node.held.rows[b] : Row());
        calls.push_back(row_call(node, *slot.layout, dims, b, slot.rows.back()));
        tokens.push_back(calls.back().added);
    }
    const Kernel& kernel = active_kernel();
    run_attention(attributes, slot.layout->blocks, kernel, dims, calls, call, scheduler);
    if (dims[N] > 0) {
        slot.rows = Row::append(*slot.layout, kernel, slot.rows, tokens, scheduler);
    } else {
        slot.rows.clear();
    }
    return slot;
}

}  // namespace onnx_kivi
