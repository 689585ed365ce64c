// One decode step of attention, out of cache, per ISA level and bits, next to the streaming-read limit of as many bytes.
// Usage: decode_bench [context] [bits] [threads] [seconds] [heads] [kv_heads] [head_size] [level] [block_tokens]
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "../kernel/kernel.hpp"

using namespace onnx_kivi;

namespace {

const int64_t LEAST_BYTES = int64_t(std::getenv("MEGABYTES") ? std::atof(std::getenv("MEGABYTES")) * 1e6 : 4 * 33554432.0);
constexpr int64_t HUGE_PAGE = 2 << 20;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

unsigned char* arena(int64_t bytes, bool huge) {
    auto* data = static_cast<unsigned char*>(std::aligned_alloc(HUGE_PAGE, size_t((bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE)));
    if (huge) madvise(data, size_t(bytes), MADV_HUGEPAGE);
    return data;
}

__attribute__((target("avx512f"))) void read_all(const unsigned char* data, int64_t bytes) {
    __m512i sum[4] = {};
    for (int64_t i = 0; i + 256 <= bytes; i += 256)
        for (int j = 0; j < 4; ++j) sum[j] = _mm512_xor_si512(sum[j], _mm512_load_si512(data + i + 64 * j));
    const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
    if (_mm512_reduce_add_epi64(all) == 42) std::printf(" ");
}

double argument(int argc, char** argv, int i, double otherwise) { return argc > i ? std::atof(argv[i]) : otherwise; }

}  // namespace

int main(int argc, char** argv) {
    const int64_t context = int64_t(argument(argc, argv, 1, 16384));
    const int bits = int(argument(argc, argv, 2, 8)), threads = int(argument(argc, argv, 3, 1));
    const double seconds = argument(argc, argv, 4, 3);
    const int heads = int(argument(argc, argv, 5, 32)), kv_heads = int(argument(argc, argv, 6, 8));
    const int size = int(argument(argc, argv, 7, 128));
    const std::string level = argc > 8 ? argv[8] : "";
    const int block_tokens = int(argument(argc, argv, 9, 64));
    const bool huge = !std::getenv("NO_HUGE");
    const Layout layout = make_layout({kv_heads, size, size, bits, bits, block_tokens, 64});
    const int64_t blocks = context / block_tokens, bytes = block_bytes(layout, least_dense(layout));
    const int64_t layers = LEAST_BYTES / (blocks * bytes) + 1;
    unsigned char* data = arena(layers * blocks * bytes, huge);
    std::vector<float> keys(size_t(kv_heads) * block_tokens * size), values(keys.size()), query(size_t(heads) * size), output(query.size());
    std::mt19937 random;
    std::normal_distribution<float> normal;
    for (float& x : keys) x = normal(random);
    for (float& x : values) x = normal(random);
    for (float& x : query) x = normal(random);
    const int64_t head_stride = int64_t(block_tokens) * size;
    const DenseTokens tokens{keys.data(), values.data(), block_tokens, head_stride, size, head_stride, size};
    const Kernel& best = **available_kernels();
    std::vector<std::vector<BlockRef>> refs(static_cast<size_t>(layers));
    for (int64_t i = 0; i < layers * blocks; ++i) {
        unsigned char* block = data + i * bytes;
        if (i == 0) best.encode_block(layout, least_dense(layout), tokens, block);
        else std::memcpy(block, data, size_t(bytes));
        refs[size_t(i / blocks)].push_back({block, least_dense(layout)});
    }
    const DenseTokens added{keys.data(), values.data(), 1, head_stride, size, head_stride, size};
    Attention a{};
    a.layout = &layout;
    a.rows = a.queries = 1;
    a.q_heads = heads;
    a.past = a.position = blocks * block_tokens;
    a.new_tokens = &added;
    a.query = query.data();
    a.query_head_stride = a.output_head_stride = size;
    a.output = output.data();
    a.scale = 0.0884f;
    std::printf("context %ld, %d bits, %d threads, %ld layers of %.1f MB%s\n", context, bits, threads, layers, double(blocks * bytes) / 1e6, huge ? "" : ", small pages");
    auto step = [&](const Kernel& kernel, int64_t layer) {
        const RowCache cache{{}, refs[size_t(layer)].data(), blocks, {}};
        a.caches = &cache;
        const Plan plan = plan_attention(a, threads);
        static std::vector<unsigned char*> memory;
        while (int(memory.size()) <= threads) memory.push_back(arena(std::max(plan.scratch_bytes, plan.workspace_bytes) + 64, false));
        std::vector<std::thread> others;
        auto work = [&](int me) {
            for (int64_t t = me; t < plan.tasks; t += threads) kernel.run_task(a, plan, t, memory[size_t(me)], memory.back());
        };
        for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
        work(0);
        for (std::thread& other : others) other.join();
        for (int64_t j = 0; j < plan.combines; ++j) kernel.run_combine(a, plan, j, memory.back());
    };
    std::vector<const Kernel*> levels;
    for (const Kernel* const* k = available_kernels(); *k; ++k) if (level.empty() || level == (*k)->name) levels.push_back(*k);
    std::vector<std::vector<double>> times(levels.size() + 1);
    const double end = now() + seconds;
    for (int64_t layer = 0; now() < end || times[0].size() < 5; layer = (layer + 1) % layers) {
        for (size_t i = 0; i < levels.size(); ++i) {
            const double start = now();
            step(*levels[i], layer);
            times[i].push_back(now() - start);
            layer = (layer + 1) % layers;
        }
        const double start = now();
        read_all(data + layer * blocks * bytes, blocks * bytes);
        times.back().push_back(now() - start);
    }
    double limit = 0;
    for (size_t i = times.size(); i-- > 0;) {
        std::sort(times[i].begin(), times[i].end());
        const double median = times[i][times[i].size() / 2], rate = double(blocks * bytes) / median / 1e9;
        if (i + 1 == times.size()) limit = rate;
        std::printf("%-16s median %.3f ms  least %.3f ms  %.1f GB/s  %.2f of read\n", i + 1 == times.size() ? "read" : levels[i]->name, median * 1e3, times[i][0] * 1e3, rate, rate / limit);
    }
}
