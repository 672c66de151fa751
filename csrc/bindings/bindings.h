// What the binding files share: checked views of Python buffers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/tensor_view.h"

namespace llmserve {

namespace py = pybind11;

// A tensor view that keeps the Python object behind its bytes alive.
struct BoundTensor {
  TensorView view;
  py::object owner;
};

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::vector<T> to_vector(const py::object& source) {
  if (source.is_none()) return {};
  const auto array = source.cast<py::array_t<T, py::array::c_style | py::array::forcecast>>();
  return std::vector<T>(array.data(), array.data() + array.size());
}

// The data of an array of exactly `size` elements. Throws ValueError naming the argument.
template <typename T>
const T* checked(const Array<T>& array, py::ssize_t size, const char* name) {
  if (array.size() != size)
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(array.size()) + " entries, expected " +
                                std::to_string(size));
  return array.data();
}

void bind_block_pool(py::module_& module);
void bind_core(py::module_& module);
void bind_program(py::module_& module);
void bind_sampling(py::module_& module);

}  // namespace llmserve
