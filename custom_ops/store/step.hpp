// The step that is open on one cache or several: what its nodes have appended, commit, poison, supersede.
//
// A step begins with the rows that past_length keeps, and collects new ones beside them; the committed ones are
// replaced all at once when the last of the model's nodes has run: so a rollback is to forget the step. It covers all
// rows of its caches, in order, and is stale as soon as any of them has gone on without it. The words are those of
// onnx_kivi/runtime/numpy_backend/steps.py. The store locks the caches; what the nodes change of a step has a lock of
// its own, taken after theirs.
#pragma once

#include <string>

#include "cache.hpp"

namespace onnx_kivi {

// A slot's rows as they stand within a step, none for one that holds nothing; no rows at all if none does.
struct Held {
    std::vector<std::optional<Row>> rows;
    std::shared_ptr<const SlotLayout> layout;  // set where there are rows
    int64_t given = 0;                         // new tokens that this step gave the slot before, as its nodes get them
};

class Step {
public:
    // cut: what each cache holds for this step, where past_length keeps less than all. rows: none where nobody knows
    // how many an empty cache will have. past: tokens of each row, {0} for an empty cache. new_lengths: of each row, or
    // one number for all; ALL_NEW = all that a node is given.
    Step(int64_t ticket, std::vector<CachePtr> caches, std::vector<std::optional<State>> cut,
         const StepAttributes& attributes, std::optional<int64_t> rows, std::vector<int64_t> past,
         std::vector<int64_t> new_lengths)
        : ticket(ticket),
          caches(std::move(caches)),
          attributes(attributes),
          rows(rows),
          past(std::move(past)),
          new_lengths(std::move(new_lengths)),
          cut_(std::move(cut)) {}

    int64_t past_of(std::size_t row) const { return past[past.size() > 1 ? row : 0]; }
    int64_t new_of(std::size_t row, int64_t given) const;
    int64_t longest() const;

    // All that follows throws Error(cache); the caches are locked.

    // Throws unless this is the open step of all its caches, and has not failed.
    void check_current() const;
    // Throws if the slot was made with other options.
    Held held(const SdpaAttributes& asked) const;
    // Notes that a node has run, and what it leaves in its slot if it was given tokens. The last node commits.
    void note(const SdpaAttributes& attributes, int64_t given, Slot after);

    // What follows needs no locked caches.

    // Poisons the step with the first error.
    void fail(const std::string& error);
    // How many nodes have run of a step that has not failed.
    int64_t missing_after() const;
    // Row b of a cache's slot as this step will leave it; null if it hasn't changed it.
    const Row* pending_row(const Cache& cache, int64_t slot, std::size_t b) const;

    const int64_t ticket;
    const std::vector<CachePtr> caches;
    const StepAttributes attributes;
    const std::optional<int64_t> rows;
    const std::vector<int64_t> past, new_lengths;

private:
    // What the cache at `place` holds for this step.
    const State& base(std::size_t place) const { return cut_[place] ? *cut_[place] : caches[place]->state; }
    void commit();
    std::vector<int64_t> final_lengths() const;
    // What changes of the cache at `place` of the step.
    Slots changes(std::size_t place, const std::vector<int64_t>& lengths);
    // Whether the slot drops what its window hides: all its nodes have that window, and evict.
    bool evicts(const SdpaAttributes& slot) const;
    [[noreturn]] void refuse_slot(int64_t slot, const std::string& what) const;

    const std::vector<std::optional<State>> cut_;
    mutable std::mutex mutex_;
    Slots pending_;
    std::map<int64_t, std::optional<int64_t>> windows_;  // that the nodes of a slot evict by; none where they differ
    std::optional<int64_t> padded_;                      // the most new tokens of a row, as the nodes get them
    int64_t nodes_done_ = 0;
    std::optional<std::string> error_;
};

}  // namespace onnx_kivi
