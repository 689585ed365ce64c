// Fuzzes the decimal parser and the checks of attributes: what they take is finite, in its limits, and takes itself.
#include <charconv>
#include <cmath>

#include "../../../custom_ops/store/attributes.hpp"
#include "input.hpp"

using namespace onnx_kivi;

namespace {

template <class Attributes>
bool fill(fuzz::Input& input, Attributes& attributes) {
    try {
        Attributes::fields(attributes, LAST_VERSION, [&](const char* name, auto& member) {
            using Member = std::remove_reference_t<decltype(member)>;
            if (input.byte() % 4 == 0) return;  // as it is by default
            if constexpr (std::is_same_v<Member, double>) {
                member = parse_decimal(name, input.text());
            } else if constexpr (std::is_same_v<Member, int64_t>) {
                member = input.number();
            } else {
                member = input.text();
            }
        });
        validate(attributes);
    } catch (const Error& error) {
        for (const char* c = error.what(); *c; ++c) {
            if (*c < ' ' || *c > '~') __builtin_trap();  // onnxruntime's Python takes messages for UTF-8
        }
        return false;
    }
    return true;
}

void check(const SdpaAttributes& a) {
    const bool ok = std::isfinite(a.scale) && std::isfinite(a.softcap) && a.softcap >= 0 && a.window <= MAX_WINDOW &&
                    a.row.block_tokens >= 1 && a.row.block_tokens <= MAX_BLOCK_TOKENS && a.slot <= MAX_SLOT;
    if (!ok) __builtin_trap();
    char digits[64];
    const auto end = std::to_chars(digits, digits + sizeof digits, a.scale).ptr;
    if (parse_decimal("scale", std::string(digits, end)) != a.scale) __builtin_trap();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    StepAttributes step;
    SdpaAttributes sdpa;
    fill(input, step);
    if (fill(input, sdpa)) check(sdpa);
    return 0;
}
