#include "lineage.hpp"

namespace onnx_kivi {

std::optional<int64_t> Lineage::row_of(Origin last, int64_t past, std::size_t likely) const {
    if (past < 1 || past > length()) return std::nullopt;
    const auto ends_so = [&](std::size_t row) { return rows[row][static_cast<std::size_t>(past - 1)] == last; };
    if (likely < rows.size() && ends_so(likely)) return static_cast<int64_t>(likely);
    for (std::size_t row = 0; row < rows.size(); ++row) {
        if (ends_so(row)) return static_cast<int64_t>(row);
    }
    return std::nullopt;
}

std::optional<std::vector<int64_t>> Lineage::rows_of(const std::vector<Origin>& last, int64_t past) const {
    std::vector<int64_t> found;
    for (std::size_t i = 0; i < last.size(); ++i) {
        const std::optional<int64_t> row = row_of(last[i], past, i);
        if (!row) return std::nullopt;
        found.push_back(*row);
    }
    return found;
}

std::optional<std::vector<int64_t>> Lineage::order_in(const std::vector<Source>& sources, int64_t past) const {
    if (length() != past || sources.size() != rows.size()) return std::nullopt;
    std::vector<int64_t> order;
    std::vector<bool> is_there(rows.size());
    for (const Source& source : sources) {
        if (source.lineage != this || is_there[static_cast<std::size_t>(source.row)]) return std::nullopt;
        is_there[static_cast<std::size_t>(source.row)] = true;
        order.push_back(source.row);
    }
    return order;
}

void Lineage::reorder(const std::vector<int64_t>& order) {
    std::vector<std::vector<Origin>> ordered;
    for (const int64_t row : order) ordered.push_back(std::move(rows[static_cast<std::size_t>(row)]));
    rows = std::move(ordered);
}

}  // namespace onnx_kivi
