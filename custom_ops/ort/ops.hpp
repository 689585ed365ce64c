// The ops of the domain as onnxruntime custom ops, for sessions of one onnxruntime. They are stateless and never freed,
// because options and sessions hold them by pointer.
#pragma once

#include <vector>

#include "ort_abi.hpp"

namespace onnx_kivi::ort {

// KvCacheStep and KvCacheStepV2.
std::vector<const CustomOp*> make_step_ops(const OrtApi* api);

// QuantizedKvSdpa and QuantizedKvSdpaV2, each once for each element type. Without `infer_shapes` onnxruntime learns no
// output shape of theirs.
std::vector<const CustomOp*> make_sdpa_ops(const OrtApi* api, bool infer_shapes);

// CacheOpen and CacheStamp.
std::vector<const CustomOp*> make_ghost_ops(const OrtApi* api);

}  // namespace onnx_kivi::ort
