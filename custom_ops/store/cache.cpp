#include "cache.hpp"

#include <algorithm>
#include <array>
#include <set>
#include <tuple>

#include "attend.hpp"
#include "kernel_choice.hpp"

namespace onnx_kivi {

namespace {

std::string text(int64_t value) { return std::to_string(value); }
std::string text(const std::string& value) { return value; }

std::string model_text(const StepAttributes& step) { return step.model_id + " (" + text(step.layers) + " nodes)"; }

}  // namespace

int64_t Tensor::size() const {
    int64_t product = 1;
    for (const int64_t size : shape) product *= size;
    return product;
}

void Snapshot::roll_back() {
    std::erase_if(slots, [](const auto& entry) { return entry.second.undo && entry.second.undo->created; });
    for (auto& [index, slot] : slots) {
        if (!slot.undo) continue;
        Slot::Undo undo = std::move(*slot.undo);
        slot.undo.reset();
        if (undo.replaced) {
            std::tie(slot.layout, slot.rows) = std::move(*undo.replaced);
        } else {
            for (std::size_t r = 0; r < slot.rows.size(); ++r) {
                slot.rows[r].undo(slot.layout, std::move(undo.appended[r]));
            }
        }
    }
}

std::unique_lock<std::mutex> Cache::lock() const {
    std::unique_lock guard(mutex_);
    if (closed_) refuse("expected an open handle, got one that is closed or was never given out");
    return guard;
}

void Cache::refuse(const std::string& what) const { throw_cache_error("cache " + text(handle_) + ": " + what); }

void Cache::refuse_slot(int64_t slot, const std::string& what) const {
    throw_cache_error("slot " + text(slot) + " of cache " + text(handle_) + ": " + what);
}

void Cache::check_nodes() {
    const bool has_committed = std::any_of(state_.slots.begin(), state_.slots.end(), [](const auto& entry) {
        return !entry.second.undo || !entry.second.undo->created;
    });
    if (has_committed || !step_ || step_->error || step_->nodes_done == 0) return;
    const int64_t done = step_->nodes_done;
    end_step();
    refuse("expected the last run to end, but " + text(done) + " of " + text(state_.step->layers) +
           " nodes ran; if it was stopped, run again, else rewrite the original model again");
}

std::pair<int64_t, int64_t> Cache::open_step(int64_t past_length, const StepAttributes& attributes,
                                             bool has_all_nodes) {
    const auto guard = lock();
    if (state_.step && *state_.step != attributes) {
        refuse("expected model " + model_text(*state_.step) + ", to which it belongs, got " + model_text(attributes) +
               "; use a new cache for each model");
    }
    if (!has_all_nodes) check_nodes();
    const int64_t length = past_length == COMMITTED_LENGTH ? state_.length : past_length;
    if (length < 0 || length > state_.length) {
        refuse("past_length: expected " + text(COMMITTED_LENGTH) + " or 0 to " + text(state_.length) +
               ", the tokens it holds, got " + text(past_length));
    }
    end_step();
    crop_rows(length);
    state_.step = attributes;
    step_ = Step{ticket(), length, {}, 0, {}};
    return {length, step_->ticket};
}

Cache::Step& Cache::current_step(int64_t ticket) {
    if (step_ && step_->ticket == ticket) {
        if (step_->error) refuse("an earlier node of this step failed: " + *step_->error);
        return *step_;
    }
    if (!step_ && ticket == this->ticket() && state_.step) {
        refuse("expected " + text(state_.step->layers) +
               " nodes to take this step's ticket, got one more; rewrite the original model again");
    }
    refuse(
        "expected the ticket of its open step, got a stale one: another run on this handle started, or the cache "
        "was changed, during this run; give each of the runs its own cache");
}

void Cache::attend(int64_t ticket, const SdpaAttributes& attributes, const Call& call, Scheduler& scheduler) {
    const auto guard = lock();
    Step& step = current_step(ticket);
    try {
        run_node(step, attributes, call, scheduler);
    } catch (const std::exception& error) {
        state_.roll_back();
        step.error = error.what();
        throw;
    }
}

const Slot* Cache::find_slot(const SdpaAttributes& attributes) const {
    const auto found = state_.slots.find(attributes.slot);
    if (found == state_.slots.end()) return nullptr;
    const RowOptions& made_with = found->second.attributes.row;
    if (made_with != attributes.row) {
        std::vector<std::string> expected, got;
        RowOptions::fields(made_with, [&](const char*, const auto& value) { expected.push_back(text(value)); });
        RowOptions::fields(attributes.row, [&](const char* name, const auto& value) {
            const std::string& before = expected[got.size()];
            got.push_back(text(value));
            if (got.back() != before) {
                refuse_slot(attributes.slot, std::string(name) + ": expected " + before +
                                                 ", with which it was made, got " + got.back() + "; use a new cache");
            }
        });
    }
    return &found->second;
}

Dims Cache::check_call(const Step& step, const SdpaAttributes& attributes, const Slot* slot, const Call& call) const {
    const std::string where = "QuantizedKvSdpa, slot " + text(attributes.slot);
    const std::array<const Tensor*, 5> inputs{&call.query, &call.key, &call.value, &call.attn_mask, &call.head_sink};
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        if (inputs[i]->other_type) {
            throw_cache_error(where + ": " + sdpa_tensors()[i].name + ": expected float32, got " +
                              inputs[i]->other_type);
        }
    }
    if (!attributes.row.is_cross() && slot == nullptr && step.past_length > 0) {
        throw_cache_error(where + ": expected " + text(step.past_length) +
                          " tokens, as the step, got an empty slot; use a new cache");
    }
    const bool gives_none = call.key.shape.size() == 4 && call.key.shape[2] == 0;
    if (attributes.row.is_cross() && slot == nullptr && gives_none) {
        throw_cache_error(where + ": expected an encoder's keys and values in the first run, got none; feed them once");
    }
    Dims dims;
    dims[P] = 0;
    if (slot != nullptr) {
        const SlotShape& shape = slot->layout.blocks.shape;
        dims[P] = slot->rows.front().tokens();
        dims[B] = static_cast<int64_t>(slot->rows.size());
        dims[HKV] = shape.kv_heads;
        dims[DK] = shape.k_size;
        dims[DV] = shape.v_size;
    }
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        check_shape(where, sdpa_tensors()[i], inputs[i]->shape, dims);
    }
    if (dims[HQ] % dims[HKV] != 0) {
        throw_cache_error(where + ": query: expected a multiple of the " + text(dims[HKV]) + " key/value heads, got " +
                          text(dims[HQ]) + " heads");
    }
    return dims;
}

