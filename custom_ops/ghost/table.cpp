#include "table.hpp"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>

#include "../store/arena.hpp"
#include "../store/store.hpp"
#include "lineage.hpp"

namespace onnx_kivi {

namespace {

constexpr const char* BUDGET = "ONNX_KIVI_KV_BYTES";

std::string text(int64_t value) { return std::to_string(value); }

// The stamps of the last token of each row must agree on both sides.
std::vector<Origin> last_origins(const GhostCall& call) {
    std::vector<Origin> last;
    for (int64_t row = 0; row < call.rows(); ++row) last.push_back(call.read(call.key(), row, call.past() - 1).origin);
    return last;
}

// Throws unless every token of this side is the one that its source has there.
void check_tokens(const GhostCall& call, const Stamps& stamps, const std::vector<Source>& sources) {
    const uint32_t nonce = process_nonce();
    for (int64_t row = 0; row < call.rows(); ++row) {
        const std::vector<Origin>& origins = sources[static_cast<std::size_t>(row)].origins();
        for (int64_t token = 0; token < call.past(); ++token) {
            const Stamp expected{nonce, stamps.side, origins[static_cast<std::size_t>(token)], token};
            if (read_cells(stamps.data, stamps.shape, row, token) == cells_of(expected)) continue;
            call.read(stamps, row, token);
            call.refuse(stamps.where(row, token) +
                        "expected the token that was there when the last one of the row came, got another; a past may "
                        "be cut at its end alone, and its rows selected, repeated and joined as a whole");
        }
    }
}

class Table {
public:
    int64_t open(const GhostAttributes& attributes, int64_t budget, const GhostCall& call) {
        const std::lock_guard lock(mutex_);
        if (call.past() == 0) {
            add({new_cache(), attributes.model_id,
                 std::vector<std::vector<Origin>>(static_cast<std::size_t>(call.rows()))});
        } else {
            const std::vector<Source> sources = find(call, attributes);
            check_tokens(call, call.key(), sources);
            check_tokens(call, call.value(), sources);
            if (!continue_in_place(sources, call.past())) copy(sources, call.past());
        }
        make_room(budget);
        Lineage& opened = lineages_.front();
        grow(opened, call);
        return opened.handle;
    }

    void stamp(int64_t handle, const GhostCall& call, float* key, float* value) {
        const std::lock_guard lock(mutex_);
        const auto found = std::find_if(lineages_.begin(), lineages_.end(),
                                        [=](const Lineage& lineage) { return lineage.handle == handle; });
        if (found == lineages_.end()) {
            call.refuse(
                "expected the cache of this run, got one that was freed while it ran to stay within the budget; "
                "raise " +
                std::string(BUDGET));
        }
        write(*found, call, call.key(), key);
        write(*found, call, call.value(), value);
    }

private:
    // Counts the new tokens as held from here on, so that another run that goes on from the same past takes a copy.
    void grow(Lineage& lineage, const GhostCall& call) {
        if (++last_step_ >= MAX_STEPS) call.refuse("expected fewer than 2^42 runs of a process, got more; restart it");
        for (std::size_t row = 0; row < lineage.rows.size(); ++row) {
            const Origin origin = static_cast<Origin>(last_step_) << ROW_BITS | row;
            lineage.rows[row].resize(static_cast<std::size_t>(call.total()), origin);
        }
    }

    void add(Lineage lineage) { lineages_.push_front(std::move(lineage)); }

    // Where each row's past lies: all in one cache if there is one, best in one that holds nothing else.
    std::vector<Source> find(const GhostCall& call, const GhostAttributes& attributes) const {
        const std::vector<Origin> last = last_origins(call);
        const Lineage* whole = nullptr;
        std::vector<int64_t> rows;
        for (const Lineage& lineage : lineages_) {
            const auto here = lineage.rows_of(last, call.past());
            if (!here) continue;
            const bool is_end = lineage.length() == call.past() && lineage.rows.size() == here->size();
            if (whole == nullptr || is_end) {
                whole = &lineage;
                rows = *here;
            }
            if (is_end) break;
        }
        std::vector<Source> sources;
        for (std::size_t row = 0; row < last.size(); ++row) {
            sources.push_back(whole ? Source{whole, rows[row]} : find_row(call, last[row], row));
            check_model(call, sources.back(), attributes, row);
        }
        return sources;
    }

