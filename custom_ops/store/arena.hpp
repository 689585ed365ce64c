// Memory of blocks, cut from slabs of huge pages: a block of its own pages costs an eighth of the decoding speed at
// long contexts (see ../README.md). Blocks of one size share slabs, whatever cache they belong to.
#pragma once

#include <cstdint>
#include <utility>

namespace onnx_kivi {

struct Slab;

// Uninitialized memory at LINE_BYTES, given back when it dies. Any thread may make and drop any. Throws bad_alloc.
class ArenaMemory {
public:
    explicit ArenaMemory(int64_t bytes);
    ~ArenaMemory();
    ArenaMemory(ArenaMemory&& other) noexcept
        : slab_(std::exchange(other.slab_, nullptr)), data_(other.data_), bytes_(other.bytes_) {}
    ArenaMemory& operator=(ArenaMemory&&) = delete;

    unsigned char* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

private:
    Slab* slab_;
    unsigned char* data_;
    int64_t bytes_;
};

// Bytes of all such memory that is held in this process.
int64_t arena_bytes();

}  // namespace onnx_kivi
