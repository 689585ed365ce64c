// Stamps: what a host of a model with ghost I/O carries from step to step in the place of keys and values.
//
// A stamp says which process, step and row wrote a token, and where: CELLS cells of float32 on each side, the first
// ones of the token's heads x channels. A cell holds 29 bits as one of the floats from 2 up to 2^65, so that nothing
// but a copy is a stamp: not zeros, NaN, keys, nor what was rounded to another type.
//
//   cell 0: nonce of the process, 28 bits, and the side    cell 2: step, its upper 13 bits, and the row, 16 bits
//   cell 1: step, its lower 29 bits                         cell 3: position of the token
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <optional>
#include <vector>

namespace onnx_kivi {

constexpr int64_t CELLS = 4;
constexpr int CELL_BITS = 29, ROW_BITS = 16, NONCE_BITS = 28;
constexpr int64_t MAX_STEPS = int64_t{1} << (2 * CELL_BITS - ROW_BITS);
constexpr int64_t MAX_POSITIONS = int64_t{1} << CELL_BITS;

enum class StampSide : uint32_t { key, value };

// Who wrote a token: step << ROW_BITS | row.
using Origin = uint64_t;

struct Stamp {
    uint32_t nonce;
    StampSide side;
    Origin origin;
    int64_t position;

    bool operator==(const Stamp&) const = default;
};

using StampCells = std::array<uint32_t, CELLS>;

constexpr uint32_t CELL_MASK = (1U << CELL_BITS) - 1, CELL_MARK = 0b010U << CELL_BITS;

constexpr StampCells cells_of(const Stamp& stamp) {
    const auto step = static_cast<uint64_t>(stamp.origin) >> ROW_BITS;
    const auto row = static_cast<uint32_t>(stamp.origin & ((1U << ROW_BITS) - 1));
    return {CELL_MARK | stamp.nonce << 1 | static_cast<uint32_t>(stamp.side),
            CELL_MARK | (static_cast<uint32_t>(step) & CELL_MASK),
            CELL_MARK | static_cast<uint32_t>(step >> CELL_BITS) << ROW_BITS | row,
            CELL_MARK | static_cast<uint32_t>(stamp.position)};
}

// None for cells that are no stamp.
constexpr std::optional<Stamp> stamp_of(const StampCells& cells) {
    for (const uint32_t cell : cells) {
        if ((cell & ~CELL_MASK) != CELL_MARK) return std::nullopt;
    }
    const auto payload = [&](std::size_t i) { return uint64_t{cells[i] & CELL_MASK}; };
    const uint64_t row = payload(2) & ((1U << ROW_BITS) - 1), upper = payload(2) >> ROW_BITS;
    return Stamp{static_cast<uint32_t>(payload(0) >> 1), static_cast<StampSide>(payload(0) & 1),
                 (upper << CELL_BITS | payload(1)) << ROW_BITS | row, static_cast<int64_t>(payload(3))};
}

// Where the cells of tokens lie in a tensor (rows, heads, tokens, channels).
struct StampShape {
    int64_t rows = 0, heads = 0, tokens = 0, channels = 0;

    bool operator==(const StampShape&) const = default;
    int64_t size() const { return rows * heads * tokens * channels; }
    int64_t at(int64_t row, int64_t token, int64_t cell) const {
        return ((row * heads + cell / channels) * tokens + token) * channels + cell % channels;
    }
};

inline StampCells read_cells(const float* data, const StampShape& shape, int64_t row, int64_t token) {
    StampCells cells;
    for (int64_t i = 0; i < CELLS; ++i)
        cells[static_cast<std::size_t>(i)] = std::bit_cast<uint32_t>(data[shape.at(row, token, i)]);
    return cells;
}

inline void write_cells(float* data, const StampShape& shape, int64_t row, int64_t token, const StampCells& cells) {
    for (int64_t i = 0; i < CELLS; ++i)
        data[shape.at(row, token, i)] = std::bit_cast<float>(cells[static_cast<std::size_t>(i)]);
}

}  // namespace onnx_kivi
