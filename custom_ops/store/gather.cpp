#include "gather.hpp"

#include <algorithm>

namespace onnx_kivi {

namespace {

State row_of(const Cache& cache, int64_t row) {
    const auto count = static_cast<int64_t>(cache.state.lengths.size());
    if (row < 0 || row >= count) {
        cache.refuse(count > 0 ? "expected a row number from 0 to " + std::to_string(count - 1) + ", got " +
                                     std::to_string(row)
                               : "expected a cache that holds tokens, got an empty one");
    }
    return cache.select({row});
}

bool are_alike(const Slot& a, const Slot& b) {
    if (a.attributes->row != b.attributes->row || a.rows.size() != b.rows.size()) return false;
    if (a.rows.empty()) return true;
    const SlotShape &x = a.layout->blocks.shape, &y = b.layout->blocks.shape;
    return x.kv_heads == y.kv_heads && x.k_size == y.k_size && x.v_size == y.v_size;
}

bool are_alike(const Slots& a, const Slots& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](const auto& x, const auto& y) { return x.first == y.first && are_alike(x.second, y.second); });
}

}  // namespace

State gathered(const std::vector<CachePtr>& caches, const std::vector<std::pair<int64_t, int64_t>>& rows) {
    if (rows.empty()) throw_cache_error("gather: expected at least one row, got none");
    std::vector<const Cache*> sources;
    std::vector<State> parts;
    for (const auto& [handle, row] : rows) {
        // Clang 14 can't capture `handle`, a structured binding, by its name.
        const auto is_it = [wanted = handle](const CachePtr& cache) { return cache->handle == wanted; };
        sources.push_back(std::find_if(caches.begin(), caches.end(), is_it)->get());
        parts.push_back(row_of(*sources.back(), row));
    }
    for (std::size_t i = 0; i < parts.size(); ++i) {
        if (parts[i].step) sources[0]->check_model(*parts[i].step);
        if (are_alike(parts[0].slots, parts[i].slots)) continue;
        sources[i]->refuse("expected slots of the same options, heads and sizes as cache " +
                           std::to_string(sources[0]->handle) + ", got others; only caches of one model can be joined");
    }
    State all = std::move(parts[0]);
    for (std::size_t i = 1; i < parts.size(); ++i) {
        all.lengths.push_back(parts[i].lengths[0]);
        for (auto& [index, slot] : all.slots) {
            std::vector<Row>& more = parts[i].slots[index].rows;
            slot.rows.insert(slot.rows.end(), more.begin(), more.end());
        }
    }
    all.settle();
    return all;
}

}  // namespace onnx_kivi
