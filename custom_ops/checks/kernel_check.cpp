// Random attention problems on every ISA level against a double-precision oracle over the decoded cache.
// Usage: kernel_check [problems] [seed]. Exits with 1 and the problem's description on the first failure.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../kernel/kernel.hpp"

using namespace onnx_kivi;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

struct Lines {  // LINE_BYTES aligned memory, exactly sized so that sanitizers see overruns
    explicit Lines(int64_t bytes)
        : data(static_cast<unsigned char*>(std::aligned_alloc(64, size_t((bytes + 64) / 64 * 64)))) {}
    std::unique_ptr<unsigned char, decltype(&std::free)> hold() { return {data, &std::free}; }
    unsigned char* data;
};
using Held = std::unique_ptr<unsigned char, decltype(&std::free)>;

struct Tokens {
    std::vector<float> key, value;
    DenseTokens view{};
};

struct Problem {
    SlotShape shape{};
    int64_t rows, group, queries, added, blocks, sinks, residual, window;
    int threads;
    bool causal, nan_to_zero, head_sink, offset, hidden_rows, dense_key, dense_value;
    float softcap, fill;
    bool mask, mask_dims[4];

    std::string describe() const {
        char text[512];
        std::snprintf(
            text, sizeof text,
            "Hkv %d Dk %d Dv %d k_bits %d v_bits %d block %d v_group %d rows %ld group %ld S %ld N %ld blocks %ld "
            "sinks %ld residual %ld window %ld threads %d causal %d nan_to_zero %d head_sink %d offset %d "
            "hidden_rows %d fill %g dense %d%d softcap %g mask %d %d%d%d%d",
            shape.kv_heads, shape.k_size, shape.v_size, shape.k_bits, shape.v_bits, shape.block_tokens,
            shape.v_group_size, rows, group, queries, added, blocks, sinks, residual, window, threads, causal,
            nan_to_zero, head_sink, offset, hidden_rows, double(fill), dense_key, dense_value, double(softcap), mask,
            mask_dims[0], mask_dims[1], mask_dims[2], mask_dims[3]);
        return text;
    }
};

std::mt19937_64 source;
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(source); }
bool chance(double p) { return std::bernoulli_distribution(p)(source); }
float normal() { return std::normal_distribution<float>()(source); }
template <class T, size_t N>
T one_of(const T (&options)[N]) {
    return options[size_t(pick(0, N - 1))];
}

Tokens random_tokens(const Problem& p, int64_t tokens) {
    Tokens t;
    const int64_t heads = p.shape.kv_heads, dk = p.shape.k_size, dv = p.shape.v_size;
    for (int64_t i = 0; i < heads * tokens * dk; ++i)
        t.key.push_back(normal() + (p.offset && i % dk == 1 ? 40.0f : 0.0f));
    for (int64_t i = 0; i < heads * tokens * dv; ++i) t.value.push_back(normal());
    t.view = {t.key.data(), t.value.data(), tokens, tokens * dk, dk, tokens * dv, dv};
    return t;
}

Problem random_problem() {
    Problem p{};
    const int sizes[] = {1, 3, 8, 16, 20, 40, 64, 72, 80, 96, 128, 256};
    const int bits[] = {2, 4, 8, 8, 32};
    p.shape.kv_heads = int(pick(1, 3));
    p.shape.k_size = one_of(sizes);
    p.shape.v_size = chance(0.6) ? p.shape.k_size : one_of(sizes);
    p.shape.k_bits = one_of(bits);
    p.shape.v_bits = one_of(bits);
    p.shape.block_tokens = one_of({1, 7, 16, 24, 32, 64, 64, 100, 128});
    p.shape.v_group_size = one_of({0, 5, 16, 32, 64, 64, 1000});
    p.rows = pick(1, 2);
    p.group = one_of({1, 1, 2, 3, 4, 7, 8});
    p.queries = one_of({1, 1, 1, 2, 5, 17, 70});
    p.added = chance(0.8) ? p.queries : 0;
    p.blocks = pick(0, 9);
    p.sinks = p.blocks ? one_of({0, 4, 70}) : 0;
    p.residual = one_of({0, 0, 1, 63, 130});
    p.window = chance(0.3) ? pick(1, 150) : 0;
    p.threads = int(pick(1, 3));
    p.causal = chance(0.4);
    p.nan_to_zero = chance(0.5);
    p.head_sink = chance(0.2);
    p.offset = chance(0.3);
    p.softcap = chance(0.2) ? 20.0f : 0.0f;
    p.mask = chance(0.5);
    p.hidden_rows = chance(0.3);
    p.fill = one_of({-INF, -std::numeric_limits<float>::max(), -1e9f});
    p.dense_key = chance(0.15);
    p.dense_value = chance(0.15);
    for (bool& dim : p.mask_dims) dim = chance(0.6);
    return p;
}

