// onnxruntime's C API as C++ wants it: failures as exceptions inside a callback, as OrtStatus at its edge.
#pragma once

#include <string>
#include <vector>

#include "../store/error.hpp"
#include "ort_abi.hpp"

namespace onnx_kivi::ort {

// A status that onnxruntime returned, on its way out of our callback.
struct Failure {
    OrtStatus* status;
};

inline void check(OrtStatus* status) {
    if (status != nullptr) throw Failure{status};
}

// A status with the message of `error`, led by the class that onnx_kivi.errors has for it.
inline OrtStatus* status_of(const OrtApi* api, const Error& error) {
    return call<CreateStatus>(api, int32_t{RUNTIME_EXCEPTION},
                              (std::string("onnx_kivi ") + class_name(error.kind) + ": " + error.what()).c_str());
}

// Runs the body of a callback; whatever it throws becomes a status.
template <class Body>
OrtStatus* guarded(const OrtApi* api, const Body& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const Error& error) {
        return status_of(api, error);
    } catch (const std::exception& error) {
        return call<CreateStatus>(api, int32_t{RUNTIME_EXCEPTION}, error.what());
    } catch (...) {
        return call<CreateStatus>(api, int32_t{RUNTIME_EXCEPTION}, "onnx_kivi: unknown exception");
    }
}

// Shape of a tensor and where its elements are.
struct TensorView {
    void* data = nullptr;
    std::vector<int64_t> shape;
};

inline std::vector<int64_t> take_shape(const OrtApi* api, OrtTensorTypeAndShapeInfo* info) {
    std::size_t rank = 0;
    OrtStatus* status = call<GetDimensionsCount>(api, info, &rank);
    std::vector<int64_t> shape(rank);
    if (status == nullptr) status = call<GetDimensions>(api, info, shape.data(), rank);
    call<ReleaseTensorTypeAndShapeInfo>(api, info);
    check(status);
    return shape;
}

// Input `index`; size 0 if it is absent.
inline TensorView input(const OrtApi* api, const OrtKernelContext* context, std::size_t index) {
    const OrtValue* value = nullptr;
    check(call<KernelContext_GetInput>(api, context, index, &value));
    TensorView view;
    view.shape = {0};
    if (value == nullptr) return view;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(call<GetTensorTypeAndShape>(api, value, &info));
    view.shape = take_shape(api, info);
    check(call<GetTensorMutableData>(api, const_cast<OrtValue*>(value), &view.data));
    return view;
}

template <class T>
T* output(const OrtApi* api, OrtKernelContext* context, std::size_t index, const std::vector<int64_t>& shape) {
    OrtValue* value = nullptr;
    check(call<KernelContext_GetOutput>(api, context, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(call<GetTensorMutableData>(api, value, &data));
    return static_cast<T*>(data);
}

// Attributes of a node. Those that it lacks keep their defaults; throws Error(config) if one has none.
template <class Attributes, class Parse>
Attributes read_attributes(const OrtApi* api, const OrtKernelInfo* info, const Parse& parse) {
    Attributes attributes;
    int index = 0;
    Attributes::fields(attributes, [&](const char* name, auto& member) {
        OrtStatus* status = nullptr;
        if constexpr (std::is_same_v<decltype(member), int64_t&>) {
            int64_t value = 0;
            status = call<KernelInfoGetAttribute_int64>(api, info, name, &value);
            if (status == nullptr) member = value;
        } else {
            std::size_t size = 0;
            status = call<KernelInfoGetAttribute_string>(api, info, name, static_cast<char*>(nullptr), &size);
            if (status == nullptr) {
                std::string text(size, '\0');
                check(call<KernelInfoGetAttribute_string>(api, info, name, text.data(), &size));
                text.resize(size > 0 ? size - 1 : 0);  // without the terminating zero
                parse(name, text, member);
            }
        }
        if (status != nullptr) {
            call<ReleaseStatus>(api, status);
            if (index < Attributes::REQUIRED) {
                throw Error(ErrorKind::config,
                            std::string("attribute ") + name + ": missing; rewrite the original model again");
            }
        }
        ++index;
    });
    return attributes;
}

}  // namespace onnx_kivi::ort
