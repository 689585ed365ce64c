#include <cstring>

#include "../ghost/table.hpp"
#include "../store/shapes.hpp"
#include "op.hpp"
#include "ops.hpp"
#include "run.hpp"

namespace onnx_kivi::ort {

namespace {

// Inputs of both ops, in order; the second one is past_length or step.
enum Input : std::size_t { HANDLE, SECOND, NEW_SHAPE, MASK_SHAPE, PAST_KEY, PAST_VALUE, INPUTS };

class GhostKernel {
public:
    GhostKernel(const Op& op, const OrtApi* api, const OrtKernelInfo* info)
        : api(api), op_(op), attributes_(read_attributes<GhostAttributes>(api, info, op.spec_version)) {}

    const OrtApi* const api;

protected:
    std::vector<int64_t> numbers(OrtKernelContext* context, std::size_t index) const {
        const TensorView view = input(api, context, index);
        if (view.shape.size() != 1 || view.shape[0] == 0) {
            throw_cache_error(std::string(op_.name) + ": expected a list of numbers, got shape " +
                              tuple_text(view.shape));
        }
        const auto* const first = static_cast<const int64_t*>(view.data);
        return {first, first + view.shape[0]};
    }

    GhostCall call(OrtKernelContext* context) const {
        const TensorView key = input(api, context, PAST_KEY), value = input(api, context, PAST_VALUE);
        return GhostCall(op_.name, numbers(context, NEW_SHAPE), numbers(context, MASK_SHAPE), key.shape,
                         static_cast<const float*>(key.data), value.shape, static_cast<const float*>(value.data));
    }

    static bool reads_stamps(const std::vector<int64_t>& handles) { return handles == std::vector{DEFAULT_HANDLE}; }

    const Op& op_;
    const GhostAttributes attributes_;
};

class OpenKernel : public GhostKernel {
public:
    OpenKernel(const Op& op, const OrtApi* api, const OrtKernelInfo* info)
        : GhostKernel(op, api, info), budget_(budget_of(attributes_)) {}

    void compute(OrtKernelContext* context) const {
        std::vector<int64_t> handles = numbers(context, HANDLE), past = numbers(context, SECOND);
        if (reads_stamps(handles)) {
            if (past != std::vector{COMMITTED_LENGTH}) {
                throw_cache_error(std::string(op_.name) +
                                  ": past_length: expected -1 where the past comes with the "
                                  "inputs, got " +
                                  list_text(past) + "; cut the past, or give a cache_handle");
            }
            const GhostCall given = call(context);
            handles = {open_ghost(attributes_, budget_, given)};
            past = {given.past()};
        }
        give(context, 0, handles);
        give(context, 1, past);
    }

private:
    void give(OrtKernelContext* context, std::size_t index, const std::vector<int64_t>& values) const {
        auto* const out = output<int64_t>(api, context, index, {static_cast<int64_t>(values.size())});
        std::copy(values.begin(), values.end(), out);
    }

    const int64_t budget_;
};

class StampKernel : public GhostKernel {
public:
    using GhostKernel::GhostKernel;

    void compute(OrtKernelContext* context) const {
        if (!reads_stamps(numbers(context, HANDLE))) {
            pass_on(context, PAST_KEY, 0);
            pass_on(context, PAST_VALUE, 1);
            return;
        }
        const GhostCall given = call(context);
        const StampShape s = given.present_shape();
        const std::vector<int64_t> shape{s.rows, s.heads, s.tokens, s.channels};
        auto* const key = output<float>(api, context, 0, shape);
        auto* const value = output<float>(api, context, 1, shape);
        stamp_ghost(numbers(context, SECOND)[0] >> 32, given, key, value);
    }

private:
    // A caller that gives a handle carries nothing.
    void pass_on(OrtKernelContext* context, std::size_t from, std::size_t to) const {
        const TensorView past = input(api, context, from);
        int64_t count = 1;
        for (const int64_t size : past.shape) count *= size;
        auto* const present = output<float>(api, context, to, past.shape);
        if (present != past.data && count > 0) {
            std::memcpy(present, past.data, static_cast<std::size_t>(count) * sizeof(float));
        }
    }
};

OrtStatus* infer_open(const CustomOp* self, OrtShapeInferContext* context) {
    const Op& op = op_of(self);
    return guarded(op.api, [&] {
        for (std::size_t i = 0; i < 2; ++i) set_shape(op.api, context, i, {INT64, {-1}, {""}});
    });
}

}  // namespace

std::vector<const CustomOp*> make_ghost_ops(const OrtApi* api) {
    Op* const open = make_op(api, "CacheOpen", 2);
    Op* const stamp = make_op(api, "CacheStamp", 2);
    set_kernel<OpenKernel>(*open);
    set_kernel<StampKernel>(*stamp);
    for (Op* const op : {open, stamp}) {
        op->GetInputTypeCount = [](const CustomOp*) { return std::size_t{INPUTS}; };
        op->GetOutputTypeCount = [](const CustomOp*) { return std::size_t{2}; };
        op->GetInputType = [](const CustomOp*, std::size_t i) {
            return i < PAST_KEY ? int32_t{INT64} : int32_t{FLOAT};
        };
    }
    open->GetOutputType = [](const CustomOp*, std::size_t) { return int32_t{INT64}; };
    open->InferOutputShapeFn = infer_open;
    stamp->GetOutputType = [](const CustomOp*, std::size_t) { return int32_t{FLOAT}; };
    return {open, stamp};
}

}  // namespace onnx_kivi::ort
