// The two ops of the domain as onnxruntime custom ops.
#pragma once

#include <vector>

#include "ort_abi.hpp"

namespace onnx_kivi::ort {

// All of them, for sessions of one onnxruntime; QuantizedKvSdpa once for each element type. They are stateless and
// never freed, because options and sessions hold them by pointer. Without `infer_shapes` onnxruntime learns no output
// shape of QuantizedKvSdpa.
std::vector<const CustomOp*> make_custom_ops(const OrtApi* api, bool infer_shapes);

}  // namespace onnx_kivi::ort
