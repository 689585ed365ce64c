#include "ops.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>

#include "../store/store.hpp"
#include "../threads/interrupts.hpp"
#include "../threads/pool.hpp"
#include "api.hpp"
#include "half.hpp"

namespace onnx_kivi::ort {

namespace {

// onnxruntime's own threads, for a node of the run that the calling thread began last: all nodes run on one thread,
// unless the session's execution mode is parallel, in which no interrupt is seen.
class RuntimeThreads final : public Scheduler {
public:
    RuntimeThreads(const OrtApi* api, const OrtKernelContext* context, int threads)
        : api_(api), context_(context), threads_(threads), watch_(run()) {}
    static void begin_run() { run() = InterruptWatch::begin(); }

    int threads() const override { return threads_; }
    bool is_stopped() const override { return watch_.is_interrupted(); }
    void run(std::size_t count, void (*task)(void*, std::size_t), void* context) override {
        OrtStatus* status = call<KernelContext_ParallelFor>(api_, context_, task, count, std::size_t{0}, context);
        if (status == nullptr) return;
        const std::string message = call<GetErrorMessage>(api_, status);
        call<ReleaseStatus>(api_, status);
        throw std::runtime_error(message);
    }

private:
    static InterruptWatch& run() {
        thread_local InterruptWatch watch;
        return watch;
    }

