#include "store.hpp"

#include <algorithm>
#include <shared_mutex>
#include <unordered_map>

#include "gather.hpp"
#include "node.hpp"
#include "opening.hpp"

namespace onnx_kivi {

namespace {

// A handle that names steps of several caches, one after the other.
struct WideHandle {
    std::weak_ptr<Step> step;
    uint32_t sequence = 0;
};

struct Registry {
    std::shared_mutex mutex;
    int64_t last_handle = 0;
    std::unordered_map<int64_t, CachePtr> caches;
    std::unordered_map<std::string, int64_t> defaults;  // by model_id
    std::unordered_map<int64_t, WideHandle> wide;

    int64_t next_handle() {
        if (last_handle > INT32_MAX - 2) throw_cache_error("new cache: expected a free handle below 2^31, got none");
        return last_handle += 2;
    }
};

// Never destroyed: a session that outlives this library's static objects may still run.
Registry& registry() {
    static auto* const the = new Registry;
    return *the;
}

CachePtr find(int64_t handle) {
    Registry& all = registry();
    const std::shared_lock lock(all.mutex);
    const auto found = all.caches.find(handle);
    return found == all.caches.end() ? nullptr : found->second;
}

// Caches, each locked, in the order of their handles, so that two runs can't wait for each other.
class Locked {
public:
    explicit Locked(const std::vector<CachePtr>& caches) {
        if (caches.size() == 1) {
            only_ = std::unique_lock(caches[0]->mutex);
        } else {
            lock_all(caches);
        }
    }

private:
    void lock_all(const std::vector<CachePtr>& caches) {
        std::vector<Cache*> in_order;
        for (const CachePtr& cache : caches) in_order.push_back(cache.get());
        std::sort(in_order.begin(), in_order.end(), [](auto* a, auto* b) { return a->handle < b->handle; });
        for (Cache* cache : in_order) all_.emplace_back(cache->mutex);
    }

    std::unique_lock<std::mutex> only_;
    std::vector<std::unique_lock<std::mutex>> all_;
};

// Throws about the closed cache with the lowest handle. `handle_of(i)` is that of cache i.
template <class HandleOf>
void check_open(const std::vector<CachePtr>& caches, const HandleOf& handle_of) {
    std::optional<std::size_t> closed;
    for (std::size_t i = 0; i < caches.size(); ++i) {
        const bool is_open = caches[i] && !caches[i]->is_closed;
        if (!is_open && (!closed || handle_of(i) < handle_of(*closed))) closed = i;
    }
    if (!closed) return;
    const std::string row = caches.size() > 1 ? "row " + std::to_string(*closed) + ": " : "";
    throw_cache_error(row + "cache " + std::to_string(handle_of(*closed)) +
                      ": expected an open handle, got one that is closed or was never given out");
}

// Open caches by handle, locked.
struct Opened {
    explicit Opened(const std::vector<int64_t>& handles) : caches(found(handles)), locked(caches) {
        check_open(caches, [&](std::size_t i) { return handles[i]; });
    }

    static std::vector<CachePtr> found(const std::vector<int64_t>& handles) {
        std::vector<CachePtr> caches;
        for (const int64_t handle : handles) caches.push_back(find(handle));
        if (std::find(caches.begin(), caches.end(), nullptr) != caches.end()) {
            check_open(caches, [&](std::size_t i) { return handles[i]; });
        }
        return caches;
    }

    const std::vector<CachePtr> caches;
    const Locked locked;
};

int64_t add(Registry& all, State&& state) {
    const int64_t handle = all.next_handle();
    all.caches.emplace(handle, std::make_shared<Cache>(handle, std::move(state)));
    return handle;
}

int64_t default_cache(const std::string& model_id) {
    Registry& all = registry();
    const std::unique_lock lock(all.mutex);
    const auto found = all.defaults.find(model_id);
    if (found != all.defaults.end()) return found->second;
    return all.defaults[model_id] = add(all, {});
}

// Opens a step over several caches, under a handle that no other open step has.
template <class Open>
std::shared_ptr<Step> open_wide(const Open& open) {
    Registry& all = registry();
    const std::unique_lock lock(all.mutex);
    auto free =
        std::find_if(all.wide.begin(), all.wide.end(), [](const auto& entry) { return entry.second.step.expired(); });
    if (free == all.wide.end()) free = all.wide.emplace(all.next_handle(), WideHandle()).first;
    auto& [handle, entry] = *free;
    std::shared_ptr<Step> step = open(handle << 32 | entry.sequence++);
    entry.step = step;
    return step;
}

std::shared_ptr<Step> find_wide(int64_t ticket) {
    std::shared_ptr<Step> step;
    {
        Registry& all = registry();
        const std::shared_lock lock(all.mutex);
        const auto found = all.wide.find(ticket >> 32);
        if (found != all.wide.end()) step = found->second.step.lock();
    }
    return step && step->ticket == ticket ? step : nullptr;
}

// The step that is open on this cache alone, if this is its ticket.
std::shared_ptr<Step> own_step(const Cache& cache, int64_t ticket) {
    if (cache.step && cache.step->ticket == ticket) return cache.step;
    if (!cache.step && ticket == cache.ticket() && cache.state.step) {
        cache.refuse("expected " + std::to_string(cache.state.step->layers) +
                     " nodes to take this step's ticket, got one more; rewrite the original model again");
    }
    cache.refuse(
        "expected the ticket of its open step, got a stale one: another run on this handle started, or the cache was "
        "changed, during this run; give each of the runs its own cache");
}

// The caches of an open step that has not failed, locked.
struct Current {
    explicit Current(const Step& step) : locked(step.caches) {
        check_open(step.caches, [&](std::size_t i) { return step.caches[i]->handle; });
        step.check_current();
    }

