#include "step.hpp"

#include <algorithm>
#include <set>

#include "shapes.hpp"

namespace onnx_kivi {

namespace {

std::string text(int64_t value) { return std::to_string(value); }
std::string text(const std::string& value) { return value; }

[[noreturn]] void refuse_in(const Cache& cache, int64_t slot, const std::string& what) {
    throw_cache_error("slot " + text(slot) + " of cache " + text(cache.handle) + ": " + what);
}

void check_options(const Cache& cache, const RowOptions& made, const SdpaAttributes& asked) {
    if (made == asked.row) return;
    std::vector<std::string> expected;
    const auto note = [&](const char*, const auto& value) { expected.push_back(text(value)); };
    RowOptions::fields(made, note);
    RowOptions::scheme_fields(made, note);
    std::size_t field = 0;
    const auto compare = [&](const char* name, const auto& value) {
        const std::string& before = expected[field++];
        if (text(value) == before) return;
        refuse_in(cache, asked.slot,
                  std::string(name) + ": expected " + before + ", with which it was made, got " + text(value) +
                      "; use a new cache");
    };
    RowOptions::fields(asked.row, compare);
    RowOptions::scheme_fields(asked.row, compare);
}

void check_sizes(const Cache& cache, int64_t slot, const SlotLayout& first, const SlotLayout& own) {
    const SlotShape &expected = first.blocks.shape, &got = own.blocks.shape;
    if (expected.kv_heads == got.kv_heads && expected.k_size == got.k_size && expected.v_size == got.v_size) return;
    const auto sizes = [](const SlotShape& s) {
        return text(s.kv_heads) + ", " + text(s.k_size) + " and " + text(s.v_size);
    };
    refuse_in(cache, slot,
              "expected heads and head sizes " + sizes(expected) + ", as the rows before, got " + sizes(got));
}

}  // namespace

int64_t Step::new_of(std::size_t row, int64_t given) const {
    const int64_t own = new_lengths[new_lengths.size() > 1 ? row : 0];
    return own == ALL_NEW ? given : own;
}

int64_t Step::longest() const { return *std::max_element(past.begin(), past.end()); }

void Step::refuse_slot(int64_t slot, const std::string& what) const { refuse_in(*caches[0], slot, what); }

void Step::check_current() const {
    for (const CachePtr& cache : caches) {
        if (cache->step.get() == this) continue;
        cache->refuse(
            "expected the ticket of its open step, got a stale one: another run on this handle started, or the cache "
            "was changed, during this run; give each of the runs its own cache");
    }
    const std::lock_guard lock(mutex_);
    if (error_) caches[0]->refuse("an earlier node of this step failed: " + *error_);
}

Held Step::held(const SdpaAttributes& asked) const {
    const std::lock_guard lock(mutex_);
    if (const auto found = pending_.find(asked.slot); found != pending_.end()) {
        const Slot& slot = found->second;
        check_options(*caches[0], slot.attributes->row, asked);
        return {{slot.rows.begin(), slot.rows.end()}, slot.layout, padded_.value_or(0)};
    }
    Held held;
    for (std::size_t place = 0; place < caches.size(); ++place) {
        const State& state = base(place);
        const auto found = state.slots.find(asked.slot);
        if (found != state.slots.end()) check_options(*caches[place], found->second.attributes->row, asked);
        if (found == state.slots.end() || found->second.rows.empty()) {
            held.rows.resize(held.rows.size() + std::max<std::size_t>(state.lengths.size(), 1));
            continue;
        }
        const Slot& slot = found->second;
        if (!held.layout) held.layout = slot.layout;
        check_sizes(*caches[place], asked.slot, *held.layout, *slot.layout);
        held.rows.insert(held.rows.end(), slot.rows.begin(), slot.rows.end());
    }
    if (!held.layout) held.rows.clear();
    return held;
}

void Step::note(const SdpaAttributes& attributes, int64_t given, Slot after) {
    const std::lock_guard lock(mutex_);
    const int64_t index = attributes.slot;
    const int64_t frees = attributes.evict ? attributes.window : 0;
    const auto [window, is_first] = windows_.try_emplace(index, frees);
    if (!is_first && window->second != frees) window->second.reset();
    if (given > 0) {
        if (!attributes.row.is_cross()) {
            if (pending_.contains(index)) refuse_slot(index, "expected new tokens once per step, got them twice");
            if (padded_.value_or(given) != given) {
                refuse_slot(
                    index, "expected " + text(*padded_) + " new tokens, as the step's other slots, got " + text(given));
            }
            padded_ = given;
        }
        const Slots& known = base(0).slots;
        const auto first = known.find(index);
        after.attributes =
            first == known.end() ? std::make_shared<const SdpaAttributes>(attributes) : first->second.attributes;
        pending_[index] = std::move(after);
    }
    if (++nodes_done_ == this->attributes.layers) commit();
}

std::vector<int64_t> Step::final_lengths() const {
    std::set<int64_t> batches;
    for (const auto& [index, slot] : pending_) batches.insert(static_cast<int64_t>(slot.rows.size()));
    if (rows) batches.insert(*rows);
    if (batches.size() > 1) {
        caches[0]->refuse("expected as many rows in each slot, got " + list_text({batches.begin(), batches.end()}));
    }
    std::vector<int64_t> lengths(batches.empty() ? 0 : static_cast<std::size_t>(*batches.begin()));
    for (std::size_t b = 0; b < lengths.size(); ++b) lengths[b] = past_of(b) + (padded_ ? new_of(b, *padded_) : 0);
    return lengths;
}

bool Step::evicts(const SdpaAttributes& slot) const {
    const auto found = windows_.find(slot.slot);
    return slot.evict && found != windows_.end() && found->second == slot.window;
}

Slots Step::changes(std::size_t place, const std::vector<int64_t>& lengths) {
    Slots changed;
    for (auto& [index, slot] : pending_) {
        Slot& own = changed[index] = {slot.attributes, slot.layout, {}};
        if (caches.size() == 1) {
            own.rows = std::move(slot.rows);
        } else {
            own.rows.push_back(std::move(slot.rows[place]));
        }
    }
    for (const auto& [index, slot] : base(place).slots) changed.try_emplace(index, slot);
    for (auto& [index, slot] : changed) {
        if (slot.attributes->row.is_cross()) continue;
        const bool is_freed = evicts(*slot.attributes);
        for (std::size_t b = 0; b < lengths.size(); ++b) {
            const int64_t tokens = slot.rows.empty() ? 0 : slot.rows[b].tokens();
            if (tokens != lengths[b]) {
                refuse_slot(index,
                            "expected " + text(lengths[b]) + " tokens at the end of the step, got " + text(tokens));
            }
            if (is_freed && tokens > 0) slot.rows[b] = slot.rows[b].free(*slot.layout, slot.attributes->window);
        }
    }
    return changed;
}

void Step::commit() {
    const std::vector<int64_t> lengths = final_lengths();
    std::vector<Slots> changed;
    std::vector<std::vector<int64_t>> own;
    for (std::size_t place = 0; place < caches.size(); ++place) {
        own.push_back(caches.size() == 1 ? lengths : std::vector<int64_t>{lengths.at(place)});
        changed.push_back(changes(place, own.back()));
    }
    for (std::size_t place = 0; place < caches.size(); ++place) {
        Cache& cache = *caches[place];
        cache.state = {attributes, std::move(own[place]), std::move(changed[place])};
        cache.step.reset();
    }
}

void Step::fail(const std::string& error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = error;
    pending_.clear();
}

int64_t Step::missing_after() const {
    const std::lock_guard lock(mutex_);
    return error_ ? 0 : nodes_done_;
}

const Row* Step::pending_row(const Cache& cache, int64_t slot, std::size_t b) const {
    const std::lock_guard lock(mutex_);
    const auto found = pending_.find(slot);
    if (found == pending_.end()) return nullptr;
    if (caches.size() > 1) {
        while (b < caches.size() && caches[b].get() != &cache) ++b;
    }
    return b < found->second.rows.size() ? &found->second.rows[b] : nullptr;
}

}  // namespace onnx_kivi