    const OrtApi* api_;
    const OrtKernelContext* context_;
    const int threads_;
    const InterruptWatch watch_;
};

// Callbacks find here what they are not told.
struct Op : CustomOp {
    const OrtApi* api = nullptr;
    ElementType type = FLOAT;  // of the float tensors
};

// A node's state, and the C callbacks over it. Kernel has a constructor (api, info) and compute(context).
template <class Kernel>
void set_kernel(CustomOp& op) {
    op.CreateKernelV2 = [](const CustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
        return guarded(api, [&] { *kernel = new Kernel(*self, api, info); });
    };
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        auto* const self = static_cast<Kernel*>(kernel);
        return guarded(self->api, [&] { self->compute(context); });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

void set_common(Op& op, const OrtApi* api) {
    op.api = api;
    op.version = API_VERSION;
    op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    op.GetInputMemoryType = [](const CustomOp*, std::size_t) { return int32_t{0}; };
    op.GetInputCharacteristic = [](const CustomOp*, std::size_t) { return int32_t{REQUIRED}; };
    op.GetOutputCharacteristic = [](const CustomOp*, std::size_t) { return int32_t{REQUIRED}; };
    op.GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
    op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
    op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
    op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    op.GetStartVersion = [](const CustomOp*) { return 1; };
    op.GetEndVersion = [](const CustomOp*) { return INT32_MAX; };
}

// Over all sessions of the process: QuantizedKvSdpa nodes, and how many their models say they have.
std::atomic<int64_t> nodes_served{0}, nodes_expected{0};

// Adds to a count for as long as it lives.
class Counted {
public:
    Counted(std::atomic<int64_t>& count, int64_t amount) : count_(count), amount_(amount) { count_ += amount_; }
    ~Counted() { count_ -= amount_; }
    Counted(const Counted&) = delete;
    Counted& operator=(const Counted&) = delete;

private:
    std::atomic<int64_t>& count_;
    const int64_t amount_;
};

// KvCacheStep. Each kernel, so each session, has a default cache of its own.
class StepKernel {
public:
    StepKernel(const CustomOp&, const OrtApi* api, const OrtKernelInfo* info)
        : api(api),
          attributes_(read_attributes<StepAttributes>(api, info)),
          expected_(nodes_expected, attributes_.layers) {}
    StepKernel(const StepKernel&) = delete;
    StepKernel& operator=(const StepKernel&) = delete;
    ~StepKernel() {
        if (default_handle_ != DEFAULT_HANDLE) close_cache(default_handle_);
    }

    void compute(OrtKernelContext* context) {
        RuntimeThreads::begin_run();
        const int64_t handle = one(context, 0, "cache_handle"), length = one(context, 1, "past_length");
        const auto [past, ticket] = open_step(handle == DEFAULT_HANDLE ? default_handle() : handle, length, attributes_,
                                              nodes_served >= nodes_expected);
        *output<int64_t>(api, context, 0, {1}) = past;
        *output<int64_t>(api, context, 1, {1}) = ticket;
    }

    const OrtApi* const api;

private:
    int64_t one(OrtKernelContext* context, std::size_t index, const char* name) const {
        const TensorView view = input(api, context, index);
        if (view.shape != std::vector<int64_t>{1}) {
            throw_cache_error(std::string("KvCacheStep: ") + name + ": expected shape (1), got " +
                              tuple_text(view.shape) + "; one per row is not supported yet");
        }
        return *static_cast<const int64_t*>(view.data);
    }

    int64_t default_handle() {
        std::call_once(made_default_, [this] { default_handle_ = new_cache(); });
        return default_handle_;
    }

    const StepAttributes attributes_;
    const Counted expected_;
    std::once_flag made_default_;
    int64_t default_handle_ = DEFAULT_HANDLE;
};

// Memory for the f32 forms of float16 tensors, kept for the next call of this thread.
float* converted(std::size_t which, int64_t count) {
    thread_local std::array<AlignedBuffer, 6> buffers;
    buffers[which].reserve(count * static_cast<int64_t>(sizeof(float)));
    return reinterpret_cast<float*>(buffers[which].data());
}

class SdpaKernel {
public:
    SdpaKernel(const CustomOp& op, const OrtApi* api, const OrtKernelInfo* info)
        : api(api),
          type_(static_cast<const Op&>(op).type),
          threads_(default_threads()),
          attributes_(read_attributes<SdpaAttributes>(api, info)) {}

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

// An input's or output's type, and its shape dimension by dimension, with
// the symbols that the graph has for the unknown ones.
struct KnownShape {
    int32_t type;
    std::vector<int64_t> sizes;
    std::vector<std::string> symbols;
};

KnownShape known_shape(const OrtApi* api, const OrtShapeInferContext* context, std::size_t index) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(call<ShapeInferContext_GetInputTypeShape>(api, context, index, &info));
    std::size_t rank = 0;
    check(call<GetDimensionsCount>(api, info, &rank));
    std::vector<const char*> symbols(rank, "");
    check(call<GetSymbolicDimensions>(api, info, symbols.data(), rank));
    KnownShape shape;
    check(call<GetTensorElementType>(api, info, &shape.type));
    shape.symbols.assign(symbols.begin(), symbols.end());
    shape.sizes.resize(rank);
    check(call<GetDimensions>(api, info, shape.sizes.data(), rank));
    return shape;
}

// onnxruntime takes an unknown size without a symbol for a real size of -1: it gets a symbol that nothing else has.
void name_unknown_sizes(KnownShape& shape) {
    static std::atomic<int> names{0};
    for (std::size_t i = 0; i < shape.sizes.size(); ++i) {
        if (shape.sizes[i] < 0 && shape.symbols[i].empty()) {
            shape.symbols[i] = "onnx_kivi_unknown_" + std::to_string(names++);
        }
    }
}

void set_shape(const OrtApi* api, OrtShapeInferContext* context, std::size_t index, KnownShape shape) {
    name_unknown_sizes(shape);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(call<CreateTensorTypeAndShapeInfo>(api, &info));
    std::vector<const char*> symbols;
    for (const std::string& symbol : shape.symbols) symbols.push_back(symbol.c_str());
    OrtStatus* status = call<SetTensorElementType>(api, info, shape.type);
    if (!status) status = call<SetDimensions>(api, info, shape.sizes.data(), shape.sizes.size());
    if (!status) status = call<SetSymbolicDimensions>(api, info, symbols.data(), symbols.size());
    if (!status) status = call<ShapeInferContext_SetOutputTypeShape>(api, context, index, info);
    call<ReleaseTensorTypeAndShapeInfo>(api, info);
    check(status);
}

// Output (B, Hq, S, Dv) from query (B, Hq, S, Dk) and value (B, Hkv, N, Dv). Of the ops that share a name onnxruntime
// asks only one, so the type comes from the query.
OrtStatus* infer_sdpa(const CustomOp* self, OrtShapeInferContext* context) {
    const Op& op = static_cast<const Op&>(*self);
    return guarded(op.api, [&] {
        KnownShape shape = known_shape(op.api, context, 0);
        const KnownShape value = known_shape(op.api, context, 2);
        if (shape.sizes.size() != 4 || value.sizes.size() != 4) return;
        shape.sizes[3] = value.sizes[3];
        shape.symbols[3] = value.symbols[3];
        set_shape(op.api, context, 0, shape);
    });
}

OrtStatus* infer_step(const CustomOp* self, OrtShapeInferContext* context) {
    const Op& op = static_cast<const Op&>(*self);
    return guarded(op.api, [&] {
        for (std::size_t i = 0; i < 2; ++i) set_shape(op.api, context, i, {INT64, {1}, {""}});
    });
}

const CustomOp* make_step(const OrtApi* api) {
    auto* const op = new Op{};
    set_common(*op, api);
    set_kernel<StepKernel>(*op);
    op->GetName = [](const CustomOp*) { return "KvCacheStep"; };
    op->GetInputTypeCount = op->GetOutputTypeCount = [](const CustomOp*) { return std::size_t{2}; };
    op->GetInputType = op->GetOutputType = [](const CustomOp*, std::size_t) { return int32_t{INT64}; };
    op->InferOutputShapeFn = infer_step;
    return op;
}

const CustomOp* make_sdpa(const OrtApi* api, ElementType type, bool infer_shapes) {
    auto* const op = new Op{};
    set_common(*op, api);
    set_kernel<SdpaKernel>(*op);
    op->type = type;
    op->GetName = [](const CustomOp*) { return "QuantizedKvSdpa"; };
    op->GetInputTypeCount = [](const CustomOp*) { return std::size_t{6}; };
    op->GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
    op->GetInputType = [](const CustomOp* self, std::size_t i) {
        return i == 5 ? int32_t{INT64} : int32_t{static_cast<const Op*>(self)->type};
    };
    op->GetOutputType = [](const CustomOp* self, std::size_t) { return int32_t{static_cast<const Op*>(self)->type}; };
    op->GetInputCharacteristic = [](const CustomOp*, std::size_t i) {
        return i == 3 || i == 4 ? int32_t{OPTIONAL} : int32_t{REQUIRED};
    };
    if (infer_shapes) op->InferOutputShapeFn = infer_sdpa;
    return op;
}

}  // namespace

std::vector<const CustomOp*> make_custom_ops(const OrtApi* api, bool infer_shapes) {
    return {make_step(api), make_sdpa(api, FLOAT, infer_shapes), make_sdpa(api, FLOAT16, infer_shapes),
            make_sdpa(api, BFLOAT16, infer_shapes)};
}

}  // namespace onnx_kivi::ort
