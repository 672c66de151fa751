// Log-probabilities of raw logits: of one token of each row, its rank, and the most likely tokens.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct TokenLogprobsArgs {
  const float* logits;          // [rows][vocab], row r at logits + r * logits_stride
  const int32_t* token_ids;     // [rows]; below 0: the row has no token, and nothing is said of it
  const int32_t* num_logprobs;  // [rows] how many of the most likely tokens, at most `most`; -1: nothing is asked
  float* logprobs;              // [rows]; NaN where nothing is said
  int32_t* ranks;               // [rows] 1 + how many logits are larger; 0 where nothing is said
  int32_t* top_ids;             // [rows][most] by (logit descending, id ascending), behind the last -1
  float* top_logprobs;          // [rows][most], behind the last NaN
  int64_t rows, vocab, logits_stride, most;
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_token_logprobs(const llmserve::cuda::TokenLogprobsArgs* args, void* stream);
