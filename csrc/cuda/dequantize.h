// Packed weights (packed_weights.h) → bfloat16 rows, for products of many rows.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct DequantizeArgs {
  const void* codes;  // as QuantizedLinearArgs has them
  const void* scales;
  const void* biases;                   // null where codes are symmetric
  void* out;                            // bfloat16 [outputs][inputs], row r at out + r * out_stride; 16-byte aligned
  int64_t outputs, inputs, out_stride;  // inputs and out_stride: multiples of 8
  int32_t bits, group;
  Type scale_type;
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_dequantize(const llmserve::cuda::DequantizeArgs* args, void* stream);
