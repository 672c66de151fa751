// Attention of one query per sequence over the paged cache.
#pragma once

#include "cuda/kv_cache.h"

namespace llmserve::cuda {

struct DecodeAttentionArgs {
  const void* q;  // bfloat16 [sequences][heads][head_dim], row s at q + s * q_stride; the cache already has its key
  void* out;      // the same, row s at out + s * out_stride; zeros where seq_lens is zero
  KvCache cache;
  const int32_t* block_tables;   // [sequences][...], row s at block_tables + s * table_stride
  const int32_t* seq_lens;       // [sequences], the query's token is the last
  const int32_t* work;           // [extent[0]][2], sequence and split: tokens split * extent[1] on
  const int32_t* extent;         // [2]: how much work there is, and the tokens of a split, a multiple of 64
  const int32_t* partial_start;  // [sequences], where in the workspace a sequence's first split is
  const float* sinks;            // null, or [heads]
  float* partial_out;            // workspace, [splits][heads][head_dim]
  float* partial_state;          // workspace, [splits][heads][2], largest score and sum
  int64_t sequences, heads, q_stride, out_stride, table_stride;
  int64_t window;        // the query sees the last `window` tokens; zero: all
  int64_t num_ctas;      // of the grid, which goes through the work in turns
  float scale, softcap;  // softcap: zero, or scores are softcap * tanh(score / softcap)
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_decode_attention(const llmserve::cuda::DecodeAttentionArgs* args, void* stream);
