// A custom op of ours as onnxruntime sees it: C callbacks over a kernel class, and the shapes of its outputs.
#pragma once

#include <string>
#include <vector>

#include "api.hpp"

namespace onnx_kivi::ort {

// Callbacks find here what they are not told.
struct Op : CustomOp {
    const char* name = nullptr;
    int64_t spec_version = FIRST_VERSION;  // that the op came with
    const OrtApi* api = nullptr;
    ElementType type = FLOAT;  // of the float tensors
};

inline const Op& op_of(const CustomOp* op) { return static_cast<const Op&>(*op); }

// An op of that name, never freed, because options and sessions hold it by pointer; it lacks inputs, outputs, kernel.
Op* make_op(const OrtApi* api, const char* name, int64_t spec_version);

// A node's state, and the C callbacks over it. Kernel has a constructor (op, api, info) and compute(context).
template <class Kernel>
void set_kernel(CustomOp& op) {
    op.CreateKernelV2 = [](const CustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
        return guarded(api, [&] { *kernel = new Kernel(op_of(self), api, info); });
    };
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        auto* const self = static_cast<Kernel*>(kernel);
        return guarded(self->api, [&] { self->compute(context); });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

// An input's or output's type, and its shape dimension by dimension, with
// the symbols that the graph has for the unknown ones.
struct KnownShape {
    int32_t type;
    std::vector<int64_t> sizes;
    std::vector<std::string> symbols;
};

KnownShape known_shape(const OrtApi* api, const OrtShapeInferContext* context, std::size_t index);
void set_shape(const OrtApi* api, OrtShapeInferContext* context, std::size_t index, KnownShape shape);

}  // namespace onnx_kivi::ort
