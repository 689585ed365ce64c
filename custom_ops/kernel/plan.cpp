// Cuts one Attention into tasks: (query tile, row, kv head, token split). Compiled for the baseline.
#include <algorithm>

#include "scratch.hpp"

namespace onnx_kivi {
namespace {

constexpr int64_t TILE_ROWS = 128;       // query rows that share one pass over a kv head's tokens
constexpr int64_t LEAST_TILE_ROWS = 16;  // where queries are cut up for the threads' sake
constexpr int64_t TASKS_PER_THREAD = 4;  // so that threads which start late or run slow don't hold the rest up
constexpr int64_t LEAST_SPLIT_TOKENS = 256;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Plan plan_attention(const Attention& attention, int threads) {
    const Layout& layout = *attention.layout;
    const int64_t group = attention.q_heads / layout.shape.kv_heads;
    Plan plan{};
    const int64_t heads = attention.rows * layout.shape.kv_heads;
    const int64_t wanted = threads > 1 && heads > 0 ? divide_up(TASKS_PER_THREAD * threads, heads) : 1;
    const int64_t needed = divide_up(attention.queries, group < TILE_ROWS ? TILE_ROWS / group : 1);
    const int64_t most = std::min(divide_up(attention.queries * group, LEAST_TILE_ROWS), attention.queries);
    plan.query_tiles = std::max(needed, std::min(wanted, most));
    plan.tile_queries = plan.query_tiles ? divide_up(attention.queries, plan.query_tiles) : 0;
    plan.query_tiles = plan.tile_queries ? divide_up(attention.queries, plan.tile_queries) : 0;
    const int64_t units = heads * plan.query_tiles;
    plan.token_splits = 1;
    if (units > 0 && plan.query_tiles < wanted)
        plan.token_splits =
            std::clamp<int64_t>(attention.past / LEAST_SPLIT_TOKENS, 1, divide_up(wanted, plan.query_tiles));
    plan.tasks = units * plan.token_splits;
    plan.combines = plan.token_splits > 1 ? units : 0;
    const int64_t rows = group * plan.tile_queries;
    plan.scratch_bytes = make_scratch(layout, rows).floats * int64_t(sizeof(float));
    if (plan.combines) plan.workspace_bytes = plan.tasks * rows * partial_floats(layout) * int64_t(sizeof(float));
    return plan;
}

}  // namespace onnx_kivi
