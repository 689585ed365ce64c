#include "arena.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../kernel/kernel.hpp"

namespace onnx_kivi {

namespace {

constexpr int64_t HUGE_PAGE = 2 << 20;
constexpr int64_t SLAB_BYTES = 2 * HUGE_PAGE;

struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
};

}  // namespace

// Pieces of one size; `free` lists those that nobody holds.
struct Slab {
    Slab(int64_t piece_bytes, int64_t count) : piece_bytes(piece_bytes), count(count) {
        const int64_t bytes = (piece_bytes * count + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        memory.reset(static_cast<unsigned char*>(std::aligned_alloc(HUGE_PAGE, static_cast<std::size_t>(bytes))));
        if (!memory) throw std::bad_alloc();
#if defined(__linux__)
        madvise(memory.get(), static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
        free.reserve(static_cast<std::size_t>(count));
        for (int64_t i = count; i-- > 0;) free.push_back(memory.get() + i * piece_bytes);
    }

    int64_t piece_bytes;
    int64_t count;
    std::unique_ptr<unsigned char, Free> memory;
    std::vector<unsigned char*> free;
};

namespace {

// Slabs that have a free piece, by the size of their pieces; a full slab is known to its pieces only.
struct Arena {
    std::atomic<int64_t> held_bytes{0};
    std::mutex mutex;
    std::map<int64_t, std::vector<Slab*>> open;
};

// Never destroyed: a cache may outlive any static object.
Arena& arena() {
    static Arena* const only = new Arena;
    return *only;
}

}  // namespace

ArenaMemory::ArenaMemory(int64_t bytes) : bytes_(bytes) {
    const int64_t piece = std::max<int64_t>((bytes + LINE_BYTES - 1) / LINE_BYTES, 1) * LINE_BYTES;
    const std::lock_guard lock(arena().mutex);
    std::vector<Slab*>& open = arena().open[piece];
    if (open.empty()) {
        auto fresh = std::make_unique<Slab>(piece, std::max<int64_t>(SLAB_BYTES / piece, 1));
        open.push_back(fresh.get());
        fresh.release();
    }
    slab_ = open.back();
    data_ = slab_->free.back();
    slab_->free.pop_back();
    if (slab_->free.empty()) open.pop_back();
    arena().held_bytes += bytes;
}

ArenaMemory::~ArenaMemory() {
    if (slab_ == nullptr) return;
    arena().held_bytes -= bytes_;
    const std::lock_guard lock(arena().mutex);
    std::vector<Slab*>& open = arena().open[slab_->piece_bytes];
    if (slab_->free.empty()) open.push_back(slab_);
    slab_->free.push_back(data_);
    // One empty slab of a size is kept: a cache that is emptied and filled again would map and clear it each time.
    if (static_cast<int64_t>(slab_->free.size()) < slab_->count || open.size() == 1) return;
    open.erase(std::find(open.begin(), open.end(), slab_));
    delete slab_;
}

int64_t arena_bytes() { return arena().held_bytes; }

}  // namespace onnx_kivi
