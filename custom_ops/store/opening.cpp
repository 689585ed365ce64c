#include "opening.hpp"

#include <algorithm>

namespace onnx_kivi {

namespace {

constexpr const char* OLD_STEP =
    "it was rewritten by version 1 of the op, which knows one length; rewrite the original again";

template <class Number>
std::string text(Number value) {
    return std::to_string(value);
}

std::vector<int64_t> kept(Cache& cache, const std::vector<int64_t>& past_lengths, bool among_others,
                          const StepAttributes& step, bool has_all_nodes) {
    const std::size_t rows = cache.state.lengths.size();
    if (among_others && rows > 1) {
        cache.refuse("expected a cache of one row beside others, got one of " + text(rows) + " rows; split it");
    }
    cache.check_model(step);
    if (!has_all_nodes) cache.check_nodes();
    return cache.kept(past_lengths);
}

// `count` is that of the rows, unless nobody knows it yet.
void check_new(std::size_t count, const std::vector<int64_t>& new_lengths, bool is_known) {
    if (new_lengths.empty() || (new_lengths.size() != 1 && is_known && new_lengths.size() != count)) {
        throw_cache_error("new_length: expected 1 number or " + text(count) + ", one for each row, got " +
                          text(new_lengths.size()));
    }
    for (std::size_t row = 0; row < new_lengths.size(); ++row) {
        if (new_lengths[row] == ALL_NEW || new_lengths[row] >= 1) continue;
        throw_cache_error("row " + text(row) + ": new_length: expected " + text(ALL_NEW) + " or at least 1, got " +
                          text(new_lengths[row]));
    }
}

void check_one_length(const std::vector<int64_t>& past, const std::vector<int64_t>& new_lengths,
                      const StepAttributes& step) {
    const auto [least, most] = std::minmax_element(past.begin(), past.end());
    const bool takes_all =
        std::all_of(new_lengths.begin(), new_lengths.end(), [](int64_t length) { return length == ALL_NEW; });
    const std::string reason = step.spec_version == 1 ? OLD_STEP : step.one_length;
    if (past.empty() || (*least == *most && takes_all) || reason.empty()) return;
    throw_cache_error(
        "rows of " + text(*least) + " to " + text(*most) +
        " tokens: expected rows of one length that all take all new tokens, as this model needs: " + reason);
}

}  // namespace

void check_rows(const std::vector<int64_t>& handles) {
    if (handles.empty()) throw_cache_error("cache_handle: expected at least one cache, got none");
    for (auto at = handles.begin(); at != handles.end(); ++at) {
        const std::string row = "row " + text(at - handles.begin()) + ": ";
        const auto first = std::find(handles.begin(), at, *at);
        if (first != at) {
            throw_cache_error(row + "cache " + text(*at) +
                              ": expected a cache of its own for each row, got that of row " +
                              text(first - handles.begin()) + " again; fork it");
        }
        if (*at == DEFAULT_HANDLE && handles.size() > 1) {
            throw_cache_error(row + "cache_handle: expected a cache, got " + text(DEFAULT_HANDLE) +
                              ", the default one");
        }
    }
}

std::vector<std::vector<int64_t>> check_lengths(const std::vector<CachePtr>& caches,
                                                const std::vector<int64_t>& past_lengths,
                                                const std::vector<int64_t>& new_lengths, const StepAttributes& step,
                                                bool has_all_nodes) {
    const bool is_wide = caches.size() > 1;
    if (is_wide && past_lengths.size() != 1 && past_lengths.size() != caches.size()) {
        throw_cache_error("past_length: expected 1 number or " + text(caches.size()) + ", one for each row, got " +
                          text(past_lengths.size()));
    }
    std::vector<std::vector<int64_t>> past;
    std::vector<int64_t> all;
    for (std::size_t row = 0; row < caches.size(); ++row) {
        const bool is_own = is_wide && past_lengths.size() > 1;
        const std::vector<int64_t> asked = is_own ? std::vector{past_lengths[row]} : past_lengths;
        try {
            past.push_back(kept(*caches[row], asked, is_wide, step, has_all_nodes));
        } catch (const Error& error) {
            if (!is_wide) throw;
            throw_cache_error("row " + text(row) + ": " + error.what());
        }
        all.insert(all.end(), past.back().begin(), past.back().end());
    }
    check_new(all.size(), new_lengths, is_wide || !caches[0]->state.lengths.empty());
    check_one_length(all, new_lengths, step);
    return past;
}

}  // namespace onnx_kivi
