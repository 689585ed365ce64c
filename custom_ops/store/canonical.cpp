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

Row appended(const SlotLayout& layout, const Row& row, const Layout& part, const TokensState& tokens) {
    if (tokens.tokens == 0) return row;
    Serial serial;
    return Row::append(layout, active_kernel(), {row}, {view(part, tokens)}, serial).front();
}

BlockPtr import_block(const SlotLayout& layout, const BlockState& from) {
    const uint32_t dense = (from.key.dense ? KEY_DENSE : NONE_DENSE) | (from.value.dense ? VALUE_DENSE : NONE_DENSE);
    auto block = std::make_shared<Block>(layout.blocks, dense, layout.block_tokens);
    const DenseTokens given = view(layout.blocks, {from.key.dense, from.value.dense, layout.block_tokens});
    copy_tokens(layout.blocks, given, dense_tokens(layout.blocks, *block, 0, layout.block_tokens));
    unsigned char* const data = block->memory.data();
    if (!from.key.dense) import_side(layout.blocks, data, dense, true, from.key.quantized);
    if (!from.value.dense) import_side(layout.blocks, data, dense, false, from.value.quantized);
    return block;
}

}  // namespace

const char* element_name(Element element) {
    return element == Element::float32 ? "float32" : element == Element::float16 ? "float16" : "uint8";
}

int64_t element_bytes(Element element) { return element == Element::float32 ? 4 : element == Element::float16 ? 2 : 1; }

int64_t elements(const Part& part) {
    int64_t count = 1;
    for (const int64_t size : part.shape) count *= size;
    return count;
}

std::vector<Part> side_parts(const SlotLayout& layout, bool key, bool dense) {
    const SlotShape& shape = layout.blocks.shape;
    const Side& side = key ? layout.blocks.key : layout.blocks.value;
    const int64_t heads = shape.kv_heads, tokens = layout.block_tokens, columns = key ? tokens : side.size;
    if (dense) return {{Element::float32, {heads, tokens, side.size}}};
    const auto part = [](Element element, bool present, std::vector<int64_t> sizes) {
        return Part{element, present ? std::move(sizes) : std::vector<int64_t>{0}};
    };
    std::vector<int64_t> parameters{heads, side.params};
    if (!key) parameters.push_back(side.groups);
    return {part(Element::uint8, true, {heads, side.depth, (columns * side.bits + 7) / 8}),
            part(Element::float16, !side.symmetric, parameters),
            part(Element::float16, true, parameters),
            part(Element::uint8, side.digits, {heads, (side.params * 2 + 7) / 8}),
            part(Element::uint8, side.tokens, {heads, tokens}),
            part(Element::float16, side.tokens, {heads})};
}

SideState side_state(const std::vector<void*>& memory, bool dense) {
    if (dense) return {static_cast<float*>(memory[0]), {}};
    const auto bytes = [&](std::size_t i) { return static_cast<unsigned char*>(memory[i]); };
    const auto halves = [&](std::size_t i) { return static_cast<uint16_t*>(memory[i]); };
    return {nullptr, {bytes(0), halves(1), halves(2), bytes(3), bytes(4), halves(5)}};
}

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

Row import_row(const SlotLayout& layout, const TokensState& sinks, int64_t freed, const std::vector<BlockState>& blocks,
               const TokensState& residual) {
    std::vector<BlockPtr> sealed;
    for (const BlockState& block : blocks) sealed.push_back(import_block(layout, block));
    const Row row = appended(layout, Row(), layout.sinks, sinks).with_sealed(layout, freed, std::move(sealed));
    return appended(layout, row, layout.blocks, residual);
}

}  // namespace onnx_kivi
