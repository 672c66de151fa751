// Columns of rows in another order: the inputs of a layer whose weights were quantized in activation order.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct GatherColumnsArgs {
  const void* x;         // [rows][columns] of 2 bytes, row r at x + r * x_stride elements
  const int32_t* order;  // [columns]: out[r][j] = x[r][order[j]]
  void* out;             // row r at out + r * out_stride; not x
  int64_t rows, columns, x_stride, out_stride;
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_gather_columns(const llmserve::cuda::GatherColumnsArgs* args, void* stream);
