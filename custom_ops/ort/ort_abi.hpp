// The part of onnxruntime's C ABI that this library uses, because no Python package ships onnxruntime's headers.
//
// OrtApi is a table of function pointers that only ever grows at its end, so a function is known by its index and
// signature; OrtCustomOp likewise grows at its end and says with `version` how far it goes. Enumerations are int32_t.
// `checks/ort_abi_check.cpp` holds all of this to the official header, where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtApi;
struct OrtStatus;
struct OrtSessionOptions;
struct OrtValue;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;

namespace onnx_kivi::ort {

// The version that has all that is declared here (onnxruntime 1.17).
constexpr uint32_t API_VERSION = 17;

enum ErrorCode : int32_t { RUNTIME_EXCEPTION = 6, NOT_IMPLEMENTED = 9 };
enum ElementType : int32_t { FLOAT = 1, INT64 = 7, FLOAT16 = 10, BFLOAT16 = 16 };
enum Characteristic : int32_t { REQUIRED = 0, OPTIONAL = 1 };

struct ApiBase {
    const OrtApi* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};

struct CustomOp {
    uint32_t version;
    void* (*CreateKernel)(const CustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*GetName)(const CustomOp*);
    const char* (*GetExecutionProviderType)(const CustomOp*);
    int32_t (*GetInputType)(const CustomOp*, std::size_t);
    std::size_t (*GetInputTypeCount)(const CustomOp*);
    int32_t (*GetOutputType)(const CustomOp*, std::size_t);
    std::size_t (*GetOutputTypeCount)(const CustomOp*);
    void (*KernelCompute)(void*, OrtKernelContext*);
    void (*KernelDestroy)(void*);
    int32_t (*GetInputCharacteristic)(const CustomOp*, std::size_t);
    int32_t (*GetOutputCharacteristic)(const CustomOp*, std::size_t);
    int32_t (*GetInputMemoryType)(const CustomOp*, std::size_t);
    int (*GetVariadicInputMinArity)(const CustomOp*);
    int (*GetVariadicInputHomogeneity)(const CustomOp*);
    int (*GetVariadicOutputMinArity)(const CustomOp*);
    int (*GetVariadicOutputHomogeneity)(const CustomOp*);
    OrtStatus* (*CreateKernelV2)(const CustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
    OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const CustomOp*, OrtShapeInferContext*);
    int (*GetStartVersion)(const CustomOp*);
    int (*GetEndVersion)(const CustomOp*);
};

// The function at `Index` of OrtApi.
template <std::size_t Index, class Signature>
struct Function {
    static constexpr std::size_t INDEX = Index;
    using Pointer = Signature*;
};

template <class F, class... Arguments>
auto call(const OrtApi* api, Arguments... arguments) {
    const auto table = reinterpret_cast<const void* const*>(api);
    return reinterpret_cast<typename F::Pointer>(const_cast<void*>(table[F::INDEX]))(arguments...);
}

// Most functions return null, or a status that the caller releases.
template <std::size_t Index, class... Parameters>
using StatusFunction = Function<Index, OrtStatus*(Parameters...)>;

using CreateStatus = Function<0, OrtStatus*(int32_t, const char*)>;
using GetErrorMessage = Function<2, const char*(const OrtStatus*)>;
using CreateCustomOpDomain = StatusFunction<26, const char*, OrtCustomOpDomain**>;
using CustomOpDomain_Add = StatusFunction<27, OrtCustomOpDomain*, const CustomOp*>;
using AddCustomOpDomain = StatusFunction<28, OrtSessionOptions*, OrtCustomOpDomain*>;
using GetTensorMutableData = StatusFunction<51, OrtValue*, void**>;
using CreateTensorTypeAndShapeInfo = StatusFunction<57, OrtTensorTypeAndShapeInfo**>;
using SetTensorElementType = StatusFunction<58, OrtTensorTypeAndShapeInfo*, int32_t>;
using SetDimensions = StatusFunction<59, OrtTensorTypeAndShapeInfo*, const int64_t*, std::size_t>;
using GetTensorElementType = StatusFunction<60, const OrtTensorTypeAndShapeInfo*, int32_t*>;
using GetDimensionsCount = StatusFunction<61, const OrtTensorTypeAndShapeInfo*, std::size_t*>;
using GetDimensions = StatusFunction<62, const OrtTensorTypeAndShapeInfo*, int64_t*, std::size_t>;
using GetSymbolicDimensions = StatusFunction<63, const OrtTensorTypeAndShapeInfo*, const char**, std::size_t>;
using GetTensorTypeAndShape = StatusFunction<65, const OrtValue*, OrtTensorTypeAndShapeInfo**>;
using KernelInfoGetAttribute_int64 = StatusFunction<86, const OrtKernelInfo*, const char*, int64_t*>;
using KernelInfoGetAttribute_string = StatusFunction<87, const OrtKernelInfo*, const char*, char*, std::size_t*>;
using KernelContext_GetInput = StatusFunction<90, const OrtKernelContext*, std::size_t, const OrtValue**>;
using KernelContext_GetOutput =
    StatusFunction<91, OrtKernelContext*, std::size_t, const int64_t*, std::size_t, OrtValue**>;
using ReleaseStatus = Function<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Function<99, void(OrtTensorTypeAndShapeInfo*)>;
using ShapeInferContext_GetInputTypeShape =
    StatusFunction<268, const OrtShapeInferContext*, std::size_t, OrtTensorTypeAndShapeInfo**>;
using ShapeInferContext_SetOutputTypeShape =
    StatusFunction<270, const OrtShapeInferContext*, std::size_t, const OrtTensorTypeAndShapeInfo*>;
using SetSymbolicDimensions = StatusFunction<271, OrtTensorTypeAndShapeInfo*, const char**, std::size_t>;
using KernelContext_ParallelFor =
    StatusFunction<274, const OrtKernelContext*, void (*)(void*, std::size_t), std::size_t, std::size_t, void*>;

}  // namespace onnx_kivi::ort
