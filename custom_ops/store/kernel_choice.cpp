#include "kernel_choice.hpp"

#include <atomic>
#include <cstdlib>

namespace onnx_kivi {

namespace {

std::atomic<const Kernel*> chosen{nullptr};

const Kernel& find(const std::string& source, const std::string& name) {
    if (const Kernel* kernel = find_kernel(name.c_str())) return *kernel;
    std::string list;
    for (const std::string& known : kernel_names()) list += (list.empty() ? "" : ", ") + known;
    throw Error(ErrorKind::config, source + ": expected an ISA level that this machine can run (" + list + "), got '" +
                                       name + "'; unset it to use the best");
}

}  // namespace

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const Kernel* const* kernel = available_kernels(); *kernel != nullptr; ++kernel) {
        names.emplace_back((*kernel)->name);
    }
    return names;
}

const Kernel& active_kernel() {
    if (const Kernel* kernel = chosen.load(std::memory_order_acquire)) return *kernel;
    const char* forced = std::getenv("ONNX_KIVI_ISA");
    const Kernel& kernel = forced && *forced ? find("ONNX_KIVI_ISA", forced) : *available_kernels()[0];
    chosen.store(&kernel, std::memory_order_release);
    return kernel;
}

void use_kernel(const std::string& name) { chosen.store(&find("isa", name), std::memory_order_release); }

}  // namespace onnx_kivi