void Cache::note_append(Step& step, const SdpaAttributes& attributes, const Slot* slot, int64_t new_tokens) const {
    if (new_tokens == 0 || attributes.row.is_cross()) return;
    if (slot != nullptr && slot->undo) {
        refuse_slot(attributes.slot, "expected new tokens once per step, got them twice");
    }
    if (step.new_tokens.value_or(new_tokens) != new_tokens) {
        refuse_slot(attributes.slot, "expected " + text(*step.new_tokens) +
                                         " new tokens, as the step's other slots, got " + text(new_tokens));
    }
    step.new_tokens = new_tokens;
}

void Cache::run_node(Step& step, const SdpaAttributes& attributes, const Call& call, Scheduler& scheduler) {
    const Slot* const known = find_slot(attributes);
    const int64_t given = call.key.shape.size() == 4 ? call.key.shape[2] : 0;
    const bool fresh = known == nullptr || known->rows.empty() || (attributes.row.is_cross() && given > 0);
    const Dims dims = check_call(step, attributes, fresh ? nullptr : known, call);
    note_append(step, attributes, known, dims[N]);

    const Kernel& kernel = active_kernel();
    const SlotLayout layout = fresh ? make_slot_layout(attributes.row, dims[HKV], dims[DK], dims[DV]) : known->layout;
    std::vector<Row> rows(fresh ? static_cast<std::size_t>(dims[B]) : 0);
    const std::vector<DenseTokens> tokens = new_tokens_of(call, dims);
    std::vector<RowCache> views;
    for (const Row& row : fresh ? rows : known->rows) views.push_back(row.view(layout));
    run_attention(attributes, layout.blocks, kernel, dims, step.past_length, views, tokens, call, scheduler);

    if (dims[N] > 0) {
        Slot& slot = state_.slots[attributes.slot];
        std::vector<Row::Undo> undo = Row::append(layout, kernel, fresh ? rows : slot.rows, tokens, scheduler);
        if (!slot.undo) slot.undo = Slot::Undo{known == nullptr, {}, std::move(undo)};
        if (fresh) {
            if (!slot.undo->replaced) slot.undo->replaced = std::pair{slot.layout, std::move(slot.rows)};
            slot.attributes = attributes;
            slot.layout = layout;
            slot.rows = std::move(rows);
        }
    }
    if (++step.nodes_done == state_.step->layers) commit(step);
}

