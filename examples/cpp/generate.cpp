// Generates tokens with a rewritten model from C++: greedy, no Python, the cache quantized inside the process.
//
//   generate MODEL.onnx LIBONNX_KIVI.so COUNT TOKEN [TOKEN ...]
//
// prints COUNT new tokens, then what the cache holds. Build it against onnxruntime's headers (Debian: package
// libonnxruntime-dev) and library, and libonnx_kivi with its header:
//
//   g++ -std=c++20 generate.cpp -I ONNXRUNTIME/include -I ONNX_KIVI/include libonnxruntime.so libonnx_kivi.so -o
//   generate
//
// `python -c "import onnx_kivi; print(onnx_kivi.library_path())"` says where an installed package has the library; the
// folder `include` is beside it.
#include <onnx_kivi.h>
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

int64_t checked(int64_t result) {
    if (result < 0) throw std::runtime_error(kivi_last_error());
    return result;
}

class Decoder {
public:
    Decoder(const char* model, const char* library) : cache_(checked(kivi_new_cache())) {
        Ort::SessionOptions options;
        options.RegisterCustomOpsLibrary(library);
        session_ = Ort::Session(environment_, model, options);
        const Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
            inputs_.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
        }
        output_ = session_.GetOutputNameAllocated(0, allocator).get();
    }
    ~Decoder() { kivi_free_cache(cache_); }

    int64_t cache() const { return cache_; }

    // Appends `tokens` to the cache and gives the token that most likely follows.
    int64_t step(std::vector<int64_t> tokens) {
        const auto count = static_cast<int64_t>(tokens.size()), past = checked(kivi_cache_length(cache_));
        std::vector<int64_t> positions(tokens.size()), mask(tokens.size() + static_cast<std::size_t>(past), 1);
        std::iota(positions.begin(), positions.end(), past);
        std::vector<const char*> names;
        std::vector<Ort::Value> values;
        const auto feed = [&](const std::string& name, std::vector<int64_t>& data, std::vector<int64_t> shape) {
            names.push_back(name.c_str());
            values.push_back(
                Ort::Value::CreateTensor<int64_t>(memory_, data.data(), data.size(), shape.data(), shape.size()));
        };
        std::vector<int64_t> handle{cache_};
        for (const std::string& name : inputs_) {
            if (name == "input_ids")
                feed(name, tokens, {1, count});
            else if (name == "attention_mask")
                feed(name, mask, {1, past + count});
            else if (name == "position_ids")
                feed(name, positions, {1, count});
            else
                throw std::runtime_error("input " + name + ": expected input_ids, attention_mask or position_ids");
        }
        const std::string handle_name = "cache_handle";
        feed(handle_name, handle, {1});
        const char* const output = output_.c_str();
        const auto outputs = session_.Run(Ort::RunOptions{}, names.data(), values.data(), values.size(), &output, 1);
        const auto shape = outputs[0].GetTensorTypeAndShapeInfo().GetShape();  // (1, tokens, vocabulary)
        const float* const last = outputs[0].GetTensorData<float>() + (shape[1] - 1) * shape[2];
        return std::max_element(last, last + shape[2]) - last;
    }

private:
    Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "generate"};
    Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    Ort::Session session_{nullptr};
    std::vector<std::string> inputs_;
    std::string output_;
    int64_t cache_;
};

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 5) throw std::runtime_error("usage: generate MODEL.onnx LIBONNX_KIVI.so COUNT TOKEN [TOKEN ...]");
    Decoder decoder(argv[1], argv[2]);
    std::vector<int64_t> prompt;
    for (int i = 4; i < argc; ++i) prompt.push_back(std::atoll(argv[i]));
    int64_t token = decoder.step(prompt);
    for (int left = std::atoi(argv[3]); left > 0; --left) {
        std::printf("%lld ", static_cast<long long>(token));
        if (left > 1) token = decoder.step({token});
    }
    std::printf("\n%lld tokens in %lld bytes, %lld of them quantized\n",
                static_cast<long long>(kivi_cache_length(decoder.cache())),
                static_cast<long long>(kivi_cache_nbytes(decoder.cache())),
                static_cast<long long>(kivi_cache_sealed_tokens(decoder.cache())));
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
