#include "canonical.hpp"

#include "kernel_choice.hpp"

namespace onnx_kivi {

namespace {

DenseTokens view(const Layout& layout, const TokensState& state) {
    const SlotShape& shape = layout.shape;
    return {
        state.key,   state.value, state.tokens, state.tokens * shape.k_size, shape.k_size, state.tokens * shape.v_size,
        shape.v_size};
}

void append(const SlotLayout& layout, Row& row, const Layout& part, const TokensState& tokens) {
    if (tokens.tokens == 0) return;
    Serial serial;
    std::vector<Row> rows{std::move(row)};
    Row::append(layout, active_kernel(), rows, {view(part, tokens)}, serial);
    row = std::move(rows.front());
}

}  // namespace

void export_sinks(const SlotLayout& layout, const Row& row, const TokensState& to) {
    copy_tokens(layout.sinks, row.sinks(layout), view(layout.sinks, to));
}

void export_residual(const SlotLayout& layout, const Row& row, const TokensState& to) {
    const DenseTokens all = view(layout.blocks, to);
    for (int64_t i = 0, at = 0; i < row.residual_pieces(); ++i) {
        const DenseTokens piece = row.residual_piece(layout, i);
        copy_tokens(layout.blocks, piece, slice(all, at, piece.tokens));
        at += piece.tokens;
    }
}

void export_block(const SlotLayout& layout, const Block& block, const BlockState& to) {
    const DenseTokens dense = view(layout.blocks, {to.key.dense, to.value.dense, layout.block_tokens});
    copy_tokens(layout.blocks, dense_tokens(layout.blocks, block, 0, layout.block_tokens), dense);
    if (!(block.dense & KEY_DENSE)) export_side(layout.blocks, block.ref(), true, to.key.quantized);
    if (!(block.dense & VALUE_DENSE)) export_side(layout.blocks, block.ref(), false, to.value.quantized);
}

Row import_row(const SlotLayout& layout, const TokensState& sinks, const std::vector<BlockState>& blocks,
               const TokensState& residual) {
    Row row;
    append(layout, row, layout.sinks, sinks);
    for (const BlockState& from : blocks) {
        const uint32_t dense =
            (from.key.dense ? KEY_DENSE : NONE_DENSE) | (from.value.dense ? VALUE_DENSE : NONE_DENSE);
        auto block = std::make_shared<Block>(layout.blocks, dense);
        const DenseTokens given = view(layout.blocks, {from.key.dense, from.value.dense, layout.block_tokens});
        copy_tokens(layout.blocks, given, dense_tokens(layout.blocks, *block, 0, layout.block_tokens));
        unsigned char* const data = block->memory.data();
        if (!from.key.dense) import_side(layout.blocks, data, dense, true, from.key.quantized);
        if (!from.value.dense) import_side(layout.blocks, data, dense, false, from.value.quantized);
        row.add_sealed(layout, std::move(block));
    }
    append(layout, row, layout.blocks, residual);
    return row;
}

}  // namespace onnx_kivi
