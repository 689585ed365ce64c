#include <algorithm>
#include <mutex>

#include "../store/store.hpp"
#include "op.hpp"
#include "ops.hpp"
#include "run.hpp"

namespace onnx_kivi::ort {

namespace {

// KvCacheStep and KvCacheStepV2. Each kernel, so each session, has a default cache of its own.
class StepKernel {
public:
    StepKernel(const Op& op, const OrtApi* api, const OrtKernelInfo* info)
        : api(api),
          op_(op),
          attributes_(read_attributes<StepAttributes>(api, info, op.spec_version)),
          expected_(nodes_expected, attributes_.layers) {}
    StepKernel(const StepKernel&) = delete;
    StepKernel& operator=(const StepKernel&) = delete;
    ~StepKernel() {
        if (default_handle_ != DEFAULT_HANDLE) close_cache(default_handle_);
    }

    void compute(OrtKernelContext* context) {
        RuntimeThreads::begin_run();
        const bool has_rows = op_.spec_version >= 2;
        std::vector<int64_t> handles = numbers(context, 0);
        const std::vector<int64_t> lengths = numbers(context, 1);
        const std::vector<int64_t> added = has_rows ? numbers(context, 2) : std::vector{ALL_NEW};
        if (handles == std::vector{DEFAULT_HANDLE}) handles = {default_handle()};
        const auto [past, ticket] = open_rows(handles, lengths, added, attributes_, nodes_served >= nodes_expected);
        *output<int64_t>(api, context, 0, {1}) = *std::max_element(past.begin(), past.end());
        if (has_rows) {
            auto* const rows = output<int64_t>(api, context, 1, {static_cast<int64_t>(past.size())});
            std::copy(past.begin(), past.end(), rows);
        }
        *output<int64_t>(api, context, has_rows ? 2 : 1, {1}) = ticket;
    }

    const OrtApi* const api;

private:
    std::vector<int64_t> numbers(OrtKernelContext* context, std::size_t index) const {
        const TensorView view = input(api, context, index);
        if (view.shape.size() != 1 || view.shape[0] == 0) {
            throw_cache_error(std::string(op_.name) + ": expected shape (1) or (rows), got " + tuple_text(view.shape));
        }
        const auto* const first = static_cast<const int64_t*>(view.data);
        return {first, first + view.shape[0]};
    }

    int64_t default_handle() {
        std::call_once(made_default_, [this] { default_handle_ = new_cache(); });
        return default_handle_;
    }

    const Op& op_;
    const StepAttributes attributes_;
    const Counted expected_;
    std::once_flag made_default_;
    int64_t default_handle_ = DEFAULT_HANDLE;
};

OrtStatus* infer_step(const CustomOp* self, OrtShapeInferContext* context) {
    const Op& op = op_of(self);
    return guarded(op.api, [&] {
        const std::size_t outputs = self->GetOutputTypeCount(self);
        for (std::size_t i = 0; i < outputs; ++i) {
            const bool is_by_row = outputs == 3 && i == 1;
            set_shape(op.api, context, i, {INT64, {is_by_row ? -1 : 1}, {""}});
        }
    });
}

}  // namespace

std::vector<const CustomOp*> make_step_ops(const OrtApi* api) {
    Op* const first = make_op(api, "KvCacheStep", 1);
    Op* const second = make_op(api, "KvCacheStepV2", 2);
    for (Op* const op : {first, second}) {
        set_kernel<StepKernel>(*op);
        op->GetInputType = op->GetOutputType = [](const CustomOp*, std::size_t) { return int32_t{INT64}; };
        op->InferOutputShapeFn = infer_step;
    }
    first->GetInputTypeCount = first->GetOutputTypeCount = [](const CustomOp*) { return std::size_t{2}; };
    second->GetInputTypeCount = second->GetOutputTypeCount = [](const CustomOp*) { return std::size_t{3}; };
    return {first, second};
}

}  // namespace onnx_kivi::ort
