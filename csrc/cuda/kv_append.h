// What comes between the projection of queries, keys and values and attention: the norm of heads, rotation, and the
// cache.
#pragma once

#include "cuda/kv_cache.h"

namespace llmserve::cuda {

struct KvAppendArgs {
  const void* qkv;           // bfloat16 [tokens][heads + 2 kv_heads][head_dim], row t at qkv + t * qkv_stride
  void* q_out;               // bfloat16 [tokens][heads][head_dim], row t at q_out + t * q_stride
  const int32_t* positions;  // [tokens]
  const int64_t* slots;      // [tokens], block * block_size + offset; negative: the cache does not get the token
  const float* rope;         // null, or [positions][rotary_dim / 2][2], cosine and sine
  const float* q_norm;       // null, or [head_dim]
  const float* k_norm;
  int64_t tokens, heads, qkv_stride, q_stride, rotary_dim;
  KvCache cache;
  float eps;
  int32_t is_interleaved;  // pairs are (2i, 2i + 1), else (i, i + rotary_dim / 2)
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_kv_append(const llmserve::cuda::KvAppendArgs* args, void* stream);
