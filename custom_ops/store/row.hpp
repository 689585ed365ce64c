// One row of one slot: sinks, sealed blocks, dense residual (KIVI, arXiv 2402.02750, section 3).
//
// The tokens after the sinks are cut into blocks from the start: the first `sealed` of them are encoded, those after
// are the residual, dense in the same memory, the last one filled in part. So sealing replaces one pointer, a row
// depends on its tokens only and not on how they were split over calls, and a copy of a row shares all its blocks;
// whoever appends to a shared block copies it first.
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
    // What brings a row back to where it was before its last append.
    struct Undo {
        int64_t tokens = 0;
        int64_t sealed = 0;
        std::vector<BlockPtr> originals;  // of the blocks [sealed, ...) that held tokens and were encoded since
    };

    int64_t tokens() const { return tokens_; }
    int64_t sealed_blocks() const { return sealed_; }
    int64_t sink_tokens(const SlotLayout& layout) const;
    int64_t residual_tokens(const SlotLayout& layout) const;
    const Block& block(int64_t i) const { return *blocks_[static_cast<std::size_t>(i)]; }

    // Appends to each row its tokens (as many for every row), seals what is full; gives the undo of each row.
    static std::vector<Undo> append(const SlotLayout& layout, const Kernel& kernel, std::vector<Row>& rows,
                                    const std::vector<DenseTokens>& tokens, Scheduler& scheduler);
    void undo(const SlotLayout& layout, Undo&& undo);

    // The first `length` tokens; the kept ones of a cut sealed block are decoded and become the residual.
    void crop(const SlotLayout& layout, const Kernel& kernel, int64_t length);

    // For the kernel; valid until the row changes.
    RowCache view(const SlotLayout& layout) const;

    // Views of the dense ends, as they are.
    DenseTokens sinks(const SlotLayout& layout) const;
    // The residual, in pieces of up to block_tokens.
    int64_t residual_pieces() const { return static_cast<int64_t>(blocks_.size()) - sealed_; }
    DenseTokens residual_piece(const SlotLayout& layout, int64_t i) const;

    // Bytes of sealed blocks as held, and of the dense tokens: what they take, not what is set aside for more.
    int64_t nbytes(const SlotLayout& layout) const;
    // Tokens in blocks whose sides of fewer than 32 bits are all encoded.
    int64_t quantized_tokens(const SlotLayout& layout) const;

    // Adds a sealed block to a row without a residual.
    void add_sealed(const SlotLayout& layout, BlockPtr block);

private:
    // A full block to encode: from the residual, or straight from the new tokens.
    struct Sealing {
        Row* row;
        std::size_t index;
        DenseTokens tokens;
        BlockPtr block;
    };

    // Copies new tokens where they stay dense for now, and lists the blocks to seal; the row's counts stand still.
    Undo take(const SlotLayout& layout, const DenseTokens& from, std::vector<Sealing>& sealings);
    static void seal(const SlotLayout& layout, const Kernel& kernel, std::vector<Sealing>& sealings,
                     Scheduler& scheduler);

    int64_t sealed_after(const SlotLayout& layout, int64_t tokens) const;
    void set_block(std::size_t i, BlockPtr block);
    void truncate(const SlotLayout& layout, int64_t tokens);

    BlockPtr sinks_;
    std::vector<BlockPtr> blocks_;
    std::vector<BlockRef> refs_;  // of blocks_, as the kernel wants them
    int64_t sealed_ = 0;
    int64_t tokens_ = 0;
};

}  // namespace onnx_kivi
