// Rows → int8 with one scale each, the largest value to 127.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct QuantizeRowsArgs {
  const void* x;  // bfloat16 [rows][columns], row r at x + r * x_stride
  int8_t* codes;  // row r at codes + r * codes_stride
  float* scales;  // [rows]
  int64_t rows, columns, x_stride, codes_stride;
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_quantize_rows(const llmserve::cuda::QuantizeRowsArgs* args, void* stream);
