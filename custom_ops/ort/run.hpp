// What the nodes of a run share: onnxruntime's threads, and how many nodes there are.
#pragma once

#include <atomic>
#include <stdexcept>

#include "../threads/interrupts.hpp"
#include "../threads/scheduler.hpp"
#include "api.hpp"

namespace onnx_kivi::ort {

// Over all sessions of the process: QuantizedKvSdpa nodes, and how many their models say they have.
inline std::atomic<int64_t> nodes_served{0}, nodes_expected{0};

// Adds to a count for as long as it lives.
class Counted {
public:
    Counted(std::atomic<int64_t>& count, int64_t amount) : count_(count), amount_(amount) { count_ += amount_; }
    ~Counted() { count_ -= amount_; }
    Counted(const Counted&) = delete;
    Counted& operator=(const Counted&) = delete;

private:
    std::atomic<int64_t>& count_;
    const int64_t amount_;
};

// onnxruntime's own threads, for a node of the run that the calling thread began last: all nodes run on one thread,
// unless the session's execution mode is parallel, in which no interrupt is seen.
class RuntimeThreads final : public Scheduler {
public:
    RuntimeThreads(const OrtApi* api, const OrtKernelContext* context, int threads)
        : api_(api), context_(context), threads_(threads), watch_(run()) {}
    static void begin_run() { run() = InterruptWatch::begin(); }

    int threads() const override { return threads_; }
    bool is_stopped() const override { return watch_.is_interrupted(); }
    void run(std::size_t count, void (*task)(void*, std::size_t), void* context) override {
        OrtStatus* status = call<KernelContext_ParallelFor>(api_, context_, task, count, std::size_t{0}, context);
        if (status == nullptr) return;
        const std::string message = call<GetErrorMessage>(api_, status);
        call<ReleaseStatus>(api_, status);
        throw std::runtime_error(message);
    }

private:
    static InterruptWatch& run() {
        thread_local InterruptWatch watch;
        return watch;
    }

    const OrtApi* api_;
    const OrtKernelContext* context_;
    const int threads_;
    const InterruptWatch watch_;
};

}  // namespace onnx_kivi::ort
