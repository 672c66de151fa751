// y = x W^T + bias + residual, W packed in 4 or 8 bits (packed_weights.h), x bfloat16.
#pragma once

#include "cuda/linear.h"

namespace llmserve::cuda {

struct QuantizedLinearArgs {
  LinearArgs linear;   // x: bfloat16, 16-byte aligned, inputs and x_stride multiples of 8
  const void* codes;   // [strips][tiles][bits / 4][32][16 bytes]
  const void* scales;  // [strips][groups][8][2]
  const void* biases;  // null, or like the scales
  int32_t bits;        // 4 or 8
  int32_t group;       // inputs: 32, 64, 128, or 0 for all; 16 with 8 bits without biases
  Type scale_type;     // of scales and biases: kF16 or kF32
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_quantized_linear(const llmserve::cuda::QuantizedLinearArgs* args, void* stream);