void Cache::commit(Step& step) {
    const int64_t length = step.past_length + step.new_tokens.value_or(0);
    std::set<std::size_t> batches;
    for (const auto& [index, slot] : state_.slots) {
        if (!slot.rows.empty()) batches.insert(slot.rows.size());
        if (slot.attributes.row.is_cross()) continue;
        for (const Row& row : slot.rows) {
            if (row.tokens() != length) {
                refuse_slot(index,
                            "expected " + text(length) + " tokens at the end of the step, got " + text(row.tokens()));
            }
        }
    }
    if (batches.size() > 1) {
        const std::vector<int64_t> counts(batches.begin(), batches.end());
        refuse("expected as many rows in each slot, got " + list_text(counts));
    }
    for (auto& [index, slot] : state_.slots) slot.undo.reset();
    state_.length = length;
    step_.reset();
}

void Cache::end_step() {
    state_.roll_back();
    step_.reset();
    sequence_ += 2;
}

void Cache::crop_rows(int64_t length) {
    if (length == state_.length) return;
    for (auto& [index, slot] : state_.slots) {
        if (slot.attributes.row.is_cross()) continue;
        if (length == 0) slot.rows.clear();
        for (Row& row : slot.rows) row.crop(slot.layout, active_kernel(), length);
    }
    state_.length = length;
}

void Cache::crop(int64_t length) {
    const auto guard = lock();
    if (length < 0 || length > state_.length) {
        refuse("crop: expected a length of 0 to " + text(state_.length) + ", the tokens it holds, got " + text(length));
    }
    end_step();
    crop_rows(length);
}

void Cache::reset() {
    const auto guard = lock();
    end_step();
    for (auto& [index, slot] : state_.slots) slot.rows.clear();
    state_.length = 0;
}

void Cache::reorder(const std::vector<int64_t>& index) {
    const auto guard = lock();
    std::size_t most = 0;
    for (const auto& [number, slot] : state_.slots) {
        most = std::max(most, (slot.undo && slot.undo->replaced ? slot.undo->replaced->second : slot.rows).size());
    }
    const auto rows = static_cast<int64_t>(most);
    const bool known = std::all_of(index.begin(), index.end(), [rows](int64_t i) { return 0 <= i && i < rows; });
    if (index.empty() || !known) {
        refuse(rows > 0 ? "reorder: expected one or more row numbers from 0 to " + text(rows - 1) + ", got " +
                              list_text(index)
                        : "reorder: expected a cache that holds tokens, got an empty one");
    }
    end_step();
    for (auto& [number, slot] : state_.slots) {
        if (slot.rows.empty()) continue;
        std::vector<Row> reordered;
        for (const int64_t i : index) reordered.push_back(slot.rows[static_cast<std::size_t>(i)]);
        slot.rows = std::move(reordered);
    }
}

void Cache::close() {
    const auto guard = lock();
    end_step();
    state_ = {};
    closed_ = true;
}

Snapshot Cache::snapshot() const {
    const auto guard = lock();
    Snapshot copy = state_;
    copy.roll_back();
    return copy;
}

int64_t Cache::length() const {
    const auto guard = lock();
    return state_.length;
}

int64_t sealed_tokens(const Snapshot& snapshot) {
    std::optional<int64_t> least;
    for (const auto& [index, slot] : snapshot.slots) {
        if (std::min(slot.attributes.row.k_bits, slot.attributes.row.v_bits) >= DENSE_BITS) continue;
        if (slot.rows.empty()) least = 0;
        for (const Row& row : slot.rows) {
            const int64_t tokens = row.quantized_tokens(slot.layout);
            least = std::min(least.value_or(tokens), tokens);
        }
    }
    return least.value_or(0);
}

int64_t nbytes(const Snapshot& snapshot) {
    int64_t bytes = 0;
    for (const auto& [index, slot] : snapshot.slots) {
        for (const Row& row : slot.rows) bytes += row.nbytes(slot.layout);
    }
    return bytes;
}

int64_t dense_nbytes(const Snapshot& snapshot) {
    int64_t floats = 0;
    for (const auto& [index, slot] : snapshot.slots) {
        const SlotShape& shape = slot.layout.blocks.shape;
        const int64_t per_token = int64_t{shape.kv_heads} * (shape.k_size + shape.v_size);
        for (const Row& row : slot.rows) floats += row.tokens() * per_token;
    }
    return floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace onnx_kivi
