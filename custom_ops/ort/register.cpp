// RegisterCustomOps: what onnxruntime calls when a session's options name this library.
#include <cstdio>
#include <map>
#include <mutex>

#include "../store/kernel_choice.hpp"
#include "../threads/pool.hpp"
#include "api.hpp"
#include "ops.hpp"

namespace onnx_kivi::ort {

namespace {

// Before 1.24 onnxruntime crashes when it infers the shapes of a custom op that lacks an optional input.
bool infers_shapes(const ApiBase* base) {
    int major = 0, minor = 0;
    std::sscanf(base->GetVersionString(), "%d.%d", &major, &minor);
    return major > 1 || minor >= 24;
}

// One domain for each onnxruntime in the process: options hold it by pointer and never release it.
OrtCustomOpDomain* domain(const OrtApi* api, bool infer_shapes) {
    static std::mutex mutex;
    static auto* const domains = new std::map<const OrtApi*, OrtCustomOpDomain*>;
    const std::lock_guard lock(mutex);
    OrtCustomOpDomain*& domain = (*domains)[api];
    if (domain == nullptr) {
        OrtCustomOpDomain* made = nullptr;
        check(call<CreateCustomOpDomain>(api, "onnx_kivi", &made));
        for (const auto& ops : {make_step_ops(api), make_sdpa_ops(api, infer_shapes), make_ghost_ops(api)}) {
            for (const CustomOp* op : ops) check(call<CustomOpDomain_Add>(api, made, op));
        }
        domain = made;
    }
    return domain;
}

}  // namespace

extern "C" KIVI_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const ApiBase* base) {
    const OrtApi* api = base->GetApi(API_VERSION);
    if (api == nullptr) {
        const std::string message = "onnx_kivi: expected onnxruntime 1." + std::to_string(API_VERSION) +
                                    " or later, got " + base->GetVersionString() + "; upgrade onnxruntime";
        return call<CreateStatus>(base->GetApi(1), int32_t{NOT_IMPLEMENTED}, message.c_str());
    }
    return guarded(api, [&] {
        active_kernel();  // what the environment asks for is refused here, not in the first run
        default_threads();
        check(call<AddCustomOpDomain>(api, options, domain(api, infers_shapes(base))));
    });
}

}  // namespace onnx_kivi::ort
