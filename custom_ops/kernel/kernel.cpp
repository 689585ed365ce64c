// One ISA level: compiled once per level, with KIVI_ISA its name.
#include "encode.hpp"
#include "tasks.hpp"

#define KIVI_QUOTE(name) #name
#define KIVI_STRING(name) KIVI_QUOTE(name)

namespace onnx_kivi::KIVI_ISA {

extern const Kernel KERNEL;
const Kernel KERNEL = {KIVI_STRING(KIVI_ISA), encode_block, decode_block, run_task, run_combine};

}  // namespace onnx_kivi::KIVI_ISA
