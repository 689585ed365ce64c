#include "call.hpp"

#include <unistd.h>

#include <random>

#include "../store/shapes.hpp"

namespace onnx_kivi {

namespace {

constexpr const char* HAND_ON = "; hand the present outputs of earlier runs on as past, or start with none";

std::string text(int64_t value) { return std::to_string(value); }

const char* name_of(StampSide side) { return side == StampSide::key ? "past_key" : "past_value"; }

}  // namespace

uint32_t process_nonce() {
    static const uint32_t random = std::random_device()();
    return (random + static_cast<uint32_t>(getpid()) * 2654435761U) >> (32 - NONCE_BITS);
}

std::string Stamps::where(int64_t row, int64_t token) const {
    return std::string(name_of(side)) + ", row " + text(row) + ", token " + text(token) + ": ";
}

GhostCall::GhostCall(const std::string& op, const std::vector<int64_t>& new_shape,
                     const std::vector<int64_t>& mask_shape, const std::vector<int64_t>& key_shape, const float* key,
                     const std::vector<int64_t>& value_shape, const float* value)
    : op_(op) {
    if (new_shape.size() != 2 || mask_shape.size() != 2) {
        refuse("expected the shapes of new tokens, (B, S), and of a mask, (B, T), got " + tuple_text(new_shape) +
               " and " + tuple_text(mask_shape));
    }
    rows_ = new_shape[0];
    new_ = new_shape[1];
    total_ = mask_shape[1];
    if (mask_shape[0] != rows_ || total_ < new_) {
        refuse("attention_mask: expected shape (" + text(rows_) + ", tokens of the past and " + text(new_) +
               " new ones), got " + tuple_text(mask_shape));
    }
    if (rows_ < 1 || rows_ > MAX_SIZE || total_ > MAX_POSITIONS) {
        refuse("expected 1 to " + text(MAX_SIZE) + " rows of up to " + text(MAX_POSITIONS) + " tokens, got " +
               text(rows_) + " and " + text(total_));
    }
    if (key_shape.size() != 4 || key_shape != value_shape) {
        refuse("expected past_key and past_value of one shape (B, heads, tokens, channels), got " +
               tuple_text(key_shape) + " and " + tuple_text(value_shape));
    }
    const StampShape shape{key_shape[0], key_shape[1], key_shape[2], key_shape[3]};
    if (shape.rows != rows_ || shape.heads * shape.channels < CELLS) {
        refuse("past_key: expected " + text(rows_) + " rows of at least " + text(CELLS) +
               " channels, over all heads, got shape " + tuple_text(key_shape));
    }
    if (shape.tokens != past() && shape.tokens < total_) {
        refuse("past_key: expected " + text(past()) + " tokens, those of the mask less the new ones, or a buffer of " +
               text(total_) + " or more, got " + text(shape.tokens));
    }
    key_ = {StampSide::key, key, shape};
    value_ = {StampSide::value, value, shape};
}

StampShape GhostCall::present_shape() const {
    StampShape shape = key_.shape;
    shape.tokens = std::max(shape.tokens, total_);
    return shape;
}

Stamp GhostCall::read(const Stamps& stamps, int64_t row, int64_t token) const {
    const std::optional<Stamp> stamp = stamp_of(read_cells(stamps.data, stamps.shape, row, token));
    if (!stamp) {
        refuse(stamps.where(row, token) + "expected what a run of this model wrote there, got other numbers" + HAND_ON);
    }
    if (stamp->side != stamps.side) {
        refuse(stamps.where(row, token) + "expected a present of its own side, got one of the other" + HAND_ON);
    }
    if (stamp->nonce != process_nonce()) {
        refuse(stamps.where(row, token) +
               "expected a past that this process made, got one of another process, which holds the cache; start with "
               "none");
    }
    return *stamp;
}

void GhostCall::refuse(const std::string& what) const { throw_cache_error(op_ + ": " + what); }

}  // namespace onnx_kivi
