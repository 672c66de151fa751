// Activation functions of a network's feed-forward part, gated or not, to bfloat16 or int8 rows.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

enum class Act : int32_t { kSilu, kGelu, kGeluTanh, kRelu2 };

struct ActArgs {
  const void* x;  // [rows][columns], or gated [rows][2 * columns]: gate | up. Row r at x + r * x_stride values
  void* out;      // bfloat16, or int8 where there are scales: [rows][columns], row r at out + r * out_stride values
  float* scales;  // null, or [rows]: the largest magnitude of the row / 127
  int64_t rows, columns, x_stride, out_stride;
  Act kind;
  int32_t gated;
  Type type;  // of x: bfloat16 or float32
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_act(const llmserve::cuda::ActArgs* args, void* stream);
