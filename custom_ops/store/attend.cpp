#include "attend.hpp"

#include <algorithm>
#include <atomic>

#include "block.hpp"

namespace onnx_kivi {

namespace {

// Strides of an additive mask in which a dimension of size 1 is broadcast.
void set_mask(Attention& attention, const Tensor& mask) {
    if (mask.size() == 0) return;
    attention.mask = mask.data;
    int64_t stride = 1;
    for (std::size_t i = 4; i-- > 0;) {
        attention.mask_stride[i] = mask.shape[i] == 1 ? 0 : stride;
        stride *= mask.shape[i];
    }
}

// Waking a sleeping thread costs about as much as this many multiplications.
constexpr double LEAST_WORK_PER_THREAD = 1 << 19;

// Threads that are worth their waking for this call.
int threads_for(const Attention& attention, const Dims& dims, int available) {
    double work = 0;
    for (int64_t row = 0; row < attention.rows; ++row) work += static_cast<double>(row_work(attention, row));
    work *= static_cast<double>(dims[HQ]) * static_cast<double>(dims[DK] + dims[DV]);
    return static_cast<int>(std::clamp<double>(work / LEAST_WORK_PER_THREAD, 1, available));
}

// Zeros for the queries that are padding, and for rows without tokens.
void clear_unwritten(const Attention& attention, const Dims& dims) {
    const int64_t size = dims[HQ] * dims[S] * dims[DV];
    for (int64_t row = 0; row < attention.rows; ++row) {
        const bool is_whole = attention.row_calls[row].first_query == 0 && row_work(attention, row) > 0;
        if (!is_whole) std::fill_n(attention.output + row * size, size, 0.0F);
    }
}

int64_t whole_lines(int64_t bytes) { return (bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES; }

}  // namespace

void run_attention(const SdpaAttributes& attributes, const Layout& layout, const Kernel& kernel, const Dims& dims,
                   const std::vector<RowCall>& rows, const Call& call, Scheduler& scheduler) {
    Attention attention{};
    attention.layout = &layout;
    attention.rows = dims[B];
    attention.q_heads = dims[HQ];
    attention.queries = dims[S];
    attention.row_calls = rows.data();
    attention.query = call.query.data;
    attention.query_token_stride = dims[DK];
    attention.query_head_stride = dims[S] * dims[DK];
    attention.query_row_stride = dims[HQ] * dims[S] * dims[DK];
    set_mask(attention, call.attn_mask);
    attention.head_sink = call.head_sink.size() ? call.head_sink.data : nullptr;
    attention.output = call.output;
    attention.output_token_stride = dims[DV];
    attention.output_head_stride = dims[S] * dims[DV];
    attention.output_row_stride = dims[HQ] * dims[S] * dims[DV];
    attention.scale = static_cast<float>(attributes.scale);
    attention.softcap = static_cast<float>(attributes.softcap);
    attention.window = attributes.window;
    attention.window_sinks = attributes.window_sinks;
    attention.causal = attributes.is_causal != 0;
    attention.nan_to_zero = attributes.nan_to_zero != 0;

    clear_unwritten(attention, dims);

    // Of the caller's thread, kept: every step needs the same again.
    thread_local std::vector<RowPlan> row_plans;
    thread_local AlignedBuffer buffer;
    row_plans.resize(rows.size());
    const int threads = threads_for(attention, dims, scheduler.threads());
    const Plan plan = plan_attention(attention, threads, row_plans.data());
    if (plan.tasks == 0) return;
    const int64_t workers = std::min<int64_t>(plan.tasks, threads);
    const int64_t scratch = whole_lines(plan.scratch_bytes), workspace = whole_lines(plan.workspace_bytes);
    buffer.reserve(workspace + workers * scratch);
    unsigned char* const memory = buffer.data();
    std::atomic<int64_t> next{0};
    scheduler.for_each(static_cast<std::size_t>(workers), [&](std::size_t worker) {
        unsigned char* const own = memory + workspace + static_cast<int64_t>(worker) * scratch;
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < plan.tasks;) {
            if (scheduler.is_stopped()) return;
            kernel.run_task(attention, plan, task, own, memory);
        }
    });
    if (scheduler.is_stopped()) throw_cache_error("the run was interrupted, and its tokens are dropped");
    for (int64_t i = 0; i < plan.combines; ++i) kernel.run_combine(attention, plan, i, memory);
}

}  // namespace onnx_kivi
