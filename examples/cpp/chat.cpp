// A chat in token ids with a rewritten model, from C++: one line in is a turn, one line out the reply to it. The cache
// goes on from turn to turn, quantized inside the process, and from run to run by --save and --load.
//
//   chat MODEL.onnx LIBONNX_KIVI.so [--turns FILE] [--end TOKEN] [--count N] [--beams N] [--load FILE] [--save FILE]
//
// Turns come from stdin unless a file is named. A reply ends with the token --end, or after --count (64) tokens; it is
// greedy, or of --beams beams the likeliest. The last line says what the cache holds. Build it against onnxruntime's
// headers (Debian: package libonnxruntime-dev) and library, and libonnx_kivi with its header:
//
//   g++ -std=c++20 chat.cpp -I ONNXRUNTIME/include -I ONNX_KIVI/include libonnxruntime.so libonnx_kivi.so -o chat
//
// `python -c "import onnx_kivi; print(onnx_kivi.library_path())"` says where an installed package has the library; the
// folder `include` is beside it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <tuple>

#include "decoder.hpp"

namespace {

using Tokens = std::vector<int64_t>;

struct Beam {
    Tokens tokens;
    double score = 0;  // the logarithm of its probability
    bool ended = false;
};

// A beam with one more token; one that has ended stays as it is.
struct Candidate {
    int64_t beam;
    int64_t token;
    double score;
};

double log_of_sum(const std::vector<float>& logits) {
    const double most = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - most);
    return most + std::log(sum);
}

std::vector<Candidate> best(const std::vector<Beam>& beams, const std::vector<std::vector<float>>& logits,
                            std::size_t count, int64_t end) {
    std::vector<Candidate> all;
    for (std::size_t b = 0; b < beams.size(); ++b) {
        const auto beam = static_cast<int64_t>(b);
        if (beams[b].ended) {
            all.push_back({beam, end, beams[b].score});
            continue;
        }
        const double total = log_of_sum(logits[b]);
        for (std::size_t t = 0; t < logits[b].size(); ++t) {
            all.push_back({beam, static_cast<int64_t>(t), beams[b].score + (logits[b][t] - total)});
        }
    }
    const auto kept = all.begin() + static_cast<std::ptrdiff_t>(std::min(count, all.size()));
    std::partial_sort(all.begin(), kept, all.end(), [](const Candidate& a, const Candidate& b) {
        return std::tuple(-a.score, a.beam, a.token) < std::tuple(-b.score, b.beam, b.token);
    });
    return {all.begin(), kept};
}

// The likeliest of `width` replies to a turn, greedy where that is 1. The cache then holds both, turn and reply.
Tokens reply(Decoder& decoder, const Tokens& turn, std::size_t count, std::size_t width, int64_t end) {
    auto logits = decoder.step({turn});
    const int64_t begin = decoder.length();
    std::vector<Beam> beams(1);
    const auto has_ended = [](const Beam& beam) { return beam.ended; };
    for (std::size_t i = 0; i < count && !std::all_of(beams.begin(), beams.end(), has_ended); ++i) {
        std::vector<Beam> next;
        Tokens parents;
        std::vector<Tokens> fed;
        for (const Candidate& chosen : best(beams, logits, width, end)) {
            parents.push_back(chosen.beam);
            fed.push_back({chosen.token});
            Beam& beam = next.emplace_back(beams[static_cast<std::size_t>(chosen.beam)]);
            if (!beam.ended) beam.tokens.push_back(chosen.token);
            beam.score = chosen.score;
            beam.ended = chosen.token == end;
        }
        beams = std::move(next);
        decoder.reorder(parents);
        logits = decoder.step(fed);
    }
    decoder.reorder({0});
    decoder.crop(begin + static_cast<int64_t>(beams[0].tokens.size()));  // without what an ended beam was fed
    return beams[0].tokens;
}

int64_t number(const std::string& what, const std::string& text) {
    std::size_t used = 0;
    int64_t number = -1;
    try {
        number = std::stoll(text, &used);
    } catch (const std::logic_error&) {
    }
    if (number < 0 || used != text.size()) throw std::runtime_error(what + ": expected a number >= 0, got " + text);
    return number;
}

// Values of options by name, the given ones over these.
std::map<std::string, std::string> options(int argc, char** argv, std::map<std::string, std::string> values) {
    for (int i = 0; i < argc; i += 2) {
        if (values.count(argv[i]) == 0 || i + 1 == argc) {
            throw std::runtime_error(std::string("expected an option and its value, got ") + argv[i]);
        }
        values[argv[i]] = argv[i + 1];
    }
    return values;
}

void chat(Decoder& decoder, std::istream& turns, std::map<std::string, std::string>& option) {
    const int64_t end = option["--end"].empty() ? -1 : number("--end", option["--end"]);
    const auto count = static_cast<std::size_t>(number("--count", option["--count"]));
    const auto beams = static_cast<std::size_t>(std::max<int64_t>(number("--beams", option["--beams"]), 1));
    std::string line;
    while (std::getline(turns, line)) {
        std::istringstream words(line);
        Tokens turn;
        for (std::string word; words >> word;) turn.push_back(number("token", word));
        if (turn.empty()) continue;
        for (const int64_t token : reply(decoder, turn, count, beams, end)) std::cout << token << ' ';
        std::cout << std::endl;
    }
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 3) throw std::runtime_error("usage: chat MODEL.onnx LIBONNX_KIVI.so [OPTION VALUE ...]");
    auto option =
        options(argc - 3, argv + 3,
                {{"--turns", ""}, {"--end", ""}, {"--count", "64"}, {"--beams", "1"}, {"--load", ""}, {"--save", ""}});
    Decoder decoder(argv[1], argv[2]);
    if (!option["--load"].empty()) decoder.load(option["--load"]);
    std::ifstream file(option["--turns"]);
    if (!option["--turns"].empty() && !file) throw std::runtime_error(option["--turns"] + ": expected a file to read");
    chat(decoder, option["--turns"].empty() ? std::cin : file, option);
    if (!option["--save"].empty()) decoder.save(option["--save"]);
    std::cout << decoder.length() << " tokens in " << decoder.bytes() << " bytes, " << decoder.quantized_tokens()
              << " of them quantized\n";
    return 0;
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
