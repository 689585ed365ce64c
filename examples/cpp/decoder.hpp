// A rewritten decoder and its cache: tokens in, logits out, no Python.
#pragma once

#include <onnx_kivi.h>
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

// What a C function of the library gave. Throws if it failed.
inline int64_t checked(int64_t result) {
    if (result < 0) throw std::runtime_error(kivi_last_error());
    return result;
}

class Decoder {
public:
    // A decoder of the model, with an empty cache; `library` is libonnx_kivi.so.
    Decoder(const char* model, const char* library) : cache_(checked(kivi_new_cache())) {
        Ort::SessionOptions options;
        options.RegisterCustomOpsLibrary(library);
        session_ = Ort::Session(environment_, model, options);
        const Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
            inputs_.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
        }
        inputs_.emplace_back("cache_handle");  // it has a default, so it is not among those
        output_ = session_.GetOutputNameAllocated(0, allocator).get();
    }
    ~Decoder() { kivi_free_cache(cache_); }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    int64_t length() const { return checked(kivi_cache_length(cache_)); }
    int64_t bytes() const { return checked(kivi_cache_nbytes(cache_)); }
    int64_t quantized_tokens() const { return checked(kivi_cache_sealed_tokens(cache_)); }

    // Row i becomes the old row rows[i].
    void reorder(const std::vector<int64_t>& rows) {
        checked(kivi_reorder_cache(cache_, rows.data(), static_cast<int64_t>(rows.size())));
    }
    // Keeps the first `length` tokens of each row.
    void crop(int64_t length) { checked(kivi_crop_cache(cache_, length)); }

    void save(const std::string& path) const { checked(kivi_save_cache(cache_, path.c_str())); }
    void load(const std::string& path) {
        const int64_t loaded = checked(kivi_load_cache(path.c_str()));
        kivi_free_cache(cache_);
        cache_ = loaded;
    }

    // Appends to each row of the cache its tokens, equally many, and gives the logits of each row's last one.
    std::vector<std::vector<float>> step(const std::vector<std::vector<int64_t>>& rows) {
        const auto batch = static_cast<int64_t>(rows.size()), count = static_cast<int64_t>(rows[0].size());
        const int64_t past = length();
        std::vector<int64_t> tokens, positions, mask(static_cast<std::size_t>(batch * (past + count)), 1);
        for (const std::vector<int64_t>& row : rows) {
            tokens.insert(tokens.end(), row.begin(), row.end());
            positions.resize(tokens.size());
            std::iota(positions.end() - count, positions.end(), past);
        }
        std::vector<const char*> names;
        std::vector<Ort::Value> values;
        for (const std::string& name : inputs_) {
            names.push_back(name.c_str());
            if (name == "input_ids")
                values.push_back(tensor(tokens, {batch, count}));
            else if (name == "attention_mask")
                values.push_back(tensor(mask, {batch, past + count}));
            else if (name == "position_ids")
                values.push_back(tensor(positions, {batch, count}));
            else if (name == "cache_handle")
                values.push_back(Ort::Value::CreateTensor<int64_t>(memory_, &cache_, 1, &ONE, 1));
            else
                throw std::runtime_error("input " + name + ": expected input_ids, attention_mask or position_ids");
        }
        const char* const output = output_.c_str();
        const auto outputs = session_.Run(Ort::RunOptions{}, names.data(), values.data(), values.size(), &output, 1);
        const auto shape = outputs[0].GetTensorTypeAndShapeInfo().GetShape();  // (batch, tokens, vocabulary)
        const float* end = outputs[0].GetTensorData<float>();
        std::vector<std::vector<float>> logits;
        for (int64_t row = 0; row < batch; ++row) {
            end += shape[1] * shape[2];
            logits.emplace_back(end - shape[2], end);
        }
        return logits;
    }

private:
    static constexpr int64_t ONE = 1;

    Ort::Value tensor(std::vector<int64_t>& data, const std::vector<int64_t>& shape) const {
        return Ort::Value::CreateTensor<int64_t>(memory_, data.data(), data.size(), shape.data(), shape.size());
    }

    Ort::Env environment_{ORT_LOGGING_LEVEL_FATAL, "chat"};
    Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    Ort::Session session_{nullptr};
    std::vector<std::string> inputs_;
    std::string output_;
    int64_t cache_;
};