struct Case {
    Problem p;
    Layout layout;
    std::vector<Tokens> sinks, residual, added;
    std::vector<std::vector<BlockRef>> blocks;
    std::vector<Held> memory;
    std::vector<RowCache> caches;
    std::vector<DenseTokens> new_tokens;
    std::vector<float> query, mask, head_sink, keys, values;  // keys, values: (rows, kv_heads, T, D) as decoded
    int64_t past, total, mask_sizes[4];
    float scale;

    explicit Case(const Problem& problem) : p(problem), layout(make_layout(p.shape)) {
        const int64_t tokens = p.shape.block_tokens;
        past = p.sinks + p.blocks * tokens + p.residual;
        total = past + p.added;
        for (int64_t row = 0; row < p.rows; ++row) add_row();
        for (int64_t i = 0; i < p.rows * heads() * p.queries * p.shape.k_size; ++i) query.push_back(normal());
        if (p.offset)
            for (int64_t i = 1; i < int64_t(query.size()); i += p.shape.k_size) query[size_t(i)] *= 0.05f;
        const int64_t full[4] = {p.rows, heads(), p.queries, total};
        int64_t count = 1;
        for (int d = 0; d < 4; ++d) count *= mask_sizes[d] = p.mask_dims[d] ? full[d] : 1;
        for (int64_t i = 0; i < count; ++i) mask.push_back(chance(0.2) ? p.fill : normal());
        if (p.hidden_rows && mask_sizes[3] == total)
            for (int64_t i = 0; i < count; ++i)
                if (i / total % 3 == 0) mask[size_t(i)] = p.fill;
        for (int64_t h = 0; h < heads(); ++h) head_sink.push_back(normal());
        scale = 1 / std::sqrt(float(p.shape.k_size));
    }

    // All f32: only rounding differs from the oracle. Otherwise weights of 16 bits do, by at most half a step each.
    bool exact() const { return p.blocks == 0 || (p.shape.k_bits == DENSE_BITS && p.shape.v_bits == DENSE_BITS); }
    int64_t heads() const { return p.group * p.shape.kv_heads; }

    void add_row() {
        const Kernel& kernel = **available_kernels();
        const int64_t kv = p.shape.kv_heads, dk = p.shape.k_size, dv = p.shape.v_size, tokens = p.shape.block_tokens;
        const size_t key_at = keys.size(), value_at = values.size();
        keys.resize(key_at + size_t(kv * total * dk));
        values.resize(value_at + size_t(kv * total * dv));
        int64_t done = 0;
        auto target = [&](int64_t count) {
            DenseTokens to{keys.data() + key_at + done * dk,
                           values.data() + value_at + done * dv,
                           count,
                           total * dk,
                           dk,
                           total * dv,
                           dv};
            done += count;
            return to;
        };
        auto copy = [&](const Tokens& from) {
            const DenseTokens to = target(from.view.tokens);
            for (int64_t h = 0; h < kv; ++h)
                for (int64_t t = 0; t < to.tokens; ++t) {
                    std::memcpy(const_cast<float*>(to.key) + h * to.key_head_stride + t * dk,
                                from.view.key + (h * to.tokens + t) * dk, size_t(dk) * 4);
                    std::memcpy(const_cast<float*>(to.value) + h * to.value_head_stride + t * dv,
                                from.view.value + (h * to.tokens + t) * dv, size_t(dv) * 4);
                }
        };
        sinks.push_back(random_tokens(p, p.sinks));
        copy(sinks.back());
        blocks.emplace_back();
        for (int64_t b = 0; b < p.blocks; ++b) {
            const Tokens fresh = random_tokens(p, tokens);
            uint32_t dense = least_dense(layout);
            if (p.dense_key && b % 2) dense |= KEY_DENSE;
            if (p.dense_value && b % 3) dense |= VALUE_DENSE;
            unsigned char* data =
                static_cast<unsigned char*>(std::aligned_alloc(64, size_t(block_bytes(layout, dense))));
            memory.emplace_back(data, &std::free);
            if (kernel.encode_block(layout, dense, fresh.view, data) != dense)
                std::printf("encode refused\n"), std::exit(1);
            blocks.back().push_back({data, dense});
            kernel.decode_block(layout, {data, dense}, 0, tokens, target(tokens));
        }
        residual.push_back(random_tokens(p, p.residual));
        copy(residual.back());
        added.push_back(random_tokens(p, p.added));
        copy(added.back());
        caches.push_back({sinks.back().view, blocks.back().data(), p.blocks, residual.back().view});
        new_tokens.push_back(added.back().view);
    }

