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

// The block, copied first if someone else holds it too.
Block& writable(const Layout& layout, BlockPtr& block, int64_t tokens) {
    if (block && block.use_count() == 1) {
        std::atomic_thread_fence(std::memory_order_acquire);  // the last other holder may have just let go
        return *block;
    }
    auto own = std::make_shared<Block>(layout, ALL_DENSE);
    if (block) copy_tokens(layout, dense_tokens(layout, *block, 0, tokens), dense_tokens(layout, *own, 0, tokens));
    block = std::move(own);
    return *block;
}

}  // namespace

SlotLayout make_slot_layout(const RowOptions& options, int64_t heads, int64_t k_size, int64_t v_size) {
    const SlotShape blocks{narrow(heads),
                           narrow(k_size),
                           narrow(v_size),
                           narrow(options.k_bits),
                           narrow(options.v_bits),
                           narrow(options.block_tokens),
                           narrow(std::min(options.v_group_size, v_size))};
    SlotShape sinks = blocks;
    sinks.k_bits = sinks.v_bits = DENSE_BITS;
    sinks.block_tokens = narrow(std::max<int64_t>(options.sink_length, 1));
    return {make_layout(blocks), make_layout(sinks), options.block_tokens, options.residual_length,
            options.sink_length};
}

int64_t Row::sink_tokens(const SlotLayout& layout) const { return std::min(tokens_, layout.sink_length); }

int64_t Row::residual_tokens(const SlotLayout& layout) const {
    return tokens_ - sink_tokens(layout) - sealed_ * layout.block_tokens;
}

int64_t Row::sealed_after(const SlotLayout& layout, int64_t tokens) const {
    const int64_t after_sinks = tokens - std::min(tokens, layout.sink_length);
    return std::max(sealed_, (after_sinks - layout.residual_length) / layout.block_tokens);
}

void Row::set_block(std::size_t i, BlockPtr block) {
    refs_[i] = block->ref();
    blocks_[i] = std::move(block);
}

std::vector<Row::Undo> Row::append(const SlotLayout& layout, const Kernel& kernel, std::vector<Row>& rows,
                                   const std::vector<DenseTokens>& tokens, Scheduler& scheduler) try {
    std::vector<Undo> undo(rows.size());
    std::vector<Sealing> sealings;
    for (std::size_t r = 0; r < rows.size(); ++r) undo[r] = rows[r].take(layout, tokens[r], sealings);
    seal(layout, kernel, sealings, scheduler);
    for (Sealing& s : sealings) s.row->set_block(s.index, std::move(s.block));
    for (std::size_t r = 0; r < rows.size(); ++r) {
        rows[r].tokens_ += tokens[r].tokens;
        rows[r].sealed_ = rows[r].sealed_after(layout, rows[r].tokens_);
    }
    return undo;
} catch (...) {
    for (Row& row : rows) row.truncate(layout, row.tokens_);
    throw;
}

Row::Undo Row::take(const SlotLayout& layout, const DenseTokens& from, std::vector<Sealing>& sealings) {
    const int64_t size = layout.block_tokens, total = tokens_ + from.tokens;
    const int64_t old_sinks = sink_tokens(layout), to_sinks = std::min(total, layout.sink_length) - old_sinks;
    if (to_sinks > 0) {
        const Block& sinks = writable(layout.sinks, sinks_, old_sinks);
        copy_tokens(layout.sinks, slice(from, 0, to_sinks), dense_tokens(layout.sinks, sinks, old_sinks, to_sinks));
    }

    // Positions from here on count the tokens after the sinks.
    const int64_t begin = tokens_ - old_sinks, end = begin + from.tokens - to_sinks;
    const int64_t sealed = sealed_after(layout, total);
    const auto old_blocks = static_cast<int64_t>(blocks_.size());
    const auto blocks = static_cast<std::size_t>((end + size - 1) / size);
    blocks_.resize(blocks);
    refs_.resize(blocks);
    for (int64_t at = begin; at < end;) {
        const auto i = static_cast<std::size_t>(at / size);
        const int64_t offset = at % size, count = std::min(size - offset, end - at);
        const DenseTokens part = slice(from, to_sinks + at - begin, count);
        if (count == size && at / size < sealed) {
            sealings.push_back({this, i, part, nullptr});
        } else {
            const Block& block = writable(layout.blocks, blocks_[i], offset);
            refs_[i] = block.ref();
            copy_tokens(layout.blocks, part, dense_tokens(layout.blocks, block, offset, count));
        }
        at += count;
    }
    Undo undo{tokens_, sealed_, {}};
    for (int64_t b = sealed_; b < sealed; ++b) {
        const auto i = static_cast<std::size_t>(b);
        if (b < old_blocks) undo.originals.push_back(blocks_[i]);
        if (blocks_[i]) sealings.push_back({this, i, dense_tokens(layout.blocks, *blocks_[i], 0, size), nullptr});
    }
    return undo;
}

