// What the parts of the module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "../store/store.hpp"

namespace onnx_kivi {

namespace nb = nanobind;

using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// A new NumPy array of that shape, uninitialized, and its memory.
template <class T>
std::pair<nb::object, T*> make_array(const std::vector<int64_t>& shape, nb::dlpack::dtype dtype) {
    std::size_t count = 1;
    for (const int64_t size : shape) count *= static_cast<std::size_t>(size);
    auto data = std::make_unique<T[]>(count);
    T* const memory = data.get();
    nb::capsule owner(data.release(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
    const std::vector<std::size_t> sizes(shape.begin(), shape.end());
    nb::ndarray<nb::numpy> array(memory, sizes.size(), sizes.data(), owner, nullptr, dtype);
    return {nb::cast(array, nb::rv_policy::reference), memory};
}

constexpr nb::dlpack::dtype FLOAT32{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 32, 1};
constexpr nb::dlpack::dtype FLOAT16{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
constexpr nb::dlpack::dtype UINT8{static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), 8, 1};

void bind_state(nb::module_& module);

}  // namespace onnx_kivi
