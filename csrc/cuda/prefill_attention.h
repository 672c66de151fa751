// Attention of the last tokens of each sequence, a chunk of a prompt, over the paged cache.
#pragma once

#include "cuda/kv_cache.h"

namespace llmserve::cuda {

struct PrefillAttentionArgs {
  const void* q;  // bfloat16 [tokens][heads][head_dim], row t at q + t * q_stride; the cache already has their keys
  void* out;      // the same, row t at out + t * out_stride
  KvCache cache;
  const int32_t* block_tables;  // [sequences][...], row s at block_tables + s * table_stride
  const int32_t* query_start;   // [sequences + 1], rows of q and out: the sequence's last tokens
  const int32_t* seq_lens;      // [sequences], tokens in the cache, these included
  const int32_t* work;          // [num_work][2], sequence and tile of its query rows
  const int32_t* num_work;      // [1]
  const float* sinks;           // null, or [heads]
  int64_t heads, q_stride, out_stride, table_stride;
  int64_t window;       // a query at i sees j with i - j < window (both ways where bidirectional); zero: all
  int64_t fold_tokens;  // zero, or a multiple of 64: rows are to the bit those of decode with that split_tokens
  int64_t num_ctas;     // of the grid, which goes through the work in turns
  float scale, softcap;
  int32_t is_bidirectional;
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_prefill_attention(const llmserve::cuda::PrefillAttentionArgs* args,
                                                          void* stream);
