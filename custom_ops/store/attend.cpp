#include "attend.hpp"

#include <algorithm>
#include <atomic>

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
    const int64_t keys =
        attention.window > 0 ? std::min(dims[P] + dims[N], attention.window + dims[S]) : dims[P] + dims[N];
    const double rows = static_cast<double>(dims[B]) * static_cast<double>(dims[HQ]) * static_cast<double>(dims[S]);
    const double work = rows * static_cast<double>(keys) * static_cast<double>(dims[DK] + dims[DV]);
    return static_cast<int>(std::clamp<double>(work / LEAST_WORK_PER_THREAD, 1, available));
}

int64_t whole_lines(int64_t bytes) { return (bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES; }

}  // namespace

void run_attention(const SdpaAttributes& attributes, const Layout& layout, const Kernel& kernel, const Dims& dims,
                   int64_t position, const std::vector<RowCache>& rows, const std::vector<DenseTokens>& new_tokens,
                   const Call& call, Scheduler& scheduler) {
    const int64_t outputs = dims[B] * dims[HQ] * dims[S] * dims[DV];
    if (outputs == 0) return;
    if (dims[P] + dims[N] == 0) {
        std::fill_n(call.output, outputs, 0.0F);
        return;
    }
    Attention attention{};
    attention.layout = &layout;
    attention.rows = dims[B];
    attention.q_heads = dims[HQ];
    attention.queries = dims[S];
    attention.past = dims[P];
    attention.position = position;
    attention.caches = rows.data();
    attention.new_tokens = new_tokens.data();
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
    attention.causal = attributes.is_causal != 0;
    attention.nan_to_zero = attributes.nan_to_zero != 0;

    const int threads = threads_for(attention, dims, scheduler.threads());
    const Plan plan = plan_attention(attention, threads);
    const int64_t workers = std::min<int64_t>(plan.tasks, threads);
    const int64_t scratch = whole_lines(plan.scratch_bytes), workspace = whole_lines(plan.workspace_bytes);
    thread_local AlignedBuffer buffer;  // of the caller, kept: every step needs the same again
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

std::vector<DenseTokens> new_tokens_of(const Call& call, const Dims& dims) {
    std::vector<DenseTokens> tokens(static_cast<std::size_t>(dims[B]));
    for (std::size_t b = 0; b < tokens.size(); ++b) {
        const auto first_head = static_cast<int64_t>(b) * dims[HKV];
        tokens[b] = {call.key.data + first_head * dims[N] * dims[DK],
                     call.value.data + first_head * dims[N] * dims[DV],
                     dims[N],
                     dims[N] * dims[DK],
                     dims[DK],
                     dims[N] * dims[DV],
                     dims[DV]};
    }
    return tokens;
}

}  // namespace onnx_kivi
