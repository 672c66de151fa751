// y = x W^T + bias + residual, both factors int8: rows of x with a scale each, outputs with a scale each.
#pragma once

#include "cuda/linear.h"

namespace llmserve::cuda {

struct Int8LinearArgs {
  LinearArgs linear;      // x: int8, 16-byte aligned, inputs and x_stride multiples of 16
  const float* x_scales;  // [rows]
  const void* codes;      // 8 bits, as QuantizedLinearArgs has them
  const float* scales;    // [strips][1][8][2]
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_int8_linear(const llmserve::cuda::Int8LinearArgs* args, void* stream);
