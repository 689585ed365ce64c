// Holds ort_abi.hpp to onnxruntime's official header: compiles if every index, signature and field is right.
#include <onnxruntime_c_api.h>

#include <type_traits>

#include "../ort/ort_abi.hpp"

#pragma GCC diagnostic ignored "-Wignored-attributes"  // the official functions must not have their results ignored

namespace {

using namespace onnx_kivi;

// The official types with what may differ taken away: enumerations are int32_t, noexcept is not part of a pointer,
// and the two structures that ort_abi.hpp declares anew are the official ones.
template <class T>
struct Plain {
    using Type = T;
};
template <class T>
requires std::is_enum_v<T>
struct Plain<T> {
    static_assert(sizeof(T) == sizeof(int32_t));
    using Type = int32_t;
};
template <>
struct Plain<OrtCustomOp> {
    using Type = ort::CustomOp;
};
template <class T>
struct Plain<const T> {
    using Type = const typename Plain<T>::Type;
};
template <class T>
struct Plain<T*> {
    using Type = typename Plain<T>::Type*;
};
template <class R, class... A>
struct Plain<R(A...)> {
    using Type = typename Plain<R>::Type(typename Plain<A>::Type...);
};
template <class R, class... A>
struct Plain<R(A...) noexcept> {
    using Type = typename Plain<R>::Type(typename Plain<A>::Type...);
};
template <class T>
using plain = typename Plain<T>::Type;

#define CHECK_FUNCTION(name)                                                          \
    static_assert(offsetof(OrtApi, name) == ort::name::INDEX * sizeof(void*), #name); \
    static_assert(std::is_same_v<plain<decltype(OrtApi::name)>, ort::name::Pointer>, #name)

CHECK_FUNCTION(CreateStatus);
CHECK_FUNCTION(GetErrorMessage);
CHECK_FUNCTION(CreateCustomOpDomain);
CHECK_FUNCTION(CustomOpDomain_Add);
CHECK_FUNCTION(AddCustomOpDomain);
CHECK_FUNCTION(GetTensorMutableData);
CHECK_FUNCTION(CreateTensorTypeAndShapeInfo);
CHECK_FUNCTION(SetTensorElementType);
CHECK_FUNCTION(SetDimensions);
CHECK_FUNCTION(GetTensorElementType);
CHECK_FUNCTION(GetDimensionsCount);
CHECK_FUNCTION(GetDimensions);
CHECK_FUNCTION(GetSymbolicDimensions);
CHECK_FUNCTION(GetTensorTypeAndShape);
CHECK_FUNCTION(KernelInfoGetAttribute_int64);
CHECK_FUNCTION(KernelInfoGetAttribute_string);
CHECK_FUNCTION(KernelContext_GetInput);
CHECK_FUNCTION(KernelContext_GetOutput);
CHECK_FUNCTION(ReleaseStatus);
CHECK_FUNCTION(ReleaseTensorTypeAndShapeInfo);
CHECK_FUNCTION(ShapeInferContext_GetInputTypeShape);
CHECK_FUNCTION(ShapeInferContext_SetOutputTypeShape);
CHECK_FUNCTION(SetSymbolicDimensions);
CHECK_FUNCTION(KernelContext_ParallelFor);

#define CHECK_FIELD(ours, theirs, name)                                   \
    static_assert(offsetof(ours, name) == offsetof(theirs, name), #name); \
    static_assert(std::is_same_v<plain<decltype(theirs::name)>, decltype(ours::name)>, #name)

CHECK_FIELD(ort::ApiBase, OrtApiBase, GetApi);
CHECK_FIELD(ort::ApiBase, OrtApiBase, GetVersionString);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, version);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, CreateKernel);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetName);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetExecutionProviderType);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetInputType);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetInputTypeCount);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetOutputType);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetOutputTypeCount);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, KernelCompute);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, KernelDestroy);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetInputCharacteristic);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetOutputCharacteristic);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetInputMemoryType);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetVariadicInputMinArity);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetVariadicInputHomogeneity);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetVariadicOutputMinArity);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetVariadicOutputHomogeneity);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, CreateKernelV2);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, KernelComputeV2);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, InferOutputShapeFn);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetStartVersion);
CHECK_FIELD(ort::CustomOp, OrtCustomOp, GetEndVersion);

static_assert(ort::API_VERSION <= ORT_API_VERSION);
static_assert(int(ort::RUNTIME_EXCEPTION) == ORT_RUNTIME_EXCEPTION && int(ort::NOT_IMPLEMENTED) == ORT_NOT_IMPLEMENTED);
static_assert(int(ort::FLOAT) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(int(ort::INT64) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(int(ort::FLOAT16) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
static_assert(int(ort::BFLOAT16) == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
static_assert(int(ort::REQUIRED) == INPUT_OUTPUT_REQUIRED && int(ort::OPTIONAL) == INPUT_OUTPUT_OPTIONAL);

}  // namespace
