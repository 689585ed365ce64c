#include "op.hpp"

#include <atomic>

namespace onnx_kivi::ort {

namespace {

// onnxruntime takes an unknown size without a symbol for a real size of -1: it gets a symbol that nothing else has.
void name_unknown_sizes(KnownShape& shape) {
    static std::atomic<int> names{0};
    for (std::size_t i = 0; i < shape.sizes.size(); ++i) {
        if (shape.sizes[i] < 0 && shape.symbols[i].empty()) {
            shape.symbols[i] = "onnx_kivi_unknown_" + std::to_string(names++);
        }
    }
}

}  // namespace

Op* make_op(const OrtApi* api, const char* name, int64_t spec_version) {
    auto* const op = new Op{};
    op->name = name;
    op->spec_version = spec_version;
    op->api = api;
    op->version = API_VERSION;
    op->GetName = [](const CustomOp* self) { return op_of(self).name; };
    op->GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    op->GetInputMemoryType = [](const CustomOp*, std::size_t) { return int32_t{0}; };
    op->GetInputCharacteristic = [](const CustomOp*, std::size_t) { return int32_t{REQUIRED}; };
    op->GetOutputCharacteristic = [](const CustomOp*, std::size_t) { return int32_t{REQUIRED}; };
    op->GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
    op->GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
    op->GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
    op->GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    op->GetStartVersion = [](const CustomOp*) { return 1; };
    op->GetEndVersion = [](const CustomOp*) { return INT32_MAX; };
    return op;
}

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

}  // namespace onnx_kivi::ort