    Attention attention(float* output) const {
        Attention a{};
        const int64_t dk = p.shape.k_size, dv = p.shape.v_size;
        a.layout = &layout;
        a.rows = p.rows;
        a.q_heads = heads();
        a.queries = p.queries;
        a.past = a.position = past;
        a.caches = caches.data();
        a.new_tokens = new_tokens.data();
        a.query = query.data();
        a.query_token_stride = dk;
        a.query_head_stride = dk * p.queries;
        a.query_row_stride = dk * p.queries * heads();
        if (p.mask) {
            a.mask = mask.data();
            int64_t stride = 1;
            for (int d = 3; d >= 0; --d) {
                a.mask_stride[d] = mask_sizes[d] == 1 ? 0 : stride;
                stride *= mask_sizes[d];
            }
        }
        a.head_sink = p.head_sink ? head_sink.data() : nullptr;
        a.output = output;
        a.output_token_stride = dv;
        a.output_head_stride = dv * p.queries;
        a.output_row_stride = dv * p.queries * heads();
        a.scale = scale;
        a.softcap = p.softcap;
        a.window = p.window;
        a.causal = p.causal;
        a.nan_to_zero = p.nan_to_zero;
        return a;
    }

    std::vector<double> oracle() const {
        const int64_t dk = p.shape.k_size, dv = p.shape.v_size;
        std::vector<double> out;
        const Attention a = attention(nullptr);
        for (int64_t b = 0; b < p.rows; ++b)
            for (int64_t h = 0; h < heads(); ++h)
                for (int64_t i = 0; i < p.queries; ++i) {
                    const float* q = query.data() + ((b * heads() + h) * p.queries + i) * dk;
                    const int64_t kv = b * p.shape.kv_heads + h / p.group;
                    std::vector<double> s(size_t(total), 0.0);
                    double peak = p.head_sink ? double(head_sink[size_t(h)]) : -INF;
                    for (int64_t j = 0; j < total; ++j) {
                        double x = 0;
                        for (int64_t d = 0; d < dk; ++d)
                            x += double(q[d]) * double(keys[size_t((kv * total + j) * dk + d)]);
                        x *= double(scale);
                        if (p.softcap > 0) x = double(p.softcap) * std::tanh(x / double(p.softcap));
                        if (a.mask) {
                            const float m = a.mask[b * a.mask_stride[0] + h * a.mask_stride[1] + i * a.mask_stride[2] +
                                                   j * a.mask_stride[3]];
                            x = m < -1e8f ? double(float(x) + m) : x + double(m);
                        }
                        if ((p.causal || p.window) && j > past + i) x = -INF;
                        if (p.window && j <= past + i - p.window) x = -INF;
                        s[size_t(j)] = x;
                        peak = std::max(peak, x);
                    }
                    double sum = p.head_sink ? std::exp(double(head_sink[size_t(h)]) - peak) : 0;
                    for (double& x : s) sum += x = std::exp(x - peak);
                    for (int64_t d = 0; d < dv; ++d) {
                        double o = 0;
                        for (int64_t j = 0; j < total; ++j)
                            o += s[size_t(j)] * double(values[size_t((kv * total + j) * dv + d)]);
                        o /= sum;
                        out.push_back(std::isnan(o) && p.nan_to_zero ? 0 : o);
                    }
                }
        return out;
    }
};

double run(const Case& c, const Kernel& kernel, const std::vector<double>& expected) {
    std::vector<float> output(expected.size(), 12345.0f);
    const Attention a = c.attention(output.data());
    const Plan plan = plan_attention(a, c.p.threads);
    Lines scratch(plan.scratch_bytes), workspace(plan.workspace_bytes);
    const Held hold_scratch = scratch.hold(), hold_workspace = workspace.hold();
    for (int64_t t = 0; t < plan.tasks; ++t) kernel.run_task(a, plan, t, scratch.data, workspace.data);
    for (int64_t j = 0; j < plan.combines; ++j) kernel.run_combine(a, plan, j, workspace.data);
    double worst = 0;
    for (size_t i = 0; i < output.size(); ++i) {
        const bool nan = std::isnan(expected[i]);
        if (nan != bool(std::isnan(output[i]))) return INF;
        if (!nan) worst = std::max(worst, std::abs(double(output[i]) - expected[i]));
    }
    return worst;
}

}  // namespace

int main(int argc, char** argv) {
    const long problems = argc > 1 ? std::atol(argv[1]) : 300;
    source.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
    double worst[8] = {};
    for (long n = 0; n < problems; ++n) {
        const Case c(random_problem());
        if (c.total == 0) continue;
        const std::vector<double> expected = c.oracle();
        int level = 0;
        for (const Kernel* const* kernel = available_kernels(); *kernel; ++kernel, ++level) {
            const double error = run(c, **kernel, expected);
            worst[level] = std::max(worst[level], error);
            if (!(error < (c.exact() ? 2e-5 : 1e-3))) {
                std::printf("problem %ld on %s: error %g\n%s\n", n, (*kernel)->name, error, c.p.describe().c_str());
                return 1;
            }
        }
    }
    int level = 0;
    for (const Kernel* const* kernel = available_kernels(); *kernel; ++kernel)
        std::printf("%s: worst error %.2e\n", (*kernel)->name, worst[level++]);
}
