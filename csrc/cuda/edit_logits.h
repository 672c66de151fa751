// Copies of logits with what requests ask for before sampling: bias, penalties, masks, forbidden tokens.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

constexpr int32_t kSeen = 1, kForbidden = 2;  // flags of an entry

// Edited row e is row rows[e] of the logits. What is done to single tokens is in lists made by the host:
//
//   entry_start  [edited_rows + 1]  entries of row e: entry_start[e] … entry_start[e + 1] - 1, by token ascending
//   tokens, flags, counts  [entries]  seen: in the prompt or generated; counts: how often it was generated
//   bias_start   [entries + 1]      biases of entry i: bias_start[i] … bias_start[i + 1] - 1, added in this order
struct EditLogitsArgs {
  const float* logits;  // [rows][vocab], row r at logits + r * logits_stride
  float* edited;        // [edited_rows][vocab], row e at edited + e * edited_stride
  const int32_t* rows;  // [edited_rows]; -1: nothing is written
  const int32_t* entry_start;
  const int32_t* tokens;
  const int32_t* flags;
  const int32_t* counts;
  const int32_t* bias_start;
  const float* biases;
  const float* repetition;  // [edited_rows], as the two below; 1 is none
  const float* frequency;
  const float* presence;
  const int32_t* mask_rows;  // [edited_rows]; -1: no mask
  const uint32_t* masks;     // [masks][ceil(vocab / 32)]: bit i % 32 of word i / 32 allows token i
  int64_t edited_rows, vocab, logits_stride, edited_stride;
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_edit_logits(const llmserve::cuda::EditLogitsArgs* args, void* stream);
