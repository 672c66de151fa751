// One token of each row of logits, by the definition of llmserve/ops/reference_sampler.py.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct SampleArgs {
  const float* logits;         // [rows][vocab], row r at logits + r * logits_stride; raw
  const float* edited;         // null, or rows of logits after edits and masks, edited_stride apart
  const int32_t* edited_rows;  // null, or [rows]: which row of edited is sampled from; -1: the raw row
  // Of each row:
  const int32_t* targets;  // -1: sample
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const float* typical_p;  // null: 1 everywhere
  const int64_t* seed;     // the bits of an unsigned number
  const int64_t* sample_position;
  int32_t* token_ids;  // the token, the target, NO_TOKEN or NOT_FINITE
  void* workspace;     // llmserve_cuda_sample_workspace bytes, aligned to 16; holds nothing between calls
  int64_t rows, vocab, logits_stride, edited_stride;
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_sample(const llmserve::cuda::SampleArgs* args, void* stream);
LLMSERVE_CUDA_API int64_t llmserve_cuda_sample_workspace(int64_t rows, int64_t vocab);
