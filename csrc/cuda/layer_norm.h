// Layer norm of rows: mean and variance, a weight and maybe a bias; residual stream and int8 rows as in rms_norm.h.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct LayerNormArgs {
  const void* x;        // [rows][columns], row r at x + r * x_stride elements
  float* residual;      // null, or [rows][columns] dense: becomes residual + x, which is what is normalized
  const float* weight;  // [columns]
  const float* bias;    // null, or [columns]
  void* out;            // bfloat16, or int8 where there are scales: [rows][columns], row r at out + r * out_stride
  float* scales;        // null, or [rows]: the largest magnitude of the row / 127
  int64_t rows, columns, x_stride, out_stride;
  float eps;
  Type type;  // of x: bfloat16 or float32
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_layer_norm(const llmserve::cuda::LayerNormArgs* args, void* stream);