    Source find_row(const GhostCall& call, Origin last, std::size_t row) const {
        for (const Lineage& lineage : lineages_) {
            if (const auto here = lineage.row_of(last, call.past(), row)) return {&lineage, *here};
        }
        call.refuse("row " + text(static_cast<int64_t>(row)) +
                    ": expected a past whose cache is held, got one that was freed to stay within the budget, or that "
                    "was cut at its start; feed all of its tokens anew, or raise " +
                    BUDGET);
    }

    static void check_model(const GhostCall& call, const Source& source, const GhostAttributes& attributes,
                            std::size_t row) {
        if (source.lineage->model_id == attributes.model_id) return;
        call.refuse("row " + text(static_cast<int64_t>(row)) + ": expected a past of model " + attributes.model_id +
                    ", got one of model " + source.lineage->model_id + "; start with none");
    }

    // Whether one cache holds this past and nothing else; it then has the order of the past.
    bool continue_in_place(const std::vector<Source>& sources, int64_t past) {
        const auto at = std::find_if(lineages_.begin(), lineages_.end(),
                                     [&](const Lineage& lineage) { return &lineage == sources[0].lineage; });
        const std::optional<std::vector<int64_t>> order = at->order_in(sources, past);
        if (!order || cache_length(at->handle) != past) return false;
        if (!std::is_sorted(order->begin(), order->end())) {
            reorder_cache(at->handle, *order);
            at->reorder(*order);
        }
        lineages_.splice(lineages_.begin(), lineages_, at);
        return true;
    }

    void copy(const std::vector<Source>& sources, int64_t past) {
        std::vector<std::pair<int64_t, int64_t>> rows;
        Lineage copied{0, sources[0].lineage->model_id, {}};
        for (const Source& source : sources) {
            rows.emplace_back(source.lineage->handle, source.row);
            copied.rows.emplace_back(source.origins().begin(), source.origins().begin() + past);
        }
        copied.handle = gather_rows(rows);  // the step that is opened on it drops what lies beyond the past
        add(std::move(copied));
    }

    // Frees caches that were used longest ago, but for the one in use.
    void make_room(int64_t budget) {
        while (arena_bytes() > budget && lineages_.size() > 1) {
            close_cache(lineages_.back().handle);
            lineages_.pop_back();
        }
        if (const int64_t bytes = arena_bytes(); bytes > budget) {
            throw_cache_error("CacheOpen: expected a budget that holds what is in use, " + text(bytes) +
                              " bytes, got " + text(budget) + "; raise " + BUDGET +
                              " or rewrite with a larger kv_bytes");
        }
    }

    static void write(const Lineage& lineage, const GhostCall& call, const Stamps& past, float* present) {
        const StampShape shape = call.present_shape();
        const bool is_past = present == past.data;
        if (!is_past) std::memset(present, 0, static_cast<std::size_t>(shape.size()) * sizeof(float));
        const uint32_t nonce = process_nonce();
        for (int64_t row = 0; row < shape.rows; ++row) {
            const std::vector<Origin>& origins = lineage.rows[static_cast<std::size_t>(row)];
            for (int64_t token = is_past ? call.past() : 0; token < call.total(); ++token) {
                const Stamp stamp{nonce, past.side, origins[static_cast<std::size_t>(token)], token};
                write_cells(present, shape, row, token, cells_of(stamp));
            }
        }
    }

    std::mutex mutex_;
    int64_t last_step_ = 0;
    std::list<Lineage> lineages_;  // the one used last comes first
};

// Never destroyed: a session that outlives this library's static objects may still run.
Table& table() {
    static auto* const the = new Table;
    return *the;
}

}  // namespace

int64_t budget_of(const GhostAttributes& attributes) {
    if (attributes.kv_bytes > 0) return attributes.kv_bytes;
    const char* const asked = std::getenv(BUDGET);
    if (asked == nullptr) return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE) / 4;
    int64_t bytes = 0;
    const char* const end = asked + std::strlen(asked);
    const auto [stopped, error] = std::from_chars(asked, end, bytes);
    if (stopped != end || error != std::errc{} || bytes < 1) {
        throw Error(ErrorKind::config,
                    std::string(BUDGET) + ": expected a number of bytes, 1 or more, got '" + asked + "'");
    }
    return bytes;
}

int64_t open_ghost(const GhostAttributes& attributes, int64_t budget, const GhostCall& call) {
    return table().open(attributes, budget, call);
}

void stamp_ghost(int64_t handle, const GhostCall& call, float* key, float* value) {
    table().stamp(handle, call, key, value);
}

}  // namespace onnx_kivi
