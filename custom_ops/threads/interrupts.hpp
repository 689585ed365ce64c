// Ctrl-C while a run computes: a signal handler takes note, and the run looks between its tasks.
#pragma once

#include "../store/error.hpp"

namespace onnx_kivi {

// Takes note of each SIGINT from now on, for runs of the calling thread, and hands it on to the handler that is there.
// False, and nothing is changed, where SIGINT is ignored or left to end the process.
KIVI_API bool watch_interrupts();

// One run of one thread: whether a SIGINT has come since the run began.
class InterruptWatch {
public:
    // For a run that begins on the calling thread.
    static InterruptWatch begin();
    bool is_interrupted() const;

private:
    bool watched_ = false;
    unsigned noted_ = 0;
};

}  // namespace onnx_kivi
