// Caches made, run alone and together, forked, joined, cropped, copied and closed by several threads at once, runs that
// fail among them.
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

constexpr int64_t HEADS = 2, K_SIZE = 20, V_SIZE = 12, Q_HEADS = 4, NODES = 3, MOST_TOKENS = 400, WINDOW = 50;

constexpr std::size_t MOST_CACHES = 40;

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
        : source_(seed), shared_(shared), mutex_(mutex), model_{"soak", NODES, "", LAST_VERSION} {
        for (int64_t i = 0; i < NODES; ++i) nodes_.push_back(node(i));
    }

    void step() {
        Held held = take();
        switch (pick(0, 17)) {
            case 0: crop(held, pick(0, held.tokens)); break;
            case 1: fork(held); break;
            case 9: gather(held); break;
            case 10:
            case 11: run_together(held, pick(0, 4) == 0); break;
            case 2: move_rows(held); break;
            case 3: reset_cache(held.handle), held.tokens = 0; break;
            case 4: close(held); return;
            case 5: run(held, 1, pick(1, NODES - 1), false); break;
            case 6: run(held, pick(1, 9), pick(1, NODES), true); break;
            case 7: measure(held); break;
            case 8: run(held, pick(20, 200), NODES, false); break;
            default: run(held, pick(1, 4), NODES, false);
        }
        if (held.tokens > MOST_TOKENS) crop(held, pick(0, MOST_TOKENS));
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
        if (slot == 1) attributes.evict = 1, attributes.window = WINDOW;
        attributes.spec_version = LAST_VERSION;
        return attributes;
    }

    int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(source_); }

    Held take() {
        const std::lock_guard lock(mutex_);
        if (shared_.empty() || (shared_.size() < MOST_CACHES && pick(0, 9) == 0)) return {new_cache()};
        std::swap(shared_[static_cast<std::size_t>(pick(0, static_cast<int64_t>(shared_.size()) - 1))], shared_.back());
        const Held held = shared_.back();
        shared_.pop_back();
        return held;
    }

    void give(const Held& held) {
        const std::lock_guard lock(mutex_);
        shared_.push_back(held);
    }

    // So that there are not ever more caches.
    void give_or_close(const Held& held) {
        {
            const std::lock_guard lock(mutex_);
            if (shared_.size() < MOST_CACHES) return shared_.push_back(held);
        }
        close(held);
    }

    void fork(const Held& held) {
        const bool whole = pick(0, 1) != 0;
        Held copy = held;
        copy.handle = whole ? fork_cache(held.handle) : new_cache(cache_state(held.handle));
        give_or_close(copy);
    }

    // A crop to what the window has freed is refused.
    void crop(Held& held, int64_t tokens) {
        try {
            crop_rows(held.handle, std::vector<int64_t>(held.tokens ? static_cast<std::size_t>(held.rows) : 0, tokens));
            held.tokens = tokens;
        } catch (const Error&) {
            if (held.tokens < WINDOW) fail("a crop was refused that nothing stood against");
            reset_cache(held.handle);
            held.tokens = 0;
        }
    }

    void gather(const Held& held) {
        if (held.tokens == 0) return;
        Held copy{0, held.tokens, pick(1, 3)};
        std::vector<std::pair<int64_t, int64_t>> rows;
        for (int64_t i = 0; i < copy.rows; ++i) rows.emplace_back(held.handle, pick(0, held.rows - 1));
        copy.handle = gather_rows(rows);
        give_or_close(copy);
    }

    // The first row of this cache, in a cache of its own, and of others, as one batch.
    void run_together(const Held& held, bool fails) {
        std::vector<Held> rows{single(held)};
        for (int64_t others = pick(1, 3); others > 0; --others) {
            const Held other = take();
            rows.push_back(single(other));
            give(other);
        }
        std::vector<int64_t> handles, counts;
        for (const Held& row : rows) {
            handles.push_back(row.handle);
            counts.push_back(pick(1, 5));
        }
        const int64_t count = *std::max_element(counts.begin(), counts.end());
        const bool done = run_nodes(handles, counts, static_cast<int64_t>(rows.size()), count, NODES, fails);
        if (done == fails) fail("a run of several caches was refused, or was not, against what it was given");
        for (std::size_t i = 0; i < rows.size(); ++i) {
            if (done) rows[i].tokens += counts[i];
            if (cache_length(rows[i].handle) != rows[i].tokens) fail("a row has not the length that it was left with");
            give_or_close(rows[i]);
        }
    }

    Held single(const Held& held) {
        if (held.tokens == 0) return {new_cache()};
        return {gather_rows({{held.handle, 0}}), held.tokens};
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
        const State state = cache_state(held.handle);
        if (nbytes(state) > 4 * dense_nbytes(state) || sealed_tokens(state) > held.tokens) {
            fail("a cache is larger than its tokens");
        }
        if (cache_shared_nbytes(held.handle) > nbytes(state)) fail("a cache shares more than it holds");
    }

    // Runs `nodes` of the model's; the last of them is given a mask of the wrong size if `fails`.
    void run(Held& held, int64_t count, int64_t nodes, bool fails) {
        if (held.tokens == 0) held.rows = pick(1, 3);
        const bool done = run_nodes({held.handle}, {ALL_NEW}, held.rows, count, nodes, fails);
        if (done == fails) fail("a run was refused, or was not, against what it was given");
        if (nodes == NODES && !fails) held.tokens += count;
    }

    // Whether no node was refused.
    bool run_nodes(const std::vector<int64_t>& handles, const std::vector<int64_t>& counts, int64_t rows, int64_t count,
                   int64_t nodes, bool fails) {
        const std::vector<float> key = numbers(rows * HEADS * count * K_SIZE);
        const std::vector<float> value = numbers(rows * HEADS * count * V_SIZE);
        const std::vector<float> query = numbers(rows * Q_HEADS * count * K_SIZE);
        std::vector<float> output(static_cast<std::size_t>(rows * Q_HEADS * count * V_SIZE));
        const float mask[3] = {};
        bool refused = false;
        const int64_t ticket = open_rows(handles, {COMMITTED_LENGTH}, counts, model_, true).second;
        for (int64_t i = 0; i < nodes; ++i) {
            Call call{{query.data(), {rows, Q_HEADS, count, K_SIZE}},
                      {key.data(), {rows, HEADS, count, K_SIZE}},
                      {value.data(), {rows, HEADS, count, V_SIZE}},
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
        return !refused;
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
