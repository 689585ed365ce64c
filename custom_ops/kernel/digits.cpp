// Which key channels get the digits of a block. Compiled for the baseline: it compares, and computes nothing.
#include <algorithm>
#include <numeric>

#include "kernel.hpp"

namespace onnx_kivi {

void choose_digits(const float* gains, int32_t channels, int32_t count, int32_t* order, unsigned char* digits) {
    int32_t* const end = order + 3 * int64_t{channels};
    std::iota(order, end, 0);
    std::nth_element(order, order + count, end,
                     [gains](int32_t a, int32_t b) { return gains[a] > gains[b] || (gains[a] == gains[b] && a < b); });
    std::fill_n(digits, channels, static_cast<unsigned char>(0));
    for (int32_t i = 0; i < count; ++i) ++digits[order[i] % channels];
}

}  // namespace onnx_kivi
