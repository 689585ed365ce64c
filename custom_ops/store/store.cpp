#include "store.hpp"

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace onnx_kivi {

namespace {

struct Registry {
    std::shared_mutex mutex;
    int64_t last_handle = 0;
    std::unordered_map<int64_t, std::shared_ptr<Cache>> caches;
    std::unordered_map<std::string, int64_t> defaults;  // by model_id
};

// Never destroyed: a session that outlives this library's static objects may still run.
Registry& registry() {
    static auto* const the = new Registry;
    return *the;
}

std::shared_ptr<Cache> find(int64_t handle) {
    Registry& all = registry();
    const std::shared_lock lock(all.mutex);
    const auto found = all.caches.find(handle);
    if (found == all.caches.end()) {
        throw_cache_error("cache " + std::to_string(handle) +
                          ": expected an open handle, got one that is closed or was never given out");
    }
    return found->second;
}

int64_t add(Registry& all, Snapshot&& state) {
    if (all.last_handle > INT32_MAX - 2) throw_cache_error("new cache: expected a free handle below 2^31, got none");
    const int64_t handle = all.last_handle += 2;
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

}  // namespace

int64_t new_cache(Snapshot state) {
    Registry& all = registry();
    const std::unique_lock lock(all.mutex);
    return add(all, std::move(state));
}

void close_cache(int64_t handle) {
    find(handle)->close();
    Registry& all = registry();
    const std::unique_lock lock(all.mutex);
    all.caches.erase(handle);
    std::erase_if(all.defaults, [handle](const auto& entry) { return entry.second == handle; });
}

std::pair<int64_t, int64_t> open_step(int64_t handle, int64_t past_length, const StepAttributes& attributes,
                                      bool has_all_nodes) {
    return find(handle == DEFAULT_HANDLE ? default_cache(attributes.model_id) : handle)
        ->open_step(past_length, attributes, has_all_nodes);
}

void attend(int64_t ticket, const SdpaAttributes& attributes, const Call& call, Scheduler& scheduler) {
    find(ticket >> 32)->attend(ticket, attributes, call, scheduler);
}

int64_t cache_length(int64_t handle) { return find(handle)->length(); }
Snapshot cache_snapshot(int64_t handle) { return find(handle)->snapshot(); }
void crop_cache(int64_t handle, int64_t length) { find(handle)->crop(length); }
void reset_cache(int64_t handle) { find(handle)->reset(); }
int64_t fork_cache(int64_t handle) { return new_cache(find(handle)->snapshot()); }

void reorder_cache(int64_t handle, const std::vector<int64_t>& index) { find(handle)->reorder(index); }

}  // namespace onnx_kivi
