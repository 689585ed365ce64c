#include "../store/block.hpp"
#include "../store/store.hpp"
#include "../threads/pool.hpp"
#include "half.hpp"
#include "op.hpp"
#include "ops.hpp"
#include "run.hpp"

namespace onnx_kivi::ort {

namespace {

// Memory for the f32 forms of float16 tensors, kept for the next call of this thread.
float* converted(std::size_t which, int64_t count) {
    thread_local std::array<AlignedBuffer, 6> buffers;
    buffers[which].reserve(count * static_cast<int64_t>(sizeof(float)));
    return reinterpret_cast<float*>(buffers[which].data());
}

class SdpaKernel {
public:
    SdpaKernel(const Op& op, const OrtApi* api, const OrtKernelInfo* info)
        : api(api),
          type_(op.type),
          threads_(default_threads()),
          attributes_(read_attributes<SdpaAttributes>(api, info, op.spec_version)) {}

    void compute(OrtKernelContext* context) const {
        Call call{tensor(context, 0), tensor(context, 1), tensor(context, 2),
                  tensor(context, 3), tensor(context, 4), {}};
        const TensorView step = input(api, context, 5);
        if (step.shape != std::vector<int64_t>{1}) {
            throw_cache_error("QuantizedKvSdpa, slot " + std::to_string(attributes_.slot) +
                              ": step: expected shape (1), got " + tuple_text(step.shape));
        }
        const int64_t ticket = *static_cast<const int64_t*>(step.data);
        RuntimeThreads threads(api, context, threads_);
        const auto& q = call.query.shape;
        const auto& v = call.value.shape;
        if (q.size() != 4 || v.size() != 4) return attend(ticket, attributes_, call, threads);  // which refuses them
        const std::vector<int64_t> shape{q[0], q[1], q[2], v[3]};
        if (type_ == FLOAT) {
            call.output = output<float>(api, context, 0, shape);
            return attend(ticket, attributes_, call, threads);
        }
        const int64_t count = shape[0] * shape[1] * shape[2] * shape[3];
        call.output = converted(5, count);
        attend(ticket, attributes_, call, threads);
        auto* const out = output<uint16_t>(api, context, 0, shape);
        const auto n = static_cast<std::size_t>(count);
        type_ == FLOAT16 ? convert<to_float16>(call.output, out, n) : convert<to_bfloat16>(call.output, out, n);
    }

    const OrtApi* const api;

private:
    Tensor tensor(OrtKernelContext* context, std::size_t index) const {
        TensorView view = input(api, context, index);
        Tensor tensor{static_cast<const float*>(view.data), std::move(view.shape), nullptr};
        if (type_ != FLOAT && tensor.size() > 0) {
            const auto* half = static_cast<const uint16_t*>(view.data);
            float* const floats = converted(index, tensor.size());
            const auto n = static_cast<std::size_t>(tensor.size());
            type_ == FLOAT16 ? convert<from_float16>(half, floats, n) : convert<from_bfloat16>(half, floats, n);
            tensor.data = floats;
        }
        return tensor;
    }

    const ElementType type_;
    const int threads_;
    const SdpaAttributes attributes_;
    const Counted served_{nodes_served, 1};
};

// Output (B, Hq, S, Dv) from query (B, Hq, S, Dk) and value (B, Hkv, N, Dv). Of the ops that share a name onnxruntime
// asks only one, so the type comes from the query.
OrtStatus* infer_sdpa(const CustomOp* self, OrtShapeInferContext* context) {
    const Op& op = op_of(self);
    return guarded(op.api, [&] {
        KnownShape shape = known_shape(op.api, context, 0);
        const KnownShape value = known_shape(op.api, context, 2);
        if (shape.sizes.size() != 4 || value.sizes.size() != 4) return;
        shape.sizes[3] = value.sizes[3];
        shape.symbols[3] = value.symbols[3];
        set_shape(op.api, context, 0, shape);
    });
}

const CustomOp* make_sdpa(const OrtApi* api, int64_t spec_version, ElementType type, bool infer_shapes) {
    auto* const op = make_op(api, spec_version == 1 ? "QuantizedKvSdpa" : "QuantizedKvSdpaV2", spec_version);
    set_kernel<SdpaKernel>(*op);
    op->type = type;
    op->GetInputTypeCount = [](const CustomOp*) { return std::size_t{6}; };
    op->GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
    op->GetInputType = [](const CustomOp* self, std::size_t i) {
        return i == 5 ? int32_t{INT64} : int32_t{op_of(self).type};
    };
    op->GetOutputType = [](const CustomOp* self, std::size_t) { return int32_t{op_of(self).type}; };
    op->GetInputCharacteristic = [](const CustomOp*, std::size_t i) {
        return i == 3 || i == 4 ? int32_t{OPTIONAL} : int32_t{REQUIRED};
    };
    if (infer_shapes) op->InferOutputShapeFn = infer_sdpa;
    return op;
}

}  // namespace

std::vector<const CustomOp*> make_sdpa_ops(const OrtApi* api, bool infer_shapes) {
    std::vector<const CustomOp*> ops;
    for (const int64_t version : {1, 2}) {
        for (const ElementType type : {FLOAT, FLOAT16, BFLOAT16}) {
            ops.push_back(make_sdpa(api, version, type, infer_shapes));
        }
    }
    return ops;
}

}  // namespace onnx_kivi::ort
