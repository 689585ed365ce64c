#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <string>

#include "../store/error.hpp"

namespace onnx_kivi {

Pool::Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(std::size_t count, void (*task)(void*, std::size_t), void* context) {
    std::unique_lock job(job_mutex_, std::try_to_lock);
    if (!job || workers_.empty() || count < 2) {
        for (std::size_t i = 0; i < count; ++i) task(context, i);
        return;
    }
    {
        std::lock_guard lock(mutex_);
        task_ = task;
        context_ = context;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        ++generation_;
    }
    if (count == 2) {
        wake_.notify_one();
    } else {
        wake_.notify_all();
    }
    take_tasks(count);
    std::unique_lock lock(mutex_);
    count_ = 0;  // a worker that wakes late finds nothing to take
    idle_.wait(lock, [this] { return busy_ == 0; });
}

void Pool::work() {
    unsigned long seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        if (count_ == 0) continue;
        const std::size_t count = count_;
        ++busy_;
        lock.unlock();
        take_tasks(count);
        lock.lock();
        if (--busy_ == 0) idle_.notify_one();
    }
}

void Pool::take_tasks(std::size_t count) {
    for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task_(context_, i);
}

namespace {

int physical_cores() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
        std::string siblings;
        if (!std::getline(file, siblings)) siblings = "cpu " + std::to_string(cpu);
        cores.insert(siblings);
    }
    return cores.empty() ? 1 : static_cast<int>(cores.size());
}

std::atomic<bool> forked{false};
std::atomic<int> running{0};  // threads of the pool, once it has started

}  // namespace

int default_threads() {
    if (const int threads = running.load()) return threads;
    static const int cores = physical_cores();
    const char* text = std::getenv("ONNX_KIVI_THREADS");
    if (text == nullptr || *text == '\0') return cores;
    char* end = nullptr;
    const long threads = std::strtol(text, &end, 10);
    if (*end != '\0' || threads < 1 || threads > 1024) {
        throw Error(ErrorKind::config, std::string("ONNX_KIVI_THREADS: expected a number from 1 to 1024, got '") +
                                           text + "'; unset it to use the physical cores");
    }
    return static_cast<int>(threads);
}

Scheduler& default_scheduler() {
    // Never destroyed: at exit a worker may still be needed by, or asleep under, another static object.
    static Pool* const pool = [] {
        pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
        auto* const made = new Pool(default_threads());
        running.store(made->threads());
        return made;
    }();
    static Serial serial;
    if (forked.load(std::memory_order_relaxed)) return serial;
    return *pool;
}

}  // namespace onnx_kivi
