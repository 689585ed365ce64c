#include "interrupts.hpp"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <mutex>

namespace onnx_kivi {

namespace {

std::atomic<unsigned> noted{0};  // SIGINTs so far
std::atomic<bool> watching{false};
std::atomic<pthread_t> watched{};  // the thread whose runs look, once watching
struct sigaction before;           // what was there

void note(int number, siginfo_t* info, void* context) {
    noted.fetch_add(1, std::memory_order_relaxed);
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else {
        before.sa_handler(number);
    }
}

bool is_handler(const struct sigaction& action) {
    return action.sa_flags & SA_SIGINFO || (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
}

bool is_same(const struct sigaction& a, const struct sigaction& b) {
    if ((a.sa_flags & SA_SIGINFO) != (b.sa_flags & SA_SIGINFO)) return false;
    return a.sa_flags & SA_SIGINFO ? a.sa_sigaction == b.sa_sigaction : a.sa_handler == b.sa_handler;
}

}  // namespace

bool watch_interrupts() {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    struct sigaction ours {};
    ours.sa_sigaction = note;
    ours.sa_flags = SA_SIGINFO;
    struct sigaction now {};
    if (sigaction(SIGINT, nullptr, &now) != 0 || !is_handler(now)) return false;
    if (!is_same(now, ours)) {
        // A handler that came after ours may call it: to call that one in turn would never end.
        if (watching && !is_same(now, before)) return false;
        before = now;
        ours.sa_flags |= now.sa_flags;
        ours.sa_mask = now.sa_mask;
        sigaction(SIGINT, &ours, nullptr);
    }
    watched = pthread_self();
    watching = true;
    return true;
}

InterruptWatch InterruptWatch::begin() {
    InterruptWatch watch;
    watch.watched_ = watching && pthread_equal(watched, pthread_self());
    watch.noted_ = noted.load(std::memory_order_relaxed);
    return watch;
}

bool InterruptWatch::is_interrupted() const { return watched_ && noted.load(std::memory_order_relaxed) != noted_; }

}  // namespace onnx_kivi
