// Caches made, run, forked, moved, cropped, copied and closed by several threads at once, runs that fail among them.
// Usage: store_soak [steps of each thread] [threads] [seed]. Exits with 1 and says why if a cache is not what it was
// left as. What it is for is to run under sanitizers, and for long: it prints the resident memory as it goes.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../store/store.hpp"
#include "../threads/pool.hpp"

using namespace onnx_kivi;

namespace {

constexpr int64_t HEADS = 2, K_SIZE = 20, V_SIZE = 12, Q_HEADS = 4, NODES = 3, MOST_TOKENS = 400;

[[noreturn]] void fail(const std::string& what) {
    std::printf("store_soak: %s\n", what.c_str());
    std::exit(1);
}

// A cache and what it must hold; one thread at a time has it, but the caches that forks share blocks with are others'.
struct Held {
    int64_t handle;
    int64_t tokens = 0;
    int64_t rows = 1;
};

class Worker {
public:
    Worker(unsigned seed, std::vector<Held>& shared, std::mutex& mutex)
        : source_(seed), shared_(shared), mutex_(mutex), model_{"soak", NODES, SPEC_VERSION} {
        for (int64_t i = 0; i < NODES; ++i) nodes_.push_back(node(i));
    }

    void step() {
        Held held = take();
        switch (pick(0, 15)) {
            case 0: crop_cache(held.handle, held.tokens = pick(0, held.tokens)); break;
            case 1: fork(held); break;
            case 2: move_rows(held); break;
            case 3: reset_cache(held.handle), held.tokens = 0; break;
            case 4: close(held); return;
            case 5: run(held, 1, pick(1, NODES - 1), false); break;
            case 6: run(held, pick(1, 9), pick(1, NODES), true); break;
            case 7: measure(held); break;
            case 8: run(held, pick(20, 200), NODES, false); break;
            default: run(held, pick(1, 4), NODES, false);
        }
        if (held.tokens > MOST_TOKENS) crop_cache(held.handle, held.tokens = pick(0, MOST_TOKENS));
        if (cache_length(held.handle) != held.tokens) fail("a cache has not the length that it was left with");
        give(held);
    }

private:
    SdpaAttributes node(int64_t slot) {
        SdpaAttributes attributes;
        attributes.slot = slot;
        attributes.row.k_bits = attributes.row.v_bits = slot == 2 ? DENSE_BITS : slot == 1 ? 4 : 8;
        attributes.row.block_tokens = 16;
        attributes.row.residual_length = 8 * slot;
        attributes.row.v_group_size = 8;
        attributes.is_causal = 1;
        return attributes;
    }

    int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(source_); }

    Held take() {
        const std::lock_guard lock(mutex_);
        if (shared_.empty() || (shared_.size() < 40 && pick(0, 9) == 0)) return {new_cache()};
        std::swap(shared_[static_cast<std::size_t>(pick(0, static_cast<int64_t>(shared_.size()) - 1))], shared_.back());
        const Held held = shared_.back();
        shared_.pop_back();
        return held;
    }

    void give(const Held& held) {
        const std::lock_guard lock(mutex_);
        shared_.push_back(held);
    }

    void fork(const Held& held) {
        const bool whole = pick(0, 1) != 0;
        Held copy = held;
        copy.handle = whole ? fork_cache(held.handle) : new_cache(cache_snapshot(held.handle));
        give(copy);
    }

    void move_rows(Held& held) {
        if (held.tokens == 0) return;
        std::vector<int64_t> index(static_cast<std::size_t>(pick(1, 3)));
        for (int64_t& i : index) i = pick(0, held.rows - 1);
        reorder_cache(held.handle, index);
        held.rows = static_cast<int64_t>(index.size());
    }

    void close(const Held& held) {
        close_cache(held.handle);
        try {
            cache_length(held.handle);
        } catch (const Error&) {
            return;
        }
        fail("a closed cache was still open");
    }

    void measure(const Held& held) {
        const Snapshot snapshot = cache_snapshot(held.handle);
        if (nbytes(snapshot) > 4 * dense_nbytes(snapshot) || sealed_tokens(snapshot) > held.tokens) {
            fail("a cache is larger than its tokens");
        }
    }

    // Runs `nodes` of the model's; the last of them is given a mask of the wrong size if `fails`.
    void run(Held& held, int64_t count, int64_t nodes, bool fails) {
        if (held.tokens == 0) held.rows = pick(1, 3);
        const std::vector<float> key = numbers(held.rows * HEADS * count * K_SIZE);
        const std::vector<float> value = numbers(held.rows * HEADS * count * V_SIZE);
        const std::vector<float> query = numbers(held.rows * Q_HEADS * count * K_SIZE);
        std::vector<float> output(static_cast<std::size_t>(held.rows * Q_HEADS * count * V_SIZE));
        const float mask[3] = {};
        bool refused = false;
        const int64_t ticket = open_step(held.handle, COMMITTED_LENGTH, model_, true).second;
        for (int64_t i = 0; i < nodes; ++i) {
            Call call{{query.data(), {held.rows, Q_HEADS, count, K_SIZE}},
                      {key.data(), {held.rows, HEADS, count, K_SIZE}},
                      {value.data(), {held.rows, HEADS, count, V_SIZE}},
                      {nullptr, {0}},
                      {nullptr, {0}},
                      output.data()};
            if (fails && i == nodes - 1) call.attn_mask = {mask, {3}};
            try {
                attend(ticket, nodes_[static_cast<std::size_t>(i)], call, default_scheduler());
            } catch (const Error&) {
                refused = true;
            }
        }
        if (refused != fails) fail("a run was refused, or was not, against what it was given");
        if (nodes == NODES && !fails) held.tokens += count;
    }

    std::vector<float> numbers(int64_t count) {
        std::vector<float> made(static_cast<std::size_t>(count));
        for (float& x : made) x = static_cast<float>(source_() % 2001) / 1000.0F - 1;
        return made;
    }

    std::minstd_rand source_;
    std::vector<Held>& shared_;
    std::mutex& mutex_;
    const StepAttributes model_;
    std::vector<SdpaAttributes> nodes_;
};

long resident_kib() {
    long pages = 0;
    if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
        if (std::fscanf(file, "%*d %ld", &pages) != 1) pages = 0;
        std::fclose(file);
    }
    return pages * 4;
}

}  // namespace

int main(int argc, char** argv) {
    const long steps = argc > 1 ? std::atol(argv[1]) : 2000;
    const int threads = argc > 2 ? std::atoi(argv[2]) : 4;
    const unsigned seed = argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 1;
    std::vector<Held> shared;
    std::mutex mutex;
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
        pool.emplace_back([&, t] {
            Worker worker(seed * 1000 + static_cast<unsigned>(t), shared, mutex);
            for (long i = 0; i < steps; ++i) {
                worker.step();
                if (t == 0 && (i + 1) % std::max(steps / 10, 1L) == 0) {
                    std::printf("%ld steps of each thread, %ld KiB resident\n", i + 1, resident_kib());
                }
            }
        });
    }
    for (std::thread& thread : pool) thread.join();
    for (const Held& held : shared) close_cache(held.handle);
}