void Row::seal(const SlotLayout& layout, const Kernel& kernel, std::vector<Sealing>& sealings, Scheduler& scheduler) {
    const uint32_t least = least_dense(layout.blocks);
    for (Sealing& s : sealings) {
        const BlockPtr& residual = s.row->blocks_[s.index];
        s.block = residual && residual->dense == least ? residual : std::make_shared<Block>(layout.blocks, least);
    }
    std::vector<uint32_t> must_be_dense(sealings.size(), least);
    scheduler.for_each(sealings.size(), [&](std::size_t i) {
        const Sealing& s = sealings[i];
        if (s.block != s.row->blocks_[s.index]) {
            must_be_dense[i] = kernel.encode_block(layout.blocks, least, s.tokens, s.block->memory.data());
        }
    });
    for (std::size_t i = 0; i < sealings.size(); ++i) {
        if (must_be_dense[i] == least) continue;
        sealings[i].block = std::make_shared<Block>(layout.blocks, must_be_dense[i]);
        kernel.encode_block(layout.blocks, must_be_dense[i], sealings[i].tokens, sealings[i].block->memory.data());
    }
}

void Row::undo(const SlotLayout& layout, Undo&& undo) {
    for (std::size_t i = 0; i < undo.originals.size(); ++i) {
        set_block(static_cast<std::size_t>(undo.sealed) + i, std::move(undo.originals[i]));
    }
    sealed_ = undo.sealed;
    truncate(layout, undo.tokens);
}

void Row::truncate(const SlotLayout& layout, int64_t tokens) {
    const int64_t after_sinks = std::max<int64_t>(tokens - layout.sink_length, 0);
    const auto blocks = static_cast<std::size_t>((after_sinks + layout.block_tokens - 1) / layout.block_tokens);
    blocks_.resize(blocks);
    refs_.resize(blocks);
    tokens_ = tokens;
}

void Row::crop(const SlotLayout& layout, const Kernel& kernel, int64_t length) {
    const int64_t after_sinks = std::max<int64_t>(length - layout.sink_length, 0);
    const int64_t whole = after_sinks / layout.block_tokens, rest = after_sinks % layout.block_tokens;
    if (whole < sealed_) {
        sealed_ = whole;
        if (rest > 0) {
            const auto i = static_cast<std::size_t>(whole);
            auto decoded = std::make_shared<Block>(layout.blocks, ALL_DENSE);
            kernel.decode_block(layout.blocks, refs_[i], 0, rest, dense_tokens(layout.blocks, *decoded, 0, rest));
            set_block(i, std::move(decoded));
        }
    }
    truncate(layout, length);
}

RowCache Row::view(const SlotLayout& layout) const {
    const int64_t dense = residual_tokens(layout), tail = dense % layout.block_tokens;
    const auto whole = static_cast<int64_t>(blocks_.size()) - (tail != 0);
    RowCache view{};
    view.sinks = sinks(layout);
    view.blocks = refs_.data();
    view.block_count = whole;
    if (tail) view.residual = dense_tokens(layout.blocks, *blocks_.back(), 0, tail);
    return view;
}

DenseTokens Row::sinks(const SlotLayout& layout) const {
    return sinks_ ? dense_tokens(layout.sinks, *sinks_, 0, sink_tokens(layout)) : DenseTokens{};
}

DenseTokens Row::residual_piece(const SlotLayout& layout, int64_t i) const {
    const int64_t size = layout.block_tokens;
    return dense_tokens(layout.blocks, block(sealed_ + i), 0, std::min(size, residual_tokens(layout) - i * size));
}

int64_t Row::nbytes(const SlotLayout& layout) const {
    const SlotShape& shape = layout.blocks.shape;
    const int64_t token_bytes =
        int64_t{shape.kv_heads} * (shape.k_size + shape.v_size) * static_cast<int64_t>(sizeof(float));
    int64_t bytes = (sink_tokens(layout) + residual_tokens(layout)) * token_bytes;
    for (int64_t i = 0; i < sealed_; ++i) bytes += block(i).memory.bytes();
    return bytes;
}

int64_t Row::quantized_tokens(const SlotLayout& layout) const {
    const uint32_t least = least_dense(layout.blocks);
    const auto encoded = std::count_if(blocks_.begin(), blocks_.begin() + sealed_,
                                       [least](const BlockPtr& block) { return block->dense == least; });
    return encoded * layout.block_tokens;
}

void Row::add_sealed(const SlotLayout& layout, BlockPtr block) {
    refs_.push_back(block->ref());
    blocks_.push_back(std::move(block));
    ++sealed_;
    tokens_ += layout.block_tokens;
}

}  // namespace onnx_kivi
