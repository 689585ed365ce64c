// Rows to and from the canonical layout, in which files hold caches and backends exchange them: see `QuantizedBlock`,
// `BlockState` and `RowState` in onnx_kivi/runtime/backend.py.
#pragma once

#include <vector>

#include "row.hpp"

namespace onnx_kivi {

// One side of a sealed block: `dense`, f32 (Hkv, block_tokens, D), or if that is null packed codes and parameters.
struct SideState {
    float* dense = nullptr;
    CanonicalSide quantized{};
};

struct BlockState {
    SideState key, value;
};

// An array of the canonical layout.
enum class Element { float32, float16, uint8 };

struct Part {
    Element element;
    std::vector<int64_t> shape;
};

int64_t elements(const Part& part);
const char* element_name(Element element);  // as NumPy calls it
int64_t element_bytes(Element element);

// The arrays of one side of a block, in the order of files: one if it is dense, else those of CanonicalSide, empty
// where its scheme has them not.
KIVI_API std::vector<Part> side_parts(const SlotLayout& layout, bool key, bool dense);
// A side whose parts have this memory, null for an empty one.
KIVI_API SideState side_state(const std::vector<void*>& memory, bool dense);

// Dense tokens of a row: f32 (Hkv, tokens, D) each.
struct TokensState {
    float* key = nullptr;
    float* value = nullptr;
    int64_t tokens = 0;
};

KIVI_API void export_sinks(const SlotLayout& layout, const Row& row, const TokensState& to);
KIVI_API void export_block(const SlotLayout& layout, const Block& block, const BlockState& to);
KIVI_API void export_residual(const SlotLayout& layout, const Row& row, const TokensState& to);

// A row of this content, which import.cpp has found consistent.
Row import_row(const SlotLayout& layout, const TokensState& sinks, int64_t freed, const std::vector<BlockState>& blocks,
               const TokensState& residual);

}  // namespace onnx_kivi
