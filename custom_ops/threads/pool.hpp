// A minimal thread pool whose workers sleep between jobs, so that they never take a core from onnxruntime's threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "../store/error.hpp"
#include "scheduler.hpp"

namespace onnx_kivi {

// One job at a time: a caller that finds the pool taken (another cache is being attended to) runs its tasks alone.
class Pool final : public Scheduler {
public:
    explicit Pool(int threads);
    ~Pool() override;

    int threads() const override { return static_cast<int>(workers_.size()) + 1; }
    void run(std::size_t count, void (*task)(void*, std::size_t), void* context) override;

private:
    void work();
    void take_tasks(std::size_t count);

    std::mutex job_mutex_;  // held by the caller whose job is running
    std::mutex mutex_;      // guards what follows, up to the atomics
    std::condition_variable wake_, idle_;
    unsigned long generation_ = 0;
    int busy_ = 0;
    bool stop_ = false;
    std::size_t count_ = 0;
    void (*task_)(void*, std::size_t) = nullptr;
    void* context_ = nullptr;
    std::atomic<std::size_t> next_{0};
    std::vector<std::thread> workers_;
};

// The process's pool, started at first use. Its size is ONNX_KIVI_THREADS, by default the physical cores that this
// process may run on. In the child of a fork, which has no such threads, it is a pool of one.
KIVI_API Scheduler& default_scheduler();

// The size that default_scheduler() has, or would have if it started now. Throws Error(config) if ONNX_KIVI_THREADS is
// not a number >= 1.
KIVI_API int default_threads();

}  // namespace onnx_kivi
