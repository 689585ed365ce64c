// Which ISA level serves this process.
#pragma once

#include <string>
#include <vector>

#include "../kernel/kernel.hpp"
#include "error.hpp"

namespace onnx_kivi {

// The level in use: chosen at first use, the one that ONNX_KIVI_ISA names, else the best this machine can run.
// Throws Error(config) if ONNX_KIVI_ISA names one that it can't.
KIVI_API const Kernel& active_kernel();

// Takes the level of that name from now on, for tests and benchmarks. Throws as active_kernel does.
KIVI_API void use_kernel(const std::string& name);

// Names of the levels that this machine can run, best first.
KIVI_API std::vector<std::string> kernel_names();

}  // namespace onnx_kivi
