// Whose tokens a cache holds, or will when its run ends: for each row the origins of its tokens, in order. What a host
// does to stamps it does to these: rows that are selected, repeated, joined and cut at their end are still prefixes of
// some cache's rows.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "stamp.hpp"

namespace onnx_kivi {

struct Source;

struct Lineage {
    int64_t handle;
    std::string model_id;
    std::vector<std::vector<Origin>> rows;

    int64_t length() const { return rows.empty() ? 0 : static_cast<int64_t>(rows[0].size()); }

    // The row whose first `past` tokens end with this origin; row `likely` if that does.
    std::optional<int64_t> row_of(Origin last, int64_t past, std::size_t likely) const;
    // The same for several rows, of which the likely one of the i-th is the i-th; none unless all are here.
    std::optional<std::vector<int64_t>> rows_of(const std::vector<Origin>& last, int64_t past) const;
    // The order in which all rows, of just `past` tokens, are these sources; none if they are anything else.
    std::optional<std::vector<int64_t>> order_in(const std::vector<Source>& sources, int64_t past) const;
    // Row i becomes the old row order[i]; each is there once.
    void reorder(const std::vector<int64_t>& order);
};

// A row of a past: the first tokens of a row of a cache.
struct Source {
    const Lineage* lineage;
    int64_t row;

    const std::vector<Origin>& origins() const { return lineage->rows[static_cast<std::size_t>(row)]; }
};

}  // namespace onnx_kivi
