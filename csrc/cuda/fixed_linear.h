// y = x W^T + bias + residual of bfloat16, with the same bits for a row in every batch: what a library of products does
// not promise.
#pragma once

#include "cuda/linear.h"

namespace llmserve::cuda {

struct FixedLinearArgs {
  LinearArgs linear;   // x: bfloat16, 16-byte aligned, inputs and x_stride multiples of 8
  const void* weight;  // bfloat16 [outputs][inputs], row r at weight + r * weight_stride; aligned like x
  int64_t weight_stride;
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_fixed_linear(const llmserve::cuda::FixedLinearArgs* args, void* stream);
