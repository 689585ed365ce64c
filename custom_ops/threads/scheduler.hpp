// Runs independent tasks; who lends the threads (our pool, onnxruntime's) is behind this interface.
#pragma once

#include <cstddef>

namespace onnx_kivi {

class Scheduler {
public:
    virtual ~Scheduler() = default;

    // Threads that may run tasks at once, the caller's included; plans are made for this number.
    virtual int threads() const = 0;

    // Whether the run is given up: tasks that have not begun may be left out, and the node then fails.
    virtual bool is_stopped() const { return false; }

    // Calls task(context, i) once for every i < count, in any order, and returns when all are done.
    // Tasks must not throw.
    virtual void run(std::size_t count, void (*task)(void* context, std::size_t i), void* context) = 0;

    // The same for any callable of one index.
    template <class Task>
    void for_each(std::size_t count, const Task& task) {
        if (count == 1) {
            task(0);
        } else if (count > 1) {
            run(
                count, [](void* context, std::size_t i) { (*static_cast<const Task*>(context))(i); },
                const_cast<Task*>(&task));
        }
    }
};

// The caller's thread alone.
class Serial final : public Scheduler {
public:
    int threads() const override { return 1; }
    void run(std::size_t count, void (*task)(void*, std::size_t), void* context) override {
        for (std::size_t i = 0; i < count; ++i) task(context, i);
    }
};

}  // namespace onnx_kivi
