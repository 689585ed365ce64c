#include "row.hpp"

#include <algorithm>
#include <atomic>
#include <limits>

namespace onnx_kivi {

namespace {

int32_t narrow(int64_t value) {
    if (value > std::numeric_limits<int32_t>::max()) throw std::bad_alloc();
    return static_cast<int32_t>(value);
}

constexpr uint32_t ALL_DENSE = KEY_DENSE | VALUE_DENSE;

int64_t token_bytes(const SlotLayout& layout) {
    const SlotShape& shape = layout.blocks.shape;
    return int64_t{shape.kv_heads} * (shape.k_size + shape.v_size) * static_cast<int64_t>(sizeof(float));
}

// A dense block with `more` behind the first `held` tokens of `block`, which is null if there are none: the same one
// if nobody else has added to it.
BlockPtr extended(const Layout& layout, const BlockPtr& block, int64_t held, const DenseTokens& more) {
    BlockPtr own = block;
    if (!block || !block->claim(held, more.tokens)) {
        own = std::make_shared<Block>(layout, ALL_DENSE, held + more.tokens);
        if (block) copy_tokens(layout, dense_tokens(layout, *block, 0, held), dense_tokens(layout, *own, 0, held));
    }
    copy_tokens(layout, more, dense_tokens(layout, *own, held, more.tokens));
    return own;
}

}  // namespace

SlotLayout make_slot_layout(const RowOptions& options, int64_t heads, int64_t k_size, int64_t v_size) {
    const SlotShape blocks{narrow(heads),
                           narrow(k_size),
                           narrow(v_size),
                           narrow(options.k_bits),
                           narrow(options.v_bits),
                           narrow(options.block_tokens),
                           narrow(std::min(options.v_group_size, v_size)),
                           narrow(digits_of(options, k_size)),
                           options.has_token_scales(),
                           options.rotates_keys(),
                           options.has_symmetric_values()};
    SlotShape sinks{blocks.kv_heads, blocks.k_size, blocks.v_size, 0, 0, 0, blocks.v_group_size};
    sinks.k_bits = sinks.v_bits = DENSE_BITS;
    sinks.block_tokens = narrow(std::max<int64_t>(options.sink_length, 1));
    return {make_layout(blocks), make_layout(sinks), options.block_tokens, options.residual_length,
            options.sink_length};
}

void Row::List::resize(std::size_t count) {
    blocks.resize(count);
    refs.resize(count);
}

void Row::List::set(std::size_t i, BlockPtr block) {
    refs[i] = block->ref();
    blocks[i] = std::move(block);
}

// A row on its way to the next: its list of blocks is copied once it changes.
class Row::Growth {
public:
    // Takes the tokens that stay dense for now, and lists what is to be sealed.
    Growth(const SlotLayout& layout, const Row& from, const DenseTokens& tokens) : row_(from) {
        const int64_t old_sinks = from.sink_tokens(layout);
        row_.tokens_ += tokens.tokens;
        const int64_t to_sinks = row_.sink_tokens(layout) - old_sinks;
        if (to_sinks > 0) row_.sinks_ = extended(layout.sinks, from.sinks_, old_sinks, slice(tokens, 0, to_sinks));
        const int64_t full = (row_.after_sinks(layout) - layout.residual_length) / layout.block_tokens;
        row_.sealed_ = std::max(from.sealed_, full);
        take(layout, from.after_sinks(layout), slice(tokens, to_sinks, tokens.tokens - to_sinks));
        for (int64_t i = from.sealed_; i < std::min(row_.sealed_, from.held_blocks()); ++i) {
            seal(i, dense_tokens(layout.blocks, row_.block(i), 0, layout.block_tokens));
        }
    }

    // One block to seal, of the residual or straight from the new tokens.
    struct Sealing {
        std::size_t index;
        DenseTokens tokens;
        BlockPtr block;
    };

    std::vector<Sealing> sealings;

    // What holds the tokens so far; null if they come straight from the caller.
    const BlockPtr& source(const Sealing& sealing) const { return row_.list_->blocks[sealing.index]; }

    Row finish() && {
        for (Sealing& sealing : sealings) {
            if (source(sealing) != sealing.block) list().set(sealing.index, std::move(sealing.block));
        }
        return std::move(row_);
    }

private:
    // Positions count the tokens in blocks, which end at `begin` so far.
    void take(const SlotLayout& layout, int64_t begin, const DenseTokens& tokens) {
        const int64_t size = layout.block_tokens, end = begin + tokens.tokens;
        const int64_t blocks = (end + size - 1) / size;
        if (blocks > row_.held_blocks()) list().resize(static_cast<std::size_t>(blocks));
        for (int64_t at = begin; at < end;) {
            const int64_t i = at / size, offset = at % size, count = std::min(size - offset, end - at);
            const DenseTokens part = slice(tokens, at - begin, count);
            at += count;
            if (count == size && i < row_.sealed_) {
                seal(i, part);
                continue;
            }
            const BlockPtr& held = row_.list_->blocks[static_cast<std::size_t>(i)];
            BlockPtr block = extended(layout.blocks, held, offset, part);
            if (block != held) list().set(static_cast<std::size_t>(i), std::move(block));
        }
    }

