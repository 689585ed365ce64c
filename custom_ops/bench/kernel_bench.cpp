// Time of one attention call, out of cache, per ISA level, next to the streaming-read limit of as many bytes.
// Usage: kernel_bench [name=value ...], names and defaults: see `Options`. new=2048 context=0 is a prefill. quarters=9
// spends digits of 2.25 bits on average on keys of bits=2.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../kernel/kernel.hpp"

using namespace onnx_kivi;

namespace {

constexpr int64_t HUGE_PAGE = 2 << 20;

struct Options {
    std::map<std::string, std::string> values = {
        {"context", "16384"}, {"new", "1"},         {"bits", "8"},    {"heads", "32"},   {"kv_heads", "8"},
        {"size", "128"},      {"block", "64"},      {"group", "64"},  {"causal", "0"},   {"threads", "1"},
        {"level", ""},        {"megabytes", "134"}, {"seconds", "2"}, {"huge", "1"},     {"v_bits", ""},
        {"quarters", "0"},    {"token", "0"},       {"rotated", "0"}, {"symmetric", "0"}};

    Options(int argc, char** argv) {
        for (int i = 1; i < argc; ++i) {
            const std::string text = argv[i];
            const size_t equals = text.find('=');
            if (equals == std::string::npos || !values.count(text.substr(0, equals)))
                std::printf("unknown option: %s\n", argv[i]), std::exit(2);
            values[text.substr(0, equals)] = text.substr(equals + 1);
        }
    }
    int number(const std::string& name) const { return std::atoi(values.at(name).c_str()); }
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

unsigned char* arena(int64_t bytes, bool huge) {
    auto* data =
        static_cast<unsigned char*>(std::aligned_alloc(HUGE_PAGE, size_t((bytes + HUGE_PAGE) / HUGE_PAGE * HUGE_PAGE)));
    madvise(data, size_t(bytes), huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return data;
}

void read_all(const unsigned char* data, int64_t bytes) {
    using Word = uint64_t __attribute__((vector_size(32)));
    Word sums[8] = {};
    for (int64_t i = 0; i + int64_t(sizeof sums) <= bytes; i += int64_t(sizeof sums))
        for (size_t j = 0; j < 8; ++j) sums[j] |= reinterpret_cast<const Word*>(data + i)[j];
    for (const Word& sum : sums) asm volatile("" ::"m"(sum));
}

std::vector<float> normals(int64_t count) {
    static std::mt19937 source;
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& x : values) x = normal(source);
    return values;
}

struct Setup {
    Layout layout;
    int64_t blocks, bytes, layers;
    unsigned char* data;
    std::vector<std::vector<BlockRef>> refs;
    std::vector<float> keys, values, query, output;
    std::vector<unsigned char*> memory;
    RowCall call{};
    RowPlan row_plan{};
    Attention attention{};
    int threads;

    explicit Setup(const Options& options) {
        const int kv_heads = options.number("kv_heads"), heads = options.number("heads"), size = options.number("size");
        const int bits = options.number("bits"), block = options.number("block");
        const int64_t fresh = options.number("new"), most = std::max<int64_t>(fresh, block);
        threads = options.number("threads");
        layout = make_layout(
            {kv_heads, size, size, bits, options.number(options.values.at("v_bits").empty() ? "bits" : "v_bits"), block,
             options.number("group"), options.number("quarters") * size / 8, options.number("token") != 0,
             options.number("rotated") != 0, options.number("symmetric") != 0});
        blocks = options.number("context") / block;
        bytes = block_bytes(layout, least_dense(layout));
        layers = blocks ? int64_t(options.number("megabytes")) * 1000000 / (blocks * bytes) + 1 : 1;
        data = arena(layers * blocks * bytes, options.number("huge"));
        keys = normals(kv_heads * most * size);
        values = normals(kv_heads * most * size);
        query = normals(heads * fresh * size);
        output.resize(query.size());
        call.added = {keys.data(), values.data(), fresh, most * size, size, most * size, size};
        DenseTokens tokens = call.added;
        tokens.tokens = block;
        refs.resize(size_t(layers));
        unsigned char* const scratch = arena(encode_scratch_bytes(layout), false);
        for (int64_t i = 0; i < layers * blocks; ++i) {
            unsigned char* to = data + i * bytes;
            if (i == 0)
                (*available_kernels())->encode_block(layout, least_dense(layout), tokens, to, scratch);
            else
                std::memcpy(to, data, size_t(bytes));
            refs[size_t(i / blocks)].push_back({to, least_dense(layout)});
        }
        attention.layout = &layout;
        attention.rows = 1;
        attention.queries = fresh;
        attention.q_heads = heads;
        call.position = blocks * block;
        attention.row_calls = &call;
        attention.query = query.data();
        attention.query_token_stride = attention.output_token_stride = size;
        attention.query_head_stride = attention.output_head_stride = size * fresh;
        attention.output = output.data();
        attention.scale = 0.0884f;
        attention.causal = options.number("causal");
        use_layer(0);
        const Plan plan = plan_attention(attention, threads, &row_plan);
        for (int i = 0; i <= threads; ++i)
            memory.push_back(arena(std::max(plan.scratch_bytes, plan.workspace_bytes) + 64, false));
        std::printf("%ld layers of %.1f MB, %ld tasks, scratch %.1f KB\n", layers, double(blocks * bytes) / 1e6,
                    plan.tasks, double(plan.scratch_bytes) / 1e3);
    }

    void use_layer(int64_t layer) { call.cache = {{}, 0, blocks ? refs[size_t(layer)].data() : nullptr, blocks, {}}; }

    void run(const Kernel& kernel, int64_t layer) {
        use_layer(layer);
        const Plan plan = plan_attention(attention, threads, &row_plan);
        std::vector<std::thread> others;
        auto work = [&](int me) {
            for (int64_t t = me; t < plan.tasks; t += threads)
                kernel.run_task(attention, plan, t, memory[size_t(me)], memory.back());
        };
        for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
        work(0);
        for (std::thread& other : others) other.join();
        for (int64_t j = 0; j < plan.combines; ++j) kernel.run_combine(attention, plan, j, memory.back());
    }
};

}  // namespace

int main(int argc, char** argv) {
    const Options options(argc, argv);
    Setup setup(options);
    std::vector<const Kernel*> levels;
    for (const Kernel* const* k = available_kernels(); *k; ++k)
        if (options.values.at("level").empty() || options.values.at("level") == (*k)->name) levels.push_back(*k);
    std::vector<std::vector<double>> times(levels.size() + 1);
    const double end = now() + options.number("seconds");
    for (int64_t layer = 0; now() < end || times[0].size() < 3; layer = (layer + 1) % setup.layers)
        for (size_t i = 0; i < times.size(); ++i) {
            const double start = now();
            if (i < levels.size())
                setup.run(*levels[i], layer);
            else
                read_all(setup.data + layer * setup.blocks * setup.bytes, setup.blocks * setup.bytes);
            times[i].push_back(now() - start);
            layer = (layer + 1) % setup.layers;
        }
    const double megabytes = double(setup.blocks * setup.bytes) / 1e6;
    const double limit = *std::min_element(times.back().begin(), times.back().end());
    for (size_t i = 0; i < times.size(); ++i) {
        std::sort(times[i].begin(), times[i].end());
        const double median = times[i][times[i].size() / 2], least = times[i][0];
        std::printf("%-16s median %8.3f ms  least %8.3f ms  %5.1f GB/s  %.2f of read\n",
                    i < levels.size() ? levels[i]->name : "read", median * 1e3, least * 1e3, megabytes / least / 1e3,
                    limit / least);
    }
}
