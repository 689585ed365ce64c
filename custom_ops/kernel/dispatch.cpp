// Which ISA levels this build has and this machine can run. Compiled for the baseline.
#include <cstring>

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

const Kernel* const* available_kernels() {
    static const Kernel* const all[] = {&x86_64_v4_vnni::KERNEL, &x86_64_v4::KERNEL, &x86_64_v3::KERNEL,
                                        &x86_64::KERNEL, nullptr};
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("x86-64-v3");
    const bool v4 = v3 && __builtin_cpu_supports("x86-64-v4");
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
