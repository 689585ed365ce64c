// Cuts one Attention into tasks: (row, query tile, kv head, token split). Compiled for the baseline.
#include <algorithm>
#include <cmath>

#include "scratch.hpp"

namespace onnx_kivi {
namespace {

constexpr int64_t TILE_ROWS = 128;               // query rows that share one pass over a kv head's tokens
constexpr int64_t LEAST_TILE_ROWS = 16;          // where queries are cut up for the threads' sake
constexpr int64_t TASKS_PER_THREAD = 4;          // so that threads which start late or run slow don't hold the rest up
constexpr int64_t UNEVEN_TASKS_PER_THREAD = 16;  // where rows differ, so that no thread is left with a long one
constexpr int64_t LEAST_SPLIT_TOKENS = 256;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t held_tokens(const Layout& layout, const RowCache& cache) {
    return cache.sinks.tokens + cache.block_count * layout.shape.block_tokens + cache.residual.tokens;
}

// Lists the rows that have something to do, most work first, and gives their number.
int64_t list_rows(const Attention& attention, RowPlan* rows) {
    int64_t count = 0;
    for (int64_t row = 0; row < attention.rows; ++row) {
        const int64_t work = row_work(attention, row);
        if (work > 0) rows[count++] = {row, work, 0, 1, 0, 0};
    }
    std::sort(rows, rows + count, [](const RowPlan& a, const RowPlan& b) {
        return a.work > b.work || (a.work == b.work && a.row < b.row);
    });
    return count;
}

// Query tiles for as many tasks as are wanted of each kv head and row, of queries that share a head's tokens.
int64_t tile_queries(const Attention& attention, int64_t group, int64_t wanted) {
    const int64_t needed = divide_up(attention.queries, group < TILE_ROWS ? TILE_ROWS / group : 1);
    const int64_t most = std::min(divide_up(attention.queries * group, LEAST_TILE_ROWS), attention.queries);
    return divide_up(attention.queries, std::max(needed, std::min(wanted, most)));
}

// Into how many parts a row's tokens are cut so that `share` tasks, a fraction, come of each of its kv heads.
int64_t token_splits(const Attention& attention, const RowPlan& row, double share) {
    const auto wanted = static_cast<int64_t>(std::ceil(share));
    if (row.query_tiles >= wanted) return 1;
    const int64_t held = held_tokens(*attention.layout, attention.row_calls[row.row].cache);
    return std::clamp<int64_t>(held / LEAST_SPLIT_TOKENS, 1, divide_up(wanted, row.query_tiles));
}

}  // namespace

int64_t row_work(const Attention& attention, int64_t row) {
    const RowCall& call = attention.row_calls[row];
    const int64_t queries = attention.queries - call.first_query;
    const int64_t tokens = held_tokens(*attention.layout, call.cache) + call.added.tokens;
    const int64_t seen = attention.window ? attention.window + attention.window_sinks + queries : tokens;
    return queries * std::min(tokens, seen);
}

Plan plan_attention(const Attention& attention, int threads, RowPlan* rows) {
    const Layout& layout = *attention.layout;
    const int64_t heads = layout.shape.kv_heads, group = attention.q_heads / heads;
    Plan plan{};
    plan.rows = rows;
    plan.row_count = list_rows(attention, rows);
    if (plan.row_count == 0) return plan;
    const bool uneven = rows[0].work != rows[plan.row_count - 1].work;
    const int64_t tasks = threads > 1 ? threads * (uneven ? UNEVEN_TASKS_PER_THREAD : TASKS_PER_THREAD) : 1;
    double work = 0;
    for (int64_t i = 0; i < plan.row_count; ++i) work += static_cast<double>(rows[i].work);
    plan.tile_queries = tile_queries(attention, group, divide_up(tasks, plan.row_count * heads));
    int64_t units = 0;
    for (int64_t i = 0; i < plan.row_count; ++i) {
        RowPlan& row = rows[i];
        const double share = static_cast<double>(tasks * row.work) / (work * static_cast<double>(heads));
        row.query_tiles = divide_up(attention.queries - attention.row_calls[row.row].first_query, plan.tile_queries);
        row.token_splits = token_splits(attention, row, share);
        row.first_task = plan.tasks;
        row.first_unit = units;
        units += row.query_tiles * heads;
        plan.tasks += row.query_tiles * heads * row.token_splits;
        if (row.token_splits > 1) plan.combines = 1;
    }
    plan.combines *= units;
    const int64_t task_rows = group * plan.tile_queries;
    plan.scratch_bytes = make_scratch(layout, task_rows).floats * int64_t(sizeof(float));
    if (plan.combines) plan.workspace_bytes = plan.tasks * task_rows * partial_floats(layout) * int64_t(sizeof(float));
    return plan;
}

}  // namespace onnx_kivi
