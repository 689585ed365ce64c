// Memory of blocks: aligned, counted by reference, shared between rows and caches.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "../kernel/kernel.hpp"
#include "arena.hpp"

namespace onnx_kivi {

// Uninitialized memory at LINE_BYTES.
class AlignedBuffer {
public:
    AlignedBuffer() = default;
    explicit AlignedBuffer(int64_t bytes) : bytes_(bytes) {
        const std::size_t rounded = (static_cast<std::size_t>(bytes) + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
        data_.reset(static_cast<unsigned char*>(std::aligned_alloc(LINE_BYTES, rounded ? rounded : LINE_BYTES)));
        if (!data_) throw std::bad_alloc();
    }
    unsigned char* data() const { return data_.get(); }
    int64_t bytes() const { return bytes_; }

    // Room for `bytes`, contents lost if it has to grow.
    void reserve(int64_t bytes) {
        if (bytes > bytes_ || !data_) *this = AlignedBuffer(bytes);
    }

private:
    struct Free {
        void operator()(unsigned char* p) const { std::free(p); }
    };
    std::unique_ptr<unsigned char, Free> data_;
    int64_t bytes_ = 0;
};

// block_tokens tokens of one row, all kv heads, in the kernel's layout; `dense` says which sides are f32.
//
// A dense block is filled from the front. Rows that share one may see different numbers of its tokens, so whoever
// adds some claims their places first; who comes second copies the block.
class Block {
public:
    Block(const Layout& layout, uint32_t dense, int64_t filled)
        : memory(block_bytes(layout, dense)), dense(dense), claimed_(filled) {}
    BlockRef ref() const { return {memory.data(), dense}; }

    // Whether the places [held, held + tokens) were nobody's, and are the caller's now.
    bool claim(int64_t held, int64_t tokens) { return claimed_.compare_exchange_strong(held, held + tokens); }
    // From now on nobody adds to this block.
    void close() { claimed_.store(INT64_MAX); }
    // Only its one holder, which sees `held` tokens of it, may call this.
    void reopen(int64_t held) { claimed_.store(held); }

    const ArenaMemory memory;
    const uint32_t dense;

private:
    std::atomic<int64_t> claimed_;
};

using BlockPtr = std::shared_ptr<Block>;

// Tokens [begin, begin + tokens) of a block; null for a side that is not dense.
DenseTokens dense_tokens(const Layout& layout, const Block& block, int64_t begin, int64_t tokens);

// Tokens [begin, begin + tokens) of `from`.
DenseTokens slice(const DenseTokens& from, int64_t begin, int64_t tokens);

// Copies all tokens of `from` to the addresses of `to`, which is as long; a side that is null in either is left out.
void copy_tokens(const Layout& layout, const DenseTokens& from, const DenseTokens& to);

}  // namespace onnx_kivi
