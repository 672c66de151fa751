// Copies of whole blocks of the KV cache, in every layer at once.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct CopyBlocksArgs {
  const int64_t* pairs;    // [most_pairs][2]: source, target. No target is a source or a target of another pair
  const int32_t* count;    // [1]: how many pairs there are
  const int64_t* tensors;  // [num_tensors] addresses; block b of each at b * block_bytes
  int64_t most_pairs, num_tensors, block_bytes;  // addresses and bytes are multiples of 16
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_copy_blocks(const llmserve::cuda::CopyBlocksArgs* args, void* stream);
