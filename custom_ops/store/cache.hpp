// One cache: what is committed, how it is cut and reordered, and which step is open on it. Rows are values, so every
// change is a new state. The words are those of onnx_kivi/runtime/numpy_backend/caches.py. Nothing here locks; the
// store does.
#pragma once

#include <mutex>
#include <string>

#include "state.hpp"

namespace onnx_kivi {

class Step;

class Cache {
public:
    explicit Cache(int64_t handle, State state) : handle(handle), state(std::move(state)) {}

    [[noreturn]] void refuse(const std::string& what) const;
    // Throws unless the cache is nobody's or this model's.
    void check_model(const StepAttributes& attributes) const;
    // Throws, once, if the last step was left with nodes missing, and all of them have never run.
    void check_nodes();
    // The tokens that each row keeps; zeros for an empty cache. Throws unless they can be kept.
    std::vector<int64_t> kept(const std::vector<int64_t>& past_lengths) const;
    // The state of the first lengths[b] tokens of each row. Throws unless they can be kept.
    State cropped(const std::vector<int64_t>& lengths) const;
    // The same of `length` tokens of each row, of shorter rows all.
    State cropped_to(int64_t length) const;
    State emptied() const;
    // The same rows for another cache.
    State copy() const;
    // The state whose row i is row index[i].
    State select(const std::vector<int64_t>& index) const;

    // Ends the open step, drops what it appended, and goes on with this state.
    void become(State next);
    // The same with the state as it is, and this step.
    void open(std::shared_ptr<Step> next);
    void end_step();
    // Of the step that is open, or was the last to be, on this cache alone; and of the next.
    int64_t ticket() const { return handle << 32 | sequence_; }
    int64_t next_ticket() const { return handle << 32 | (sequence_ + 1); }
    int64_t shared_nbytes() const;

    const int64_t handle;
    State state;
    std::shared_ptr<Step> step;
    bool is_closed = false;
    std::mutex mutex;  // the store's: guards all of this

private:
    void reclaim() const;
    void check_crop(const std::string& what, const std::vector<int64_t>& lengths) const;

    uint32_t sequence_ = 0;
};

using CachePtr = std::shared_ptr<Cache>;

}  // namespace onnx_kivi
