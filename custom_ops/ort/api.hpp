// onnxruntime's C API as C++ wants it: failures as exceptions inside a callback, as OrtStatus at its edge.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../store/attributes.hpp"
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

// Input `index`; of shape (0) if it is absent.
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

// The message of a status, which it releases; empty for success.
inline std::string take_message(const OrtApi* api, OrtStatus* status) {
    if (status == nullptr) return "";
    const std::string message = call<GetErrorMessage>(api, status);
    call<ReleaseStatus>(api, status);
    return message;
}

// Reads one attribute. The C API says in words only whether one is absent or of another type: so a name that no node
// has is asked for too, and what onnxruntime says of that is what it says of an absent one.
class AttributeReader {
public:
    AttributeReader(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

    bool read(const char* name, int64_t& value) const {
        int64_t found = 0;
        OrtStatus* status = call<KernelInfoGetAttribute_int64>(api_, info_, name, &found);
        if (!is_there(name, "int", status)) return false;
        value = found;
        return true;
    }

    bool read(const char* name, std::string& text) const {
        std::size_t size = 0;
        OrtStatus* status = get_string(name, nullptr, &size);
        if (!is_there(name, "string", status)) return false;
        text.resize(size);
        check(get_string(name, text.data(), &size));
        text.resize(size > 0 ? size - 1 : 0);  // without the terminating zero
        return true;
    }

    bool read(const char* name, double& value) const {
        std::string text;
        if (!read(name, text)) return false;
        value = parse_decimal(name, text);
        return true;
    }

    // Whether the node has an attribute of that name, of whatever type.
    bool has(const std::string& name) const {
        std::size_t size = 0;
        OrtStatus* status = get_string(name.c_str(), nullptr, &size);
        return status == nullptr || take_message(api_, status) != absence_of(name);
    }

private:
    OrtStatus* get_string(const char* name, char* text, std::size_t* size) const {
        return call<KernelInfoGetAttribute_string>(api_, info_, name, text, size);
    }

    bool is_there(const char* name, const char* type, OrtStatus* status) const {
        if (status == nullptr) return true;
        if (take_message(api_, status) != absence_of(name)) refuse_type(name, type, "another type");
        return false;
    }

    std::string absence_of(const std::string& name) const {
        const std::string nobody = "onnx_kivi_no_such_attribute";
        std::size_t size = 0;
        std::string absent = take_message(api_, get_string(nobody.c_str(), nullptr, &size));
        if (const auto at = absent.find(nobody); at != std::string::npos) absent.replace(at, nobody.size(), name);
        return absent;
    }

    const OrtApi* api_;
    const OrtKernelInfo* info_;
};

// Valid attributes of a node, of `version` unless it says another. Those that it lacks keep their defaults. Throws
// Error(config) if one has none, is of another type, or came with a later version, and as `validate` does.
template <class Attributes>
Attributes read_attributes(const OrtApi* api, const OrtKernelInfo* info, int64_t version) {
    const AttributeReader reader(api, info);
    reader.read("spec_version", version);
    check_version(version);
    const std::vector<std::string> known = field_names<Attributes>(version);
    for (const std::string& name : field_names<Attributes>(LAST_VERSION)) {
        const bool is_known = std::find(known.begin(), known.end(), name) != known.end();
        if (!is_known && reader.has(name)) refuse_unknown(name, known);
    }
    Attributes attributes;
    attributes.spec_version = version;
    int index = 0;
    Attributes::fields(attributes, version, [&](const char* name, auto& member) {
        if (!reader.read(name, member) && index < Attributes::REQUIRED) {
            throw Error(ErrorKind::config,
                        std::string("attribute ") + name + ": missing; rewrite the original model again");
        }
        ++index;
    });
    validate(attributes);
    return attributes;
}

}  // namespace onnx_kivi::ort
