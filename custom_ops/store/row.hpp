// One row of one slot as an immutable value: append, seal, free, crop and measure all give a new value or a number
// (KIVI, arXiv 2402.02750, section 3; onnx_kivi/runtime/numpy_backend/rows.py).
//
// The tokens after the sinks, and after those that a window has freed, are cut into blocks from the start: the first
// `sealed` of them are encoded, those after are the residual, dense in the same memory, the last one filled in part. A
// row depends on its tokens only and not on how they were split over calls. Copies share all blocks, and the list of
// them; a row that grows shares with its past self all but what changed.
#pragma once

#include <vector>

#include "../threads/scheduler.hpp"
#include "attributes.hpp"
#include "block.hpp"

namespace onnx_kivi {

// What one slot's rows have in common.
struct SlotLayout {
    Layout blocks;
    Layout sinks;  // its "block" holds all sink tokens, dense
    int64_t block_tokens;
    int64_t residual_length;
    int64_t sink_length;
};

// Of rows of `heads` kv heads with these options.
KIVI_API SlotLayout make_slot_layout(const RowOptions& options, int64_t heads, int64_t k_size, int64_t v_size);

class KIVI_API Row {
public:
    int64_t tokens() const { return tokens_; }  // freed ones among them
    int64_t freed() const { return freed_; }
    int64_t sealed_blocks() const { return sealed_; }
    int64_t sink_tokens(const SlotLayout& layout) const;
    int64_t residual_tokens(const SlotLayout& layout) const;
    const Block& block(int64_t i) const { return *list_->blocks[static_cast<std::size_t>(i)]; }

    // Each row with its tokens at its end, every full block sealed.
    static std::vector<Row> append(const SlotLayout& layout, const Kernel& kernel, const std::vector<Row>& rows,
                                   const std::vector<DenseTokens>& tokens, Scheduler& scheduler);
    // The first `length` tokens; the kept ones of a cut sealed block are decoded and become the residual.
    Row crop(const SlotLayout& layout, const Kernel& kernel, int64_t length) const;
    // Without the sealed blocks that this window hides from every query to come.
    Row free(const SlotLayout& layout, int64_t window) const;
    // A row that holds nothing but sinks, with freed tokens and sealed blocks behind them.
    Row with_sealed(const SlotLayout& layout, int64_t freed, std::vector<BlockPtr> blocks) const;

    // Makes this row and its copies part: each copies its open blocks when it grows.
    void part() const;
    // Lets this row grow in place again if it has no copies: after a crop, a rollback, or the end of other copies.
    void reclaim(const SlotLayout& layout) const;

    // For the kernel; valid as long as the row is.
    RowCache view(const SlotLayout& layout) const;

    // Views of the dense ends, as they are.
    DenseTokens sinks(const SlotLayout& layout) const;
    // The residual, in pieces of up to block_tokens.
    int64_t residual_pieces() const { return held_blocks() - sealed_; }
    DenseTokens residual_piece(const SlotLayout& layout, int64_t i) const;

    // Bytes of sealed blocks as held, and of the dense tokens: what they take, not what is set aside for more.
    int64_t nbytes(const SlotLayout& layout) const;
    // Of these, the bytes that other rows hold too. `next`, if not null, is this row within an open step.
    int64_t shared_nbytes(const SlotLayout& layout, const Row* next) const;
    // Freed tokens, and those in blocks whose sides of fewer than 32 bits are all encoded.
    int64_t quantized_tokens(const SlotLayout& layout) const;

private:
    struct List {
        std::vector<BlockPtr> blocks;
        std::vector<BlockRef> refs;  // of the blocks, as the kernel wants them

        void resize(std::size_t count);
        void set(std::size_t i, BlockPtr block);
    };
    class Growth;

    int64_t held_blocks() const { return list_ ? static_cast<int64_t>(list_->blocks.size()) : 0; }
    int64_t after_sinks(const SlotLayout& layout) const { return tokens_ - sink_tokens(layout) - freed_; }
    int64_t block_nbytes(const SlotLayout& layout, int64_t i) const;

    BlockPtr sinks_;
    std::shared_ptr<const List> list_;
    int64_t sealed_ = 0;
    int64_t freed_ = 0;
    int64_t tokens_ = 0;
};

}  // namespace onnx_kivi
