// The attention tasks: query rows that share a kv head, over a range of the head's tokens, tile by tile
// (scores, softmax, values), and the combination of split ranges.
#pragma once

#include "dense.hpp"
#include "quantized.hpp"
#include "rotate.hpp"
#include "softmax.hpp"

namespace onnx_kivi::KIVI_ISA {

// Tokens [first, first + tokens) of one kv head: a sealed block, or up to PANEL_TOKENS dense ones.
struct Tile {
    int64_t first;
    int64_t tokens;
    const BlockRef* block;  // null: all dense
    const BlockRef* next;   // the block to prefetch meanwhile
    const float* key;       // where keys are dense
    const float* value;     // where values are dense
    int64_t key_stride;
    int64_t value_stride;
};

struct Task {
    const Attention& attention;
    const Layout& layout;
    const RowPlan& plan;
    const RowCall& call;
    int64_t head;     // kv head
    int64_t group;    // query heads of it
    int64_t query;    // first query
    int64_t queries;  // each of the group's heads: row r of the task is head r / queries, query r % queries
    int64_t split;

    int64_t rows() const { return group * queries; }
    int64_t q_head(int64_t r) const { return head * group + r / queries; }
    int64_t q_token(int64_t r) const { return query + r % queries; }
    // Keys that query i sees are those in [visible_begin, visible_end), and the window's sinks.
    int64_t visible_begin(int64_t i) const {
        return attention.window > 0 ? call.position + i - attention.window + 1 : 0;
    }
    int64_t visible_end(int64_t i) const {
        return attention.causal || attention.window > 0 ? call.position + i + 1 : INT64_MAX;
    }
};

struct Memory {
    Scratch layout;
    float* base;

    float* query(int64_t r) const { return base + r * layout.query_stride; }
    float* turned(int64_t r) const { return base + layout.turned + r * layout.query_stride; }
    float* scores(int64_t r) const { return base + layout.scores + r * layout.scores_stride; }
    float* sums(int64_t r) const { return base + layout.sums + r * layout.lanes; }
    float* total(int64_t r) const { return base + layout.total + r * SUM_LANES; }
    float* peak(int64_t r) const { return base + layout.peak + r; }
    float* panel() const { return base + layout.panel; }
    Folded folded(int64_t depth) const {
        return {reinterpret_cast<int32_t*>(base + layout.weights),
                depth,
                base + layout.digits,
                layout.digit_stride,
                {},
                {}};
    }
};

// The row whose tasks, or units, begin last at or before `index`.
template <int64_t RowPlan::*FIRST>
static inline const RowPlan& row_at(const Plan& plan, int64_t index) {
    int64_t low = 0, high = plan.row_count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (plan.rows[middle].*FIRST <= index ? low : high) = middle;
    }
    return plan.rows[low];
}

// Task `split` of a unit of the row; its last queries come first, because causal ones see most.
static inline Task task_at(const Attention& attention, const Plan& plan, const RowPlan& row, int64_t unit,
                           int64_t split) {
    const Layout& layout = *attention.layout;
    const RowCall& call = attention.row_calls[row.row];
    const int64_t tile = row.query_tiles - 1 - unit / layout.shape.kv_heads;
    const int64_t query = call.first_query + tile * plan.tile_queries;
    const int64_t left = attention.queries - query;
    return {attention,
            layout,
            row,
            call,
            unit % layout.shape.kv_heads,
            attention.q_heads / layout.shape.kv_heads,
            query,
            left < plan.tile_queries ? left : plan.tile_queries,
            split};
}

static inline int64_t panels(int64_t tokens) { return (tokens + PANEL_TOKENS - 1) / PANEL_TOKENS; }

static inline int64_t tile_count(const RowCall& call) {
    const RowCache& cache = call.cache;
    return panels(cache.sinks.tokens) + cache.block_count + panels(cache.residual.tokens) + panels(call.added.tokens);
}

static inline Tile dense_tile(const DenseTokens& tokens, int64_t head, int64_t first, int64_t panel) {
    const int64_t begin = panel * PANEL_TOKENS;
    const int64_t left = tokens.tokens - begin;
    return {first + begin,
            left < PANEL_TOKENS ? left : PANEL_TOKENS,
            nullptr,
            nullptr,
            tokens.key + head * tokens.key_head_stride + begin * tokens.key_token_stride,
            tokens.value + head * tokens.value_head_stride + begin * tokens.value_token_stride,
            tokens.key_token_stride,
            tokens.value_token_stride};
}

