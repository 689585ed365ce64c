// One cache: the slots of one model, and the step that is open on it.
//
// A step appends in place and keeps what undoes it, exactly, until the last of the model's nodes has run. The
// semantics (tickets, commit, poison, supersede) and the error texts are those of
// onnx_kivi/runtime/numpy_backend/steps.py.
// Every method locks the cache for as long as it runs.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "attributes.hpp"
#include "row.hpp"
#include "shapes.hpp"

namespace onnx_kivi {

// A tensor as a host hands it over: contiguous f32, or `other_type` names what it is instead.
struct Tensor {
    const float* data = nullptr;
    std::vector<int64_t> shape;
    const char* other_type = nullptr;

    int64_t size() const;
};

// The inputs of one QuantizedKvSdpa node, and its output, (B, Hq, S, Dv).
struct Call {
    Tensor query, key, value, attn_mask, head_sink;
    float* output = nullptr;
};

struct Slot {
    // What brings the slot back to where the open step found it.
    struct Undo {
        bool created = false;                                             // by this step: erase it
        std::optional<std::pair<SlotLayout, std::vector<Row>>> replaced;  // all rows were: put these back
        std::vector<Row::Undo> appended;                                  // else: what undoes each row
    };

    SdpaAttributes attributes;  // of the node that made it
    SlotLayout layout{};        // holds once there are rows
    std::vector<Row> rows;
    std::optional<Undo> undo;  // set when the open step changed it

    int64_t tokens() const { return rows.empty() ? 0 : rows.front().tokens(); }
};

using Slots = std::map<int64_t, Slot>;

// A consistent copy of a cache; blocks are shared, never copied.
struct Snapshot {
    std::optional<StepAttributes> step;
    int64_t length = 0;
    Slots slots;

    void roll_back();  // what the open step did to the slots
};

class Cache {
public:
    explicit Cache(int64_t handle, Snapshot state = {}) : handle_(handle), state_(std::move(state)) {}

    // (P, ticket). `has_all_nodes`: the host knows that the model has as many nodes as it says, so that a step of which
    // some never ran was stopped. Throws Error(cache), as every method does on a closed cache.
    std::pair<int64_t, int64_t> open_step(int64_t past_length, const StepAttributes& attributes, bool has_all_nodes);
    // The whole op: attends, appends, seals. Throws Error(cache), and poisons the step unless the ticket is stale.
    void attend(int64_t ticket, const SdpaAttributes& attributes, const Call& call, Scheduler& scheduler);

    void crop(int64_t length);
    void reset();
    void reorder(const std::vector<int64_t>& index);
    void close();

    // What is committed, whatever step is open.
    Snapshot snapshot() const;
    int64_t length() const;

private:
    struct Step {
        int64_t ticket;
        int64_t past_length;
        std::optional<int64_t> new_tokens;
        int64_t nodes_done = 0;
        std::optional<std::string> error;
    };

    std::unique_lock<std::mutex> lock() const;
    [[noreturn]] void refuse(const std::string& what) const;
    [[noreturn]] void refuse_slot(int64_t slot, const std::string& what) const;
    int64_t ticket() const { return handle_ << 32 | sequence_; }
    Step& current_step(int64_t ticket);
    void check_nodes();
    void run_node(Step& step, const SdpaAttributes& attributes, const Call& call, Scheduler& scheduler);
    const Slot* find_slot(const SdpaAttributes& attributes) const;
    Dims check_call(const Step& step, const SdpaAttributes& attributes, const Slot* slot, const Call& call) const;
    void note_append(Step& step, const SdpaAttributes& attributes, const Slot* slot, int64_t new_tokens) const;
    void commit(Step& step);
    void end_step();
    void crop_rows(int64_t length);

    mutable std::mutex mutex_;
    const int64_t handle_;
    bool closed_ = false;
    uint32_t sequence_ = 0;
    Snapshot state_;
    std::optional<Step> step_;
};

// Sums over a snapshot: see onnx_kivi/runtime/backend.py.
KIVI_API int64_t sealed_tokens(const Snapshot& snapshot);
KIVI_API int64_t nbytes(const Snapshot& snapshot);
KIVI_API int64_t dense_nbytes(const Snapshot& snapshot);

}  // namespace onnx_kivi
