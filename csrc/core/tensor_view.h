// A tensor somebody else owns, as the bindings hand it to the kernels.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/dtype.h"

namespace llmserve {

struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;     // 1 for vectors
  int64_t columns = 0;  // logical elements of a row; rows are contiguous

  const uint8_t* row(int64_t index) const {
    return static_cast<const uint8_t*>(data) + static_cast<size_t>(index) * row_bytes(dtype, columns);
  }

  // Checked once, when a weight is bound. Throws std::invalid_argument naming `argument`.
  void check(const std::string& argument, size_t num_bytes) const {
    if (data == nullptr) throw std::invalid_argument(argument + ": no data");
    if (rows <= 0 || columns <= 0) throw std::invalid_argument(argument + ": empty shape");
    if (columns % block_values(dtype) != 0)
      throw std::invalid_argument(argument + ": " + std::to_string(columns) + " columns are not a multiple of the " +
                                  dtype_name(dtype) + " block of " + std::to_string(block_values(dtype)));
    const size_t expected = static_cast<size_t>(rows) * row_bytes(dtype, columns);
    if (num_bytes != expected)
      throw std::invalid_argument(argument + ": " + std::to_string(num_bytes) + " bytes, but shape (" +
                                  std::to_string(rows) + ", " + std::to_string(columns) + ") of " + dtype_name(dtype) +
                                  " takes " + std::to_string(expected));
  }
};

}  // namespace llmserve
