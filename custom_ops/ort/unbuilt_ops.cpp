#include "op.hpp"
#include "ops.hpp"

namespace onnx_kivi::ort {

namespace {

// Refuses the node, and so the model, by the op's name.
struct NoKernel {
    NoKernel(const Op& op, const OrtApi* api, const OrtKernelInfo*) : api(api) {
        throw Error(ErrorKind::spec_mismatch,
                    std::string(op.name) +
                        ": expected an op that this version of onnx_kivi serves, got one that is "
                        "specified but not built yet; rewrite the original model without ghost I/O");
    }
    void compute(OrtKernelContext*) {}

    const OrtApi* const api;
};

bool is_control(std::size_t i) { return i < 2; }

}  // namespace

std::vector<const CustomOp*> make_unbuilt_ops(const OrtApi* api) {
    Op* const open = make_op(api, "CacheOpen", 2);
    Op* const stamp = make_op(api, "CacheStamp", 2);
    for (Op* const op : {open, stamp}) {
        set_kernel<NoKernel>(*op);
        op->GetInputTypeCount = [](const CustomOp*) { return std::size_t{4}; };
        op->GetOutputTypeCount = [](const CustomOp*) { return std::size_t{2}; };
        op->GetInputType = [](const CustomOp*, std::size_t i) { return int32_t{is_control(i) ? INT64 : FLOAT}; };
    }
    open->GetOutputType = [](const CustomOp*, std::size_t) { return int32_t{INT64}; };
    stamp->GetOutputType = [](const CustomOp*, std::size_t) { return int32_t{FLOAT}; };
    return {open, stamp};
}

}  // namespace onnx_kivi::ort
