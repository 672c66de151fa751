// The paged cache of one layer's keys and values, as every kernel that touches it sees it.
//
//   k, v               [num_blocks][kv_heads][block_size][head_dim], dense: the tokens of a block and head lie together
//   k_scales, v_scales [num_blocks][kv_heads][block_size], where the type has one byte: a token is values * scale
//
//   token j of a sequence:  block = table[j / block_size],  row = (block * kv_heads + head) * block_size + j %
//   block_size
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct KvCache {
  void* k;
  void* v;
  float* k_scales;  // null where the type has 16 bits
  float* v_scales;
  int64_t kv_heads, block_size, head_dim;  // block_size is a power of two, 8 at least
  Type type;                               // bfloat16, float16, float8 e4m3 or int8
};

}  // namespace llmserve::cuda
