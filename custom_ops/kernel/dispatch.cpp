// Which ISA levels this build has and this machine can run. Compiled for the baseline.
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernel.hpp"

namespace onnx_kivi {

#if defined(__x86_64__)
namespace x86_64 {
extern const Kernel KERNEL;
}
namespace x86_64_v3 {
extern const Kernel KERNEL;
}
namespace x86_64_v4 {
extern const Kernel KERNEL;
}
namespace x86_64_v4_vnni {
extern const Kernel KERNEL;
}

// What Clang before 16 has no names for, as it has none for the levels.
static bool has_rest_of_v3() {
    constexpr unsigned extended = 0x80000001, lzcnt = 1u << 5;
    unsigned a, b, basic_c = 0, extended_c = 0, d;
    return __get_cpuid(1, &a, &b, &basic_c, &d) && (basic_c & bit_F16C) && (basic_c & bit_MOVBE) &&
           __get_cpuid(extended, &a, &b, &extended_c, &d) && (extended_c & lzcnt);
}

const Kernel* const* available_kernels() {
    static const Kernel* const all[] = {&x86_64_v4_vnni::KERNEL, &x86_64_v4::KERNEL, &x86_64_v3::KERNEL,
                                        &x86_64::KERNEL, nullptr};
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && has_rest_of_v3();
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const bool vnni = v4 && __builtin_cpu_supports("avx512vnni");
    return all + 3 - v3 - v4 - vnni;
}
#elif defined(__aarch64__)
namespace arm64_dotprod {
extern const Kernel KERNEL;
}

const Kernel* const* available_kernels() {
    static const Kernel* const all[] = {&arm64_dotprod::KERNEL, nullptr};
    return all;
}
#else
#error "onnx_kivi: no kernel for this architecture"
#endif

const Kernel* find_kernel(const char* name) {
    for (const Kernel* const* kernel = available_kernels(); *kernel != nullptr; ++kernel)
        if (std::strcmp((*kernel)->name, name) == 0) return *kernel;
    return nullptr;
}

}  // namespace onnx_kivi
