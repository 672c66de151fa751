// What the linear layers have in common: y = x W^T + bias + residual, and how their sums are cut.
//
// The inputs are cut into `slices`, whose number depends on the weight's shape alone. Each slice is summed by itself in
// order, and an output is the sum of its slices from the first to the last. Kernels differ in who computes a slice:
// warps of one block, one warp after the other, or several blocks that leave their sums in `workspace`. So an output
// has the same bits whatever the rows of the batch and however many.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct LinearArgs {
  const void* x;          // [rows][inputs], row r at x + r * x_stride elements
  const float* bias;      // null, or [outputs]
  const float* residual;  // null, or [rows][outputs], row r at residual + r * residual_stride; may be out
  void* out;              // [rows][outputs], row r at out + r * out_stride
  void* workspace;        // 4 bytes x [slices][rows][outputs]
  int32_t* counters;      // one for each tile of outputs: zero, and left zero
  int64_t rows, outputs, inputs, x_stride, residual_stride, out_stride;
  int64_t workspace_bytes, num_counters;
  int32_t slices;
  Type out_type;  // kBF16 or kF32
};

}  // namespace llmserve::cuda