static inline const unsigned char* side_data(const Task& task, const BlockRef* block, bool key) {
    return block->data + side_offset(task.layout, block->dense, task.head, key);
}

static inline Tile tile_at(const Task& task, int64_t index) {
    const RowCache& cache = task.call.cache;
    const int64_t block_tokens = task.layout.shape.block_tokens;
    if (index < panels(cache.sinks.tokens)) return dense_tile(cache.sinks, task.head, 0, index);
    index -= panels(cache.sinks.tokens);
    int64_t first = cache.sinks.tokens + cache.freed;
    if (index < cache.block_count) {
        const BlockRef* block = cache.blocks + index;
        return {first + index * block_tokens,
                block_tokens,
                block,
                index + 1 < cache.block_count ? block + 1 : block,
                reinterpret_cast<const float*>(side_data(task, block, true)),
                reinterpret_cast<const float*>(side_data(task, block, false)),
                task.layout.shape.k_size,
                task.layout.shape.v_size};
    }
    index -= cache.block_count;
    first += cache.block_count * block_tokens;
    if (index < panels(cache.residual.tokens)) return dense_tile(cache.residual, task.head, first, index);
    index -= panels(cache.residual.tokens);
    return dense_tile(task.call.added, task.head, first + cache.residual.tokens, index);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Of a tile's tokens those that query i sees: [0, sinks) and [begin, end).
struct Seen {
    int64_t sinks, begin, end;
};

static inline Seen seen_of(const Task& task, const Tile& tile, int64_t i) {
    const int64_t end = most(least(task.visible_end(i) - tile.first, tile.tokens), 0);
    const int64_t begin = most(least(task.visible_begin(i) - tile.first, end), 0);
    return {most(least(task.attention.window_sinks - tile.first, begin), 0), begin, end};
}

static inline bool is_visible(const Task& task, const Tile& tile) {
    return tile.first < task.visible_end(task.query + task.queries - 1) &&
           (tile.first + tile.tokens > task.visible_begin(task.query) || tile.first < task.attention.window_sinks);
}

static inline void tile_scores(const Task& task, const Tile& tile, const Memory& memory) {
    const Side& side = task.layout.key;
    const Scratch& s = memory.layout;
    if (tile.block && !side_is_dense(tile.block->dense, true)) {
        const unsigned char* const data = side_data(task, tile.block, true);
        multiply_quantized<false>(side, data, side_data(task, tile.next, true),
                                  side.rotated ? memory.turned(0) : memory.query(0), s.query_stride, task.rows(),
                                  memory.scores(0), s.scores_stride, memory.folded(side.depth_padded));
        if (side.tokens) scale_scores(side, data, task.rows(), memory.scores(0), s.scores_stride);
    } else
        dense_scores(tile.key, tile.key_stride, tile.tokens, side.size, memory.query(0), s.query_stride, task.rows(),
                     memory.scores(0), s.scores_stride, memory.panel());
}

// Whether causality or the window hides any of the tile from any query.
static inline bool hides_some(const Task& task, const Tile& tile) {
    const int64_t end = tile.first + tile.tokens;
    const int64_t behind = least(task.visible_begin(task.query + task.queries - 1), end);
    return behind > most(tile.first, task.attention.window_sinks) || task.visible_end(task.query) < end;
}

// Whether every score of the tile is what the keys say: no softcap, no mask, no padding, nothing hidden.
static inline bool is_plain(const Task& task, const Tile& tile) {
    return task.attention.softcap == 0 && !task.attention.mask && tile.tokens % TILE_LANES == 0 &&
           !hides_some(task, tile);
}

static inline void shape_scores(const Task& task, const Tile& tile, const Memory& memory) {
    const Attention& a = task.attention;
    const int64_t padded = whole_tiles(tile.tokens);
    const bool hides = hides_some(task, tile);
    int64_t r = 0;
    for (int64_t head = task.head * task.group; head < (task.head + 1) * task.group; ++head)
        for (int64_t i = task.query; i < task.query + task.queries; ++i, ++r) {
            float* scores = memory.scores(r);
            if (a.softcap > 0) cap_scores(scores, padded, a.softcap);
            if (a.mask)
                add_mask(scores, tile.tokens,
                         a.mask + task.plan.row * a.mask_stride[0] + head * a.mask_stride[1] + i * a.mask_stride[2] +
                             (task.call.mask_column + tile.first) * a.mask_stride[3],
                         a.mask_stride[3]);
            const Seen seen = hides ? seen_of(task, tile, i) : Seen{0, 0, tile.tokens};
            hide(scores, seen.sinks, seen.begin);
            hide(scores, seen.end, padded);
        }
}

static inline void tile_softmax(const Task& task, const Tile& tile, const Memory& memory) {
    if (!is_plain(task, tile)) shape_scores(task, tile, memory);
    const int64_t padded = whole_tiles(tile.tokens), rows = task.rows();
    for (int64_t r = 0; r < rows; ++r)
        exponentials(memory.scores(r), padded, {memory.peak(r), memory.total(r), memory.sums(r), memory.layout.lanes});
}

// Row r over the tokens [begin, end) of the tile.
static inline void part_values(const Task& task, const Tile& tile, const Memory& memory, int64_t r, int64_t begin,
                               int64_t end) {
    if (begin < end)
        dense_values(task.layout.value, tile.value + begin * tile.value_stride, tile.value_stride, end - begin,
                     memory.scores(r) + begin, memory.layout.scores_stride, 1, memory.sums(r), memory.layout.lanes,
                     memory.panel());
}

// Each row over the tokens that it sees: the weight of a hidden one is 0, but 0 times infinity is NaN. Out of line,
// because it is rare, and inlined it takes a tenth of the speed of dense tiles beside it.
__attribute__((noinline)) static void visible_values(const Task& task, const Tile& tile, const Memory& memory) {
    for (int64_t r = 0; r < task.rows(); ++r) {
        const Seen seen = seen_of(task, tile, task.q_token(r));
        part_values(task, tile, memory, r, 0, seen.sinks);
        part_values(task, tile, memory, r, seen.begin, seen.end);
    }
}

static inline bool has_finite_values(const Task& task, const Tile& tile) {
    for (int64_t token = 0; token < tile.tokens; ++token)
        if (!are_finite(tile.value + token * tile.value_stride, task.layout.value.size)) return false;
    return true;
}

static inline void tile_values(const Task& task, const Tile& tile, const Memory& memory) {
    const Side& side = task.layout.value;
    const Scratch& s = memory.layout;
    if (tile.block && !side_is_dense(tile.block->dense, false))
        multiply_quantized<true>(side, side_data(task, tile.block, false), side_data(task, tile.next, false),
                                 memory.scores(0), s.scores_stride, task.rows(),
                                 memory.sums(0) + (side.rotated ? side.lanes : 0), s.lanes,
                                 memory.folded(side.depth_padded));
    else if (hides_some(task, tile) && !has_finite_values(task, tile))
        visible_values(task, tile, memory);
    else
        dense_values(side, tile.value, tile.value_stride, tile.tokens, memory.scores(0), s.scores_stride, task.rows(),
                     memory.sums(0), s.lanes, memory.panel());
}

static inline void start_rows(const Task& task, const Memory& memory) {
    const Attention& a = task.attention;
    for (int64_t r = 0; r < task.rows(); ++r) {
        const float* from = a.query + task.plan.row * a.query_row_stride + task.q_head(r) * a.query_head_stride +
                            task.q_token(r) * a.query_token_stride;
        float* query = memory.query(r);
        for (int64_t d = 0; d < memory.layout.query_stride; ++d)
            query[d] = d < task.layout.key.size ? from[d] * a.scale : 0;
        if (task.layout.key.rotated) {
            std::memcpy(memory.turned(r), query, size_t(memory.layout.query_stride) * sizeof(float));
            rotate(memory.turned(r), task.layout.key.size);
        }
        std::memset(memory.sums(r), 0, size_t(memory.layout.lanes) * sizeof(float));
        std::memset(memory.total(r), 0, size_t(SUM_LANES) * sizeof(float));
        const float sink = a.head_sink && task.split == 0 ? a.head_sink[task.q_head(r)] : -__builtin_inff();
        *memory.peak(r) = sink;
        *memory.total(r) = sink == -__builtin_inff() ? 0 : exp1(sink - sink);
    }
}

// Adds the sums of rotated values, rotated back, to those of values as given, which they follow.
static inline void turn_back(const Side& side, float* sums) {
    float* const turned = sums + side.lanes;
    for (int group = 1; group < side.groups; ++group) {
        const int begin = group * side.group_size;
        std::memmove(turned + begin, turned + int64_t(group) * side.lanes_padded,
                     size_t(least(side.size - begin, side.group_size)) * sizeof(float));
    }
    rotate(turned, side.size);
    for (int i = 0; i < side.size; ++i)
        sums[i / side.group_size * int64_t(side.lanes_padded) + i % side.group_size] += turned[i];
}

static inline void write_row(const Task& task, int64_t r, float* sums, float total) {
    const Attention& a = task.attention;
    const Side& side = task.layout.value;
    float* to = a.output + task.plan.row * a.output_row_stride + task.q_head(r) * a.output_head_stride +
                task.q_token(r) * a.output_token_stride;
    if (side.rotated) turn_back(side, sums);
    const bool is_nan = !(total > 0);
    const float factor = is_nan ? __builtin_nanf("") : 1.0f / total;
    for (int group = 0; group < side.groups; ++group) {
        const int begin = group * side.group_size;
        const int count = side.size - begin < side.group_size ? side.size - begin : side.group_size;
        const float* from = sums + int64_t(group) * side.lanes_padded;
        for (int i = 0; i < count; ++i) to[begin + i] = is_nan && a.nan_to_zero ? 0 : from[i] * factor;
    }
}

static void run_task(const Attention& attention, const Plan& plan, int64_t index, void* scratch, void* workspace) {
    const RowPlan& row = row_at<&RowPlan::first_task>(plan, index);
    const int64_t own = index - row.first_task, splits = row.token_splits;
    const Task task = task_at(attention, plan, row, own / splits, own % splits);
    const Memory memory{make_scratch(task.layout, task.group * plan.tile_queries), static_cast<float*>(scratch)};
    const int64_t tiles = tile_count(task.call);
    start_rows(task, memory);
    for (int64_t t = tiles * task.split / splits; t < tiles * (task.split + 1) / splits; ++t) {
        const Tile tile = tile_at(task, t);
        if (!is_visible(task, tile)) continue;
        tile_scores(task, tile, memory);
        tile_softmax(task, tile, memory);
        tile_values(task, tile, memory);
    }
    const int64_t partial = partial_floats(task.layout);
    float* to = static_cast<float*>(workspace) + index * task.group * plan.tile_queries * partial;
    for (int64_t r = 0; r < task.rows(); ++r, to += partial) {
        const float total = row_total(memory.total(r));
        if (splits == 1) {
            write_row(task, r, memory.sums(r), total);
            continue;
        }
        to[0] = *memory.peak(r);
        to[1] = total;
        std::memcpy(to + whole_tiles(2), memory.sums(r), size_t(memory.layout.lanes) * sizeof(float));
    }
}

static void run_combine(const Attention& attention, const Plan& plan, int64_t index, void* workspace) {
    const RowPlan& row = row_at<&RowPlan::first_unit>(plan, index);
    if (row.token_splits == 1) return;
    const int64_t unit = index - row.first_unit, first_task = row.first_task + unit * row.token_splits;
    const Task task = task_at(attention, plan, row, unit, 0);
    const int64_t partial = partial_floats(task.layout);
    const int64_t split_stride = task.group * plan.tile_queries * partial;
    float* first = static_cast<float*>(workspace) + first_task * split_stride;
    for (int64_t r = 0; r < task.rows(); ++r) {
        float* whole = first + r * partial;
        for (int64_t split = 1; split < row.token_splits; ++split) {
            float* part = whole + split * split_stride;
            const float peak = part[0] > whole[0] ? part[0] : whole[0];
            const float keep = whole[0] == peak ? 1 : exp1(whole[0] - peak);
            const float take = part[0] == peak ? 1 : exp1(part[0] - peak);
            whole[0] = peak;
            whole[1] = whole[1] * keep + part[1] * take;
            for (int64_t i = whole_tiles(2); i < partial; ++i) whole[i] = whole[i] * keep + part[i] * take;
        }
        write_row(task, r, whole + whole_tiles(2), whole[1]);
    }
}

}  // namespace onnx_kivi::KIVI_ISA