    void seal(int64_t i, const DenseTokens& tokens) {
        sealings.push_back({static_cast<std::size_t>(i), tokens, nullptr});
    }

    // The list, this row's own.
    List& list() {
        if (!own_) {
            own_ = row_.list_ ? std::make_shared<List>(*row_.list_) : std::make_shared<List>();
            row_.list_ = own_;
        }
        return *own_;
    }

    Row row_;
    std::shared_ptr<List> own_;
};

namespace {

uint32_t encode(const SlotLayout& layout, const Kernel& kernel, uint32_t dense, const DenseTokens& tokens,
                Block& block) {
    thread_local AlignedBuffer scratch;
    scratch.reserve(encode_scratch_bytes(layout.blocks));
    return kernel.encode_block(layout.blocks, dense, tokens, block.memory.data(), scratch.data());
}

// Encodes all blocks that are to be sealed, in parallel.
template <class Growth>
void seal(const SlotLayout& layout, const Kernel& kernel, std::vector<Growth>& growths, Scheduler& scheduler) {
    const uint32_t least = least_dense(layout.blocks);
    struct Work {
        typename Growth::Sealing* sealing;
        uint32_t must_be_dense;
    };
    std::vector<Work> all;
    for (Growth& growth : growths) {
        for (auto& sealing : growth.sealings) {
            const BlockPtr& source = growth.source(sealing);
            if (source && source->dense == least) {
                sealing.block = source;
            } else {
                sealing.block = std::make_shared<Block>(layout.blocks, least, layout.block_tokens);
                all.push_back({&sealing, least});
            }
        }
    }
    scheduler.for_each(all.size(), [&](std::size_t i) {
        const auto& sealing = *all[i].sealing;
        all[i].must_be_dense = encode(layout, kernel, least, sealing.tokens, *sealing.block);
    });
    for (const Work& work : all) {
        if (work.must_be_dense == least) continue;
        auto block = std::make_shared<Block>(layout.blocks, work.must_be_dense, layout.block_tokens);
        encode(layout, kernel, work.must_be_dense, work.sealing->tokens, *block);
        work.sealing->block = std::move(block);
    }
}

}  // namespace

std::vector<Row> Row::append(const SlotLayout& layout, const Kernel& kernel, const std::vector<Row>& rows,
                             const std::vector<DenseTokens>& tokens, Scheduler& scheduler) {
    std::vector<Growth> growths;
    for (std::size_t r = 0; r < rows.size(); ++r) growths.emplace_back(layout, rows[r], tokens[r]);
    seal(layout, kernel, growths, scheduler);
    std::vector<Row> grown;
    for (Growth& growth : growths) grown.push_back(std::move(growth).finish());
    return grown;
}

int64_t Row::sink_tokens(const SlotLayout& layout) const { return std::min(tokens_, layout.sink_length); }

int64_t Row::residual_tokens(const SlotLayout& layout) const {
    return after_sinks(layout) - sealed_ * layout.block_tokens;
}

Row Row::crop(const SlotLayout& layout, const Kernel& kernel, int64_t length) const {
    if (length == 0) return {};
    Row cut = *this;
    cut.tokens_ = length;
    const int64_t held = std::max<int64_t>(cut.after_sinks(layout), 0);
    const int64_t whole = held / layout.block_tokens, rest = held % layout.block_tokens;
    const auto blocks = static_cast<std::size_t>(whole + (rest > 0));
    const bool cuts_sealed = whole < sealed_ && rest > 0;
    cut.sealed_ = std::min(sealed_, whole);
    if (cuts_sealed || static_cast<int64_t>(blocks) < held_blocks()) {
        auto list = std::make_shared<List>(*list_);
        list->resize(blocks);
        if (cuts_sealed) {
            auto decoded = std::make_shared<Block>(layout.blocks, ALL_DENSE, rest);
            const auto last = static_cast<std::size_t>(whole);
            kernel.decode_block(layout.blocks, list->refs[last], 0, rest,
                                dense_tokens(layout.blocks, *decoded, 0, rest));
            list->set(last, std::move(decoded));
        }
        cut.list_ = std::move(list);
    }
    return cut;
}

Row Row::free(const SlotLayout& layout, int64_t window) const {
    const int64_t hidden = tokens_ - window + 1 - sink_tokens(layout) - freed_;
    const int64_t count = window > 0 ? std::min(std::max<int64_t>(hidden, 0) / layout.block_tokens, sealed_) : 0;
    if (count == 0) return *this;
    Row rest = *this;
    auto list = std::make_shared<List>();
    list->blocks.assign(list_->blocks.begin() + count, list_->blocks.end());
    list->refs.assign(list_->refs.begin() + count, list_->refs.end());
    rest.list_ = std::move(list);
    rest.freed_ += count * layout.block_tokens;
    rest.sealed_ -= count;
    return rest;
}

Row Row::with_sealed(const SlotLayout& layout, int64_t freed, std::vector<BlockPtr> blocks) const {
    Row row = *this;
    auto list = std::make_shared<List>();
    for (const BlockPtr& block : blocks) list->refs.push_back(block->ref());
    list->blocks = std::move(blocks);
    row.sealed_ = static_cast<int64_t>(list->blocks.size());
    row.list_ = std::move(list);
    row.freed_ = freed;
    row.tokens_ += freed + row.sealed_ * layout.block_tokens;
    return row;
}

void Row::part() const {
    if (sinks_) sinks_->close();
    if (held_blocks() > sealed_) list_->blocks.back()->close();
}

void Row::reclaim(const SlotLayout& layout) const {
    // Acquires what a holder that has let go wrote.
    const auto is_only_holder = [](const auto& shared) {
        if (shared.use_count() != 1) return false;
        std::atomic_thread_fence(std::memory_order_acquire);
        return true;
    };
    if (sinks_ && is_only_holder(sinks_)) sinks_->reopen(sink_tokens(layout));
    if (held_blocks() == sealed_ || !is_only_holder(list_)) return;
    const int64_t tail = residual_tokens(layout) % layout.block_tokens;
    if (tail > 0 && is_only_holder(list_->blocks.back())) list_->blocks.back()->reopen(tail);
}

RowCache Row::view(const SlotLayout& layout) const {
    const int64_t tail = residual_tokens(layout) % layout.block_tokens;
    RowCache view{};
    view.sinks = sinks(layout);
    view.freed = freed_;
    view.blocks = list_ ? list_->refs.data() : nullptr;
    view.block_count = held_blocks() - (tail != 0);
    if (tail) view.residual = dense_tokens(layout.blocks, *list_->blocks.back(), 0, tail);
    return view;
}

DenseTokens Row::sinks(const SlotLayout& layout) const {
    return sinks_ ? dense_tokens(layout.sinks, *sinks_, 0, sink_tokens(layout)) : DenseTokens{};
}

DenseTokens Row::residual_piece(const SlotLayout& layout, int64_t i) const {
    const int64_t size = layout.block_tokens;
    return dense_tokens(layout.blocks, block(sealed_ + i), 0, std::min(size, residual_tokens(layout) - i * size));
}

int64_t Row::block_nbytes(const SlotLayout& layout, int64_t i) const {
    if (i < sealed_) return block(i).memory.bytes();
    return residual_piece(layout, i - sealed_).tokens * token_bytes(layout);
}

int64_t Row::nbytes(const SlotLayout& layout) const {
    int64_t bytes = sink_tokens(layout) * token_bytes(layout);
    for (int64_t i = 0; i < held_blocks(); ++i) bytes += block_nbytes(layout, i);
    return bytes;
}

int64_t Row::shared_nbytes(const SlotLayout& layout, const Row* next) const {
    int64_t bytes = 0;
    if (sinks_.use_count() > 1 + (next && next->sinks_ == sinks_)) bytes = sink_tokens(layout) * token_bytes(layout);
    const bool same_list = next && next->list_ == list_;
    const bool shares_list = list_.use_count() > 1 + same_list;
    for (int64_t i = 0; i < held_blocks(); ++i) {
        const auto at = static_cast<std::size_t>(i);
        const BlockPtr& block = list_->blocks[at];
        const bool in_next = next && !same_list && i < next->held_blocks() && next->list_->blocks[at] == block;
        if (shares_list || block.use_count() > 1 + in_next) bytes += block_nbytes(layout, i);
    }
    return bytes;
}

int64_t Row::quantized_tokens(const SlotLayout& layout) const {
    const uint32_t least = least_dense(layout.blocks);
    int64_t encoded = 0;
    for (int64_t i = 0; i < sealed_; ++i) encoded += block(i).dense == least;
    return freed_ + encoded * layout.block_tokens;
}

}  // namespace onnx_kivi
