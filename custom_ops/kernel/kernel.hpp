// The seam between the block store and the attention kernel.
//
// A slot's sealed blocks live in memory that the store owns and only the kernel understands: `Layout` says how
// large it is, `Kernel` fills and reads it. Every function is pure over the views it is given and allocates
// nothing. The layout is the same on every ISA level, so levels may be mixed on one cache.
//
// Source: KIVI (Liu et al. 2024, arXiv 2402.02750): keys quantized per channel over a block of tokens, values per
// token over groups of channels. Numbers are those of onnx_kivi/runtime/numpy_backend/reference.py: codes bit for bit.
//
// This header is compiled into every per-ISA object: it holds declarations only, no inline code that a linker
// could merge across ISA levels.
#pragma once

#include <cstdint>

namespace onnx_kivi {

constexpr int LINE_BYTES = 64;  // alignment of blocks, of their sections, of scratch and workspace
constexpr int DENSE_BITS = 32;

// What defines the blocks of one slot. bits: 2, 4, 8, 32 (dense), of values also 3; v_group_size 0 = the whole row.
// Schemes, see onnx_kivi/SPEC.md: k_digits of two bits that a block spends on one head's keys, 0 = a code of k_bits for
// each channel; k_token: keys are divided by a scale of their token; k_rotated; v_symmetric: values are rotated, and
// have a scale and no lo.
struct SlotShape {
    int32_t kv_heads;
    int32_t k_size;
    int32_t v_size;
    int32_t k_bits;
    int32_t v_bits;
    int32_t block_tokens;
    int32_t v_group_size;
    int32_t k_digits = 0;
    bool k_token = false;
    bool k_rotated = false;
    bool v_symmetric = false;
};

// One side (keys or values) of a block, for one kv head. Codes form a matrix per group of which the kernel
// computes sum over depth: keys have lanes = tokens, depth = channels, one group; values have lanes = channels of
// a group, depth = tokens. A tile is 16 lanes, a line is 64 bytes: 32 / bits depths of a tile; byte
// 4 * (lane % 16) + depth % 4 of it packs 8 / bits depths that are 4 apart, lowest first. A tile of 3 bits has lines of
// the two lower bits, then lines of the highest. Quantized: codes [group][pair of tiles][line][tile of the pair] (a
// last, odd tile stands alone), then parameters [group][lo, scale][params_padded] float16, without lo where symmetric.
// Dense: f32 [block_tokens][size].
//
// Of keys in digits a depth is a digit of two bits: the lowest of all channels that have one, then the second ones,
// then the third. Behind the parameters two bit planes say how many a channel has, [low, high][params_padded / 16] u16.
// Token scales follow: [lanes] u8, and their unit, float16.
struct Side {
    int32_t size;
    int32_t bits;
    int32_t groups;
    int32_t group_size;    // lanes of a group; the last may hold fewer
    int32_t lanes_padded;  // of one group, multiple of 16; groups are that far apart
    int32_t lanes;         // of all groups: the last one is padded from its own lanes
    int32_t depth;
    int32_t depth_padded;   // multiple of 16
    int32_t params;         // of a group: channels of keys, tokens of values
    int32_t params_padded;  // multiple of 16
    bool digits;
    bool tokens;
    bool rotated;
    bool symmetric;
    int64_t tile_bytes;
    int64_t code_bytes;  // of all groups
    int64_t quantized_bytes;
    int64_t dense_bytes;
};

struct Layout {
    SlotShape shape;
    Side key;
    Side value;
};

// Sides of a block that are kept in f32: all of them at 32 bits, else those that float16 parameters can't hold.
enum DenseSides : uint32_t { NONE_DENSE = 0, KEY_DENSE = 1, VALUE_DENSE = 2 };

Layout make_layout(const SlotShape& shape);
uint32_t least_dense(const Layout& layout);  // the sides that have 32 bits
// Bytes of one sealed block, all kv heads of one row; a multiple of LINE_BYTES. Heads follow each other, keys first.
int64_t block_bytes(const Layout& layout, uint32_t dense);
int64_t encode_scratch_bytes(const Layout& layout);

// How many digits each channel gets of `count`: the largest gains, [3][channels], which fall from digit to digit; of
// equal ones the lower digit, then the lower channel. `order` has room for 3 * channels.
void choose_digits(const float* gains, int32_t channels, int32_t count, int32_t* order, unsigned char* digits);

struct BlockRef {
    const unsigned char* data;  // LINE_BYTES aligned
    uint32_t dense;
};

// f32 tokens of one row, all kv heads; strides in floats, channels contiguous.
struct DenseTokens {
    const float* key;
    const float* value;
    int64_t tokens;
    int64_t key_head_stride;
    int64_t key_token_stride;
    int64_t value_head_stride;
    int64_t value_token_stride;
};

// The cache of one row of one slot; tokens in the order sinks, freed ones, blocks, residual.
struct RowCache {
    DenseTokens sinks;
    int64_t freed;  // tokens that are not held any more, because no query can see them
    const BlockRef* blocks;
    int64_t block_count;
    DenseTokens residual;
};

// What one row brings to a call. A token's place counts from the first of its own row.
struct RowCall {
    RowCache cache;
    DenseTokens added;    // the new tokens, behind those of the cache; may be 0
    int64_t first_query;  // the queries before it are padding: they cost nothing, and their output is left alone
    int64_t position;     // for causal and window: the place of first_query, less first_query
    int64_t mask_column;  // of the row's first token
};

// One call of the op over all rows: attend only, nothing is appended. Strides in floats; channels contiguous.
struct Attention {
    const Layout* layout;
    int64_t rows;
    int64_t q_heads;
    int64_t queries;  // S

