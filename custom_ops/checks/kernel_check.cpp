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
constexpr float UNTOUCHED = 12345;

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
    int64_t rows, group, queries, added, blocks, sinks, residual, window, window_sinks;
    int threads;
    bool ragged, freed;
    bool causal, nan_to_zero, head_sink, offset, hidden_rows, dense_key, dense_value;
    float softcap, fill;
    bool mask, mask_dims[4];

    std::string describe() const {
        char text[512];
        std::snprintf(
            text, sizeof text,
            "Hkv %d Dk %d Dv %d k_bits %d (%d digits, token %d, rotated %d) v_bits %d (symmetric %d) block %d v_group "
            "%d rows %ld group %ld S %ld N %ld blocks %ld "
            "sinks %ld residual %ld window %ld+%ld threads %d ragged %d freed %d causal %d nan_to_zero %d head_sink %d "
            "offset %d "
            "hidden_rows %d fill %g dense %d%d softcap %g mask %d %d%d%d%d",
            shape.kv_heads, shape.k_size, shape.v_size, shape.k_bits, shape.k_digits, shape.k_token, shape.k_rotated,
            shape.v_bits, shape.v_symmetric, shape.block_tokens, shape.v_group_size, rows, group, queries, added,
            blocks, sinks, residual, window, window_sinks, threads, ragged, freed, causal, nan_to_zero, head_sink,
            offset, hidden_rows, double(fill), dense_key, dense_value, double(softcap), mask, mask_dims[0],
            mask_dims[1], mask_dims[2], mask_dims[3]);
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

void set_schemes(SlotShape& shape) {
    const int averages[] = {8, 9, 10, 12};
    if (shape.k_bits < 8 && chance(0.5)) shape.k_token = true;
    if (shape.k_token) shape.k_rotated = chance(0.5);
    if (shape.k_bits == 2 && !shape.k_rotated && chance(0.6))
        shape.k_digits = (shape.k_size * one_of(averages) + 4) / 8;
    if (shape.v_bits < 8 && chance(0.6)) {
        shape.v_symmetric = true;
        shape.v_bits = one_of({2, 3, 4});
    }
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
    set_schemes(p.shape);
    p.rows = pick(1, 3);
    p.ragged = chance(0.4);
    p.freed = chance(0.5);
    p.group = one_of({1, 1, 2, 3, 4, 7, 8});
    p.queries = one_of({1, 1, 1, 2, 5, 17, 70});
    p.added = chance(0.8) ? p.queries : 0;
    p.blocks = pick(0, 9);
    p.sinks = p.blocks ? one_of({0, 4, 70}) : 0;
    p.residual = one_of({0, 0, 1, 63, 130});
    p.window = chance(0.3) ? pick(1, 150) : 0;
    p.window_sinks = p.window && chance(0.4) ? pick(0, p.sinks) : 0;
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

// One row of a problem; places of its tokens count from the first one, freed ones among them.
struct Line {
    int64_t blocks, residual, added, first_query, freed, held, total;  // held: before the new tokens
    Tokens sink_tokens, residual_tokens, added_tokens;
    std::vector<BlockRef> refs;
    std::vector<float> keys, values;  // (kv_heads, total, D) as decoded

    int64_t past() const { return held + freed; }
    int64_t end() const { return total + freed; }
};

struct Case {
    Problem p;
    Layout layout;
    std::vector<Line> lines;
    std::vector<Held> memory;
    std::vector<RowCall> calls;
    std::vector<float> query, mask, head_sink;
    int64_t columns = 0, mask_sizes[4];
    float scale;

    explicit Case(const Problem& problem) : p(problem), layout(make_layout(p.shape)) {
        lines.reserve(size_t(p.rows));
        for (int64_t row = 0; row < p.rows; ++row) {
            add_row();
            columns = std::max(columns, lines.back().end());
        }
        for (const Line& line : lines)
            calls.push_back(
                {{line.sink_tokens.view, line.freed, line.refs.data(), line.blocks, line.residual_tokens.view},
                 line.added_tokens.view,
                 line.first_query,
                 line.past() - line.first_query,
                 columns - line.end()});
        for (int64_t i = 0; i < p.rows * heads() * p.queries * p.shape.k_size; ++i) query.push_back(normal());
        if (p.offset)
            for (int64_t i = 1; i < int64_t(query.size()); i += p.shape.k_size) query[size_t(i)] *= 0.05f;
        const int64_t full[4] = {p.rows, heads(), p.queries, columns};
        int64_t count = 1;
        for (int d = 0; d < 4; ++d) count *= mask_sizes[d] = p.mask_dims[d] ? full[d] : 1;
        for (int64_t i = 0; i < count; ++i) mask.push_back(chance(0.2) ? p.fill : normal());
        if (p.hidden_rows && mask_sizes[3] == columns)
            for (int64_t i = 0; i < count; ++i)
                if (i / columns % 3 == 0) mask[size_t(i)] = p.fill;
        for (int64_t h = 0; h < heads(); ++h) head_sink.push_back(normal());
        scale = 1 / std::sqrt(float(p.shape.k_size));
    }

    // All f32: only rounding differs from the oracle. Otherwise weights of 16 bits do, by at most half a step each.
    bool exact() const { return p.blocks == 0 || (p.shape.k_bits == DENSE_BITS && p.shape.v_bits == DENSE_BITS); }
    int64_t heads() const { return p.group * p.shape.kv_heads; }

    Line random_line() const {
        Line line{};
        line.blocks = p.ragged ? pick(0, p.blocks) : p.blocks;
        line.residual = p.ragged ? pick(0, p.residual) : p.residual;
        const int64_t queries = p.ragged ? pick(1, p.queries) : p.queries;
        line.first_query = p.queries - queries;
        line.added = p.added ? queries : 0;
        line.held = p.sinks + line.blocks * p.shape.block_tokens + line.residual;
        line.total = line.held + line.added;
        if (p.freed && p.window && p.window <= line.held - p.sinks + 1) line.freed = pick(0, 300);
        return line;
    }

    void add_row() {
        const Kernel& kernel = **available_kernels();
        const int64_t kv = p.shape.kv_heads, dk = p.shape.k_size, dv = p.shape.v_size, tokens = p.shape.block_tokens;
        lines.push_back(random_line());
        Line& line = lines.back();
        const int64_t total = line.total;
        line.keys.resize(size_t(kv * total * dk));
        line.values.resize(size_t(kv * total * dv));
        int64_t done = 0;
        auto target = [&](int64_t count) {
            DenseTokens to{
                line.keys.data() + done * dk, line.values.data() + done * dv, count, total * dk, dk, total * dv, dv};
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
        copy(line.sink_tokens = random_tokens(p, p.sinks));
        for (int64_t b = 0; b < line.blocks; ++b) {
            const Tokens fresh = random_tokens(p, tokens);
            uint32_t dense = least_dense(layout);
            if (p.dense_key && b % 2) dense |= KEY_DENSE;
            if (p.dense_value && b % 3) dense |= VALUE_DENSE;
            unsigned char* data =
                static_cast<unsigned char*>(std::aligned_alloc(64, size_t(block_bytes(layout, dense))));
            memory.emplace_back(data, &std::free);
            Lines scratch(encode_scratch_bytes(layout));
            const Held hold_scratch = scratch.hold();
            if (kernel.encode_block(layout, dense, fresh.view, data, scratch.data) != dense)
                std::printf("encode refused\n"), std::exit(1);
            line.refs.push_back({data, dense});
            kernel.decode_block(layout, {data, dense}, 0, tokens, target(tokens));
        }
        copy(line.residual_tokens = random_tokens(p, line.residual));
        copy(line.added_tokens = random_tokens(p, line.added));
    }

    Attention attention(float* output) const {
        Attention a{};
        const int64_t dk = p.shape.k_size, dv = p.shape.v_size;
        a.layout = &layout;
        a.rows = p.rows;
        a.q_heads = heads();
        a.queries = p.queries;
        a.row_calls = calls.data();
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
        a.window_sinks = p.window_sinks;
        a.causal = p.causal;
        a.nan_to_zero = p.nan_to_zero;
        return a;
    }

    std::vector<double> oracle() const {
        std::vector<double> out;
        for (int64_t b = 0; b < p.rows; ++b)
            for (int64_t h = 0; h < heads(); ++h)
                for (int64_t i = 0; i < p.queries; ++i) add_output(b, h, i, out);
        return out;
    }

    void add_output(int64_t b, int64_t h, int64_t i, std::vector<double>& out) const {
        const int64_t dk = p.shape.k_size, dv = p.shape.v_size;
        const Line& line = lines[size_t(b)];
        if (i < line.first_query || line.total == 0)
            return out.insert(out.end(), size_t(dv), double(UNTOUCHED)), void();
        const Attention a = attention(nullptr);
        const float* q = query.data() + ((b * heads() + h) * p.queries + i) * dk;
        const int64_t kv = h / p.group, place = line.past() + i - line.first_query;
        std::vector<double> s(size_t(line.total), 0.0);
        double peak = p.head_sink ? double(head_sink[size_t(h)]) : -INF;
        for (int64_t j = 0; j < line.total; ++j) {
            const int64_t at = j < p.sinks ? j : j + line.freed;
            double x = 0;
            for (int64_t d = 0; d < dk; ++d)
                x += double(q[d]) * double(line.keys[size_t((kv * line.total + j) * dk + d)]);
            x *= double(scale);
            if (p.softcap > 0) x = double(p.softcap) * std::tanh(x / double(p.softcap));
            if (a.mask) {
                const float m = a.mask[b * a.mask_stride[0] + h * a.mask_stride[1] + i * a.mask_stride[2] +
                                       (columns - line.end() + at) * a.mask_stride[3]];
                x = m < -1e8f ? double(float(x) + m) : x + double(m);
            }
            if ((p.causal || p.window) && at > place) x = -INF;
            if (p.window && at <= place - p.window && at >= p.window_sinks) x = -INF;
            s[size_t(j)] = x;
            peak = std::max(peak, x);
        }
        double sum = p.head_sink ? std::exp(double(head_sink[size_t(h)]) - peak) : 0;
        for (double& x : s) sum += x = std::exp(x - peak);
        for (int64_t d = 0; d < dv; ++d) {
            double o = 0;
            for (int64_t j = 0; j < line.total; ++j)
                o += s[size_t(j)] * double(line.values[size_t((kv * line.total + j) * dv + d)]);
            o /= sum;
            out.push_back(std::isnan(o) && p.nan_to_zero ? 0 : o);
        }
    }
};

double run(const Case& c, const Kernel& kernel, const std::vector<double>& expected) {
    std::vector<float> output(expected.size(), UNTOUCHED);
    const Attention a = c.attention(output.data());
    std::vector<RowPlan> rows(size_t(c.p.rows));
    const Plan plan = plan_attention(a, c.p.threads, rows.data());
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
