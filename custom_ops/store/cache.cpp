#include "cache.hpp"

#include <algorithm>

#include "kernel_choice.hpp"
#include "shapes.hpp"
#include "step.hpp"

namespace onnx_kivi {

namespace {

std::string text(int64_t value) { return std::to_string(value); }

std::string model_text(const StepAttributes& step) { return step.model_id + " (" + text(step.layers) + " nodes)"; }

// The fewest tokens, but for 0, to which the row can be cut: all that the window then shows must be held.
int64_t least_crop(const Slot& slot, const Row& row) {
    if (row.freed() == 0) return 0;
    return row.sink_tokens(*slot.layout) + row.freed() + slot.attributes->window - 1;
}

}  // namespace

void Cache::refuse(const std::string& what) const { throw_cache_error("cache " + text(handle) + ": " + what); }

void Cache::check_model(const StepAttributes& attributes) const {
    if (!state.step || *state.step == attributes) return;
    refuse("expected model " + model_text(*state.step) + ", to which it belongs, got " + model_text(attributes) +
           "; use a new cache for each model");
}

void Cache::check_nodes() {
    if (!state.slots.empty() || !step) return;
    const int64_t done = step->missing_after();
    if (done == 0) return;
    const int64_t layers = step->attributes.layers;
    end_step();
    refuse("expected the last run to end, but " + text(done) + " of " + text(layers) +
           " nodes ran; if it was stopped, run again, else rewrite the original model again");
}

std::vector<int64_t> Cache::kept(const std::vector<int64_t>& past_lengths) const {
    std::vector<int64_t> held = state.lengths;
    if (held.empty()) held.assign(past_lengths.size(), 0);
    if (past_lengths.size() != 1 && past_lengths.size() != held.size()) {
        refuse("past_length: expected 1 number or " + text(static_cast<int64_t>(held.size())) +
               ", one for each row, got " + text(static_cast<int64_t>(past_lengths.size())));
    }
    std::vector<int64_t> lengths = held;
    for (std::size_t b = 0; b < held.size(); ++b) {
        const int64_t asked = past_lengths[past_lengths.size() == 1 ? 0 : b];
        if (asked < COMMITTED_LENGTH || asked > held[b]) {
            refuse("past_length: expected " + text(COMMITTED_LENGTH) + " or 0 to " + text(held[b]) +
                   ", the tokens it holds, got " + text(asked));
        }
        if (asked != COMMITTED_LENGTH) lengths[b] = asked;
    }
    check_crop("past_length", lengths);
    return lengths;
}

void Cache::check_crop(const std::string& what, const std::vector<int64_t>& lengths) const {
    for (const auto& [index, slot] : state.slots) {
        if (slot.attributes->row.is_cross()) continue;
        for (std::size_t b = 0; b < std::min(slot.rows.size(), lengths.size()); ++b) {
            const int64_t least = least_crop(slot, slot.rows[b]);
            if (lengths[b] <= 0 || lengths[b] >= std::min(least, state.lengths[b])) continue;
            refuse(what + ": expected 0 or at least " + text(least) + ", as slot " + text(index) +
                   " has freed the tokens that its window of " + text(slot.attributes->window) +
                   " no longer shows, got " + text(lengths[b]) + "; start anew");
        }
    }
}

State Cache::cropped(const std::vector<int64_t>& lengths) const {
    const std::vector<int64_t>& held = state.lengths;
    if (lengths.size() != held.size()) {
        refuse("crop: expected " + text(static_cast<int64_t>(held.size())) + " lengths, one for each row, got " +
               text(static_cast<int64_t>(lengths.size())));
    }
    for (std::size_t b = 0; b < held.size(); ++b) {
        if (lengths[b] < 0 || lengths[b] > held[b]) {
            refuse("crop: expected a length of 0 to " + text(held[b]) + ", the tokens it holds, got " +
                   text(lengths[b]));
        }
    }
    check_crop("crop", lengths);
    State cut = state;
    if (lengths == held) return cut;
    for (auto& [index, slot] : cut.slots) {
        if (slot.attributes->row.is_cross()) continue;
        for (std::size_t b = 0; b < slot.rows.size(); ++b) {
            slot.rows[b] = slot.rows[b].crop(*slot.layout, active_kernel(), lengths[b]);
        }
    }
    cut.lengths = lengths;
    cut.settle();
    return cut;
}

State Cache::cropped_to(int64_t length) const {
    if (length < 0 || length > state.length()) {
        refuse("crop: expected a length of 0 to " + text(state.length()) + ", the tokens it holds, got " +
               text(length));
    }
    std::vector<int64_t> lengths = state.lengths;
    for (int64_t& held : lengths) held = std::min(held, length);
    return cropped(lengths);
}

State Cache::emptied() const {
    State empty{state.step, {}, state.slots};
    for (auto& [index, slot] : empty.slots) slot.rows.clear();
    return empty;
}

State Cache::copy() const {
    for (const auto& [index, slot] : state.slots) {
        for (const Row& row : slot.rows) row.part();
    }
    return state;
}

State Cache::select(const std::vector<int64_t>& index) const {
    const auto rows = static_cast<int64_t>(state.lengths.size());
    const bool known = std::all_of(index.begin(), index.end(), [rows](int64_t i) { return 0 <= i && i < rows; });
    if (index.empty() || !known) {
        refuse(rows > 0 ? "reorder: expected one or more row numbers from 0 to " + text(rows - 1) + ", got " +
                              list_text(index)
                        : "reorder: expected a cache that holds tokens, got an empty one");
    }
    State selected{state.step, {}, {}};
    for (const int64_t i : index) selected.lengths.push_back(state.lengths[static_cast<std::size_t>(i)]);
    for (const auto& [number, slot] : state.slots) {
        Slot& copy = selected.slots[number] = {slot.attributes, slot.layout, {}};
        if (slot.rows.empty()) continue;
        for (const int64_t i : index) {
            copy.rows.push_back(slot.rows[static_cast<std::size_t>(i)]);
            copy.rows.back().part();
        }
    }
    return selected;
}

void Cache::become(State next) {
    end_step();
    state = std::move(next);
    reclaim();
}

void Cache::open(std::shared_ptr<Step> next) {
    end_step();
    reclaim();
    step = std::move(next);
}

void Cache::reclaim() const {
    for (const auto& [index, slot] : state.slots) {
        for (const Row& row : slot.rows) row.reclaim(*slot.layout);
    }
}

void Cache::end_step() {
    step.reset();
    ++sequence_;
}

int64_t Cache::shared_nbytes() const {
    int64_t bytes = 0;
    for (const auto& [index, slot] : state.slots) {
        for (std::size_t b = 0; b < slot.rows.size(); ++b) {
            bytes += slot.rows[b].shared_nbytes(*slot.layout, step ? step->pending_row(*this, index, b) : nullptr);
        }
    }
    return bytes;
}

}  // namespace onnx_kivi