    const RowCall* row_calls;  // [rows]

    const float* query;  // (rows, q_heads, queries, k_size)
    int64_t query_row_stride;
    int64_t query_head_stride;
    int64_t query_token_stride;

    const float* mask;       // (rows, q_heads, queries, columns) or null; stride 0 where broadcast
    int64_t mask_stride[4];  // the last is 0 or 1

    const float* head_sink;  // (q_heads) or null

    float* output;  // (rows, q_heads, queries, v_size)
    int64_t output_row_stride;
    int64_t output_head_stride;
    int64_t output_token_stride;

    float scale;
    float softcap;         // 0 = none
    int64_t window;        // 0 = none
    int64_t window_sinks;  // first tokens that are seen beside it
    bool causal;
    bool nan_to_zero;
};

// How one row is cut up: its tasks are (query tile, kv head, token split), those of a query tile and kv head a unit.
struct RowPlan {
    int64_t row;
    int64_t work;
    int64_t query_tiles;
    int64_t token_splits;  // 1 where a task writes the output itself
    int64_t first_task;
    int64_t first_unit;
};

// How one Attention is cut up. Tasks are independent of each other; once all have run, the combines are too.
struct Plan {
    const RowPlan* rows;  // those that have something to do, most work first
    int64_t row_count;
    int64_t tasks;
    int64_t combines;         // one for each unit, or 0 where no row's tokens are split
    int64_t scratch_bytes;    // for each task that runs at a time
    int64_t workspace_bytes;  // shared by all tasks and combines of the call
    int64_t tile_queries;
};

// Pairs of a query and a token that it may see: 0 for a row without either, of which nothing is written.
int64_t row_work(const Attention& attention, int64_t row);

// The plan points into `rows`, which has room for attention.rows.
Plan plan_attention(const Attention& attention, int threads, RowPlan* rows);

// Codes of one block and side in the canonical (file) layout: keys (kv_heads, k_size or digits, ceil(block_tokens *
// bits / 8)), values (kv_heads, block_tokens, ceil(v_size * bits / 8)), packed along the last axis, lowest bits first;
// float16 lo and scale (kv_heads, k_size), (kv_heads, block_tokens, groups); digits of each key channel, packed
// likewise; token scales (kv_heads, block_tokens), and their unit. Null where the scheme has it not. Only for a side
// that is not dense.
struct CanonicalSide {
    unsigned char* codes;
    uint16_t* lo;
    uint16_t* scale;
    unsigned char* digits;
    unsigned char* token;
    uint16_t* unit;
};

int64_t canonical_code_bytes(const Layout& layout, bool key);  // all kv heads
void export_side(const Layout& layout, BlockRef block, bool key, const CanonicalSide& to);
void import_side(const Layout& layout, unsigned char* block, uint32_t dense, bool key, const CanonicalSide& from);

// One ISA level.
struct Kernel {
    const char* name;

    // Encode the block_tokens tokens of one row into `block`, which has block_bytes(layout, dense) bytes; `dense`
    // includes least_dense(layout). Returns the sides that must be dense; if they are not those of `dense`, `block` is
    // unspecified: allocate anew and call again. `scratch`, on a line, has encode_scratch_bytes(layout).
    uint32_t (*encode_block)(const Layout& layout, uint32_t dense, const DenseTokens& tokens, unsigned char* block,
                             void* scratch);

    // Decode tokens [begin, end) of all kv heads to f32, in to.key and to.value (written despite the const).
    void (*decode_block)(const Layout& layout, BlockRef block, int64_t begin, int64_t end, const DenseTokens& to);

    void (*run_task)(const Attention& attention, const Plan& plan, int64_t task, void* scratch, void* workspace);
    void (*run_combine)(const Attention& attention, const Plan& plan, int64_t index, void* workspace);
};

// The levels that this machine can run, best first; null-terminated.
const Kernel* const* available_kernels();
// The level of that name, or null if it is unknown or this machine can't run it.
const Kernel* find_kernel(const char* name);

}  // namespace onnx_kivi