    const Locked locked;
};

std::shared_ptr<Step> find_step(int64_t ticket) {
    if (std::shared_ptr<Step> step = find_wide(ticket)) return step;
    const Opened opened({ticket >> 32});
    return own_step(*opened.caches[0], ticket);
}

// One cache locked, for as long as `use` of it runs.
template <class Use>
auto with(int64_t handle, const Use& use) {
    const Opened opened({handle});
    return use(*opened.caches[0]);
}

}  // namespace

int64_t new_cache(State state) {
    Registry& all = registry();
    const std::unique_lock lock(all.mutex);
    return add(all, std::move(state));
}

void close_cache(int64_t handle) {
    with(handle, [](Cache& cache) {
        cache.become({});
        cache.is_closed = true;
    });
    Registry& all = registry();
    const std::unique_lock lock(all.mutex);
    all.caches.erase(handle);
    std::erase_if(all.defaults, [handle](const auto& entry) { return entry.second == handle; });
}

std::pair<std::vector<int64_t>, int64_t> open_rows(std::vector<int64_t> handles,
                                                   const std::vector<int64_t>& past_lengths,
                                                   const std::vector<int64_t>& new_lengths,
                                                   const StepAttributes& attributes, bool has_all_nodes) {
    check_rows(handles);
    if (handles == std::vector{DEFAULT_HANDLE}) handles = {default_cache(attributes.model_id)};
    const Opened opened(handles);
    const std::vector<CachePtr>& caches = opened.caches;
    const std::vector<std::vector<int64_t>> kept =
        check_lengths(caches, past_lengths, new_lengths, attributes, has_all_nodes);
    std::vector<std::optional<State>> cut;
    std::vector<int64_t> past;
    for (std::size_t i = 0; i < caches.size(); ++i) {
        const std::vector<int64_t>& held = caches[i]->state.lengths;
        const bool keeps_all = held.empty() || kept[i] == held;
        cut.push_back(keeps_all ? std::nullopt : std::optional(caches[i]->cropped(kept[i])));
        past.insert(past.end(), kept[i].begin(), kept[i].end());
    }
    const bool is_alone = caches.size() == 1 && (cut[0] ? *cut[0] : caches[0]->state).lengths.empty();
    if (is_alone) past = {0};
    const auto open = [&](int64_t ticket) {
        const auto rows = is_alone ? std::nullopt : std::optional(static_cast<int64_t>(past.size()));
        return std::make_shared<Step>(ticket, caches, std::move(cut), attributes, rows, past, new_lengths);
    };
    std::shared_ptr<Step> step = caches.size() > 1 ? open_wide(open) : open(caches[0]->next_ticket());
    for (const CachePtr& cache : caches) cache->open(step);
    return {past, step->ticket};
}

void attend(int64_t ticket, const SdpaAttributes& attributes, const Call& call, Scheduler& scheduler) {
    const std::shared_ptr<Step> step = find_step(ticket);
    const int64_t given = call.key.shape.size() == 4 ? call.key.shape[2] : 0;
    std::optional<Current> current(std::in_place, *step);
    try {
        Held held = step->held(attributes);
        current.reset();
        Slot after = attend_node(*step, attributes, held, call, scheduler);
        held = {};  // so that a commit leaves the rows with one holder
        current.emplace(*step);
        step->note(attributes, given, std::move(after));
    } catch (const std::exception& error) {
        step->fail(error.what());
        throw;
    }
}

std::vector<int64_t> step_members(int64_t ticket) {
    if (find(ticket >> 32)) return {ticket >> 32};
    std::vector<int64_t> handles;
    if (const auto step = find_wide(ticket)) {
        for (const CachePtr& cache : step->caches) handles.push_back(cache->handle);
    }
    return handles;
}

std::vector<int64_t> cache_lengths(int64_t handle) {
    return with(handle, [](Cache& cache) { return cache.state.lengths; });
}

int64_t cache_length(int64_t handle) {
    return with(handle, [](Cache& cache) { return cache.state.length(); });
}

State cache_state(int64_t handle) {
    return with(handle, [](Cache& cache) { return cache.state; });
}

int64_t cache_shared_nbytes(int64_t handle) {
    return with(handle, [](Cache& cache) { return cache.shared_nbytes(); });
}

void crop_cache(int64_t handle, int64_t length) {
    with(handle, [=](Cache& cache) { cache.become(cache.cropped_to(length)); });
}

void crop_rows(int64_t handle, const std::vector<int64_t>& lengths) {
    with(handle, [&](Cache& cache) { cache.become(cache.cropped(lengths)); });
}

void reset_cache(int64_t handle) {
    with(handle, [](Cache& cache) { cache.become(cache.emptied()); });
}

int64_t fork_cache(int64_t handle) {
    return new_cache(with(handle, [](Cache& cache) { return cache.copy(); }));
}

void reorder_cache(int64_t handle, const std::vector<int64_t>& index) {
    with(handle, [&](Cache& cache) {
        State selected = cache.select(index);
        selected.settle();
        cache.become(std::move(selected));
    });
}

int64_t gather_rows(const std::vector<std::pair<int64_t, int64_t>>& rows) {
    std::vector<int64_t> handles;
    for (const auto& [handle, row] : rows) {
        if (std::find(handles.begin(), handles.end(), handle) == handles.end()) handles.push_back(handle);
    }
    const Opened opened(handles);
    return new_cache(gathered(opened.caches, rows));
}

}  // namespace onnx_kivi
