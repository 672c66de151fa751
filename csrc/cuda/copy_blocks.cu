// How many pairs there are is known on the device alone, so that a graph can hold the launch: a fixed number of blocks
// goes over all (pair, tensor), and ends at once where there is none, as in most steps.
#include "cuda/copy_blocks.h"

#include "cuda/device.h"

namespace llmserve::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int64_t kMostBlocks = 1024;  // several per multiprocessor

__global__ void copy_blocks_kernel(CopyBlocksArgs args) {
  const int64_t count = min(static_cast<int64_t>(*args.count), args.most_pairs);
  const int64_t vectors = args.block_bytes / static_cast<int64_t>(sizeof(uint4));
  for (int64_t item = blockIdx.x; item < count * args.num_tensors; item += gridDim.x) {
    const int64_t pair = item / args.num_tensors;
    auto* tensor = reinterpret_cast<uint4*>(args.tensors[item % args.num_tensors]);
    const uint4* source = tensor + args.pairs[2 * pair] * vectors;
    uint4* target = tensor + args.pairs[2 * pair + 1] * vectors;
    for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) target[i] = source[i];
  }
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_copy_blocks(const llmserve::cuda::CopyBlocksArgs* args, void* stream) {
  using namespace llmserve::cuda;
  const int64_t items = args->most_pairs * args->num_tensors;
  if (items == 0) return cudaSuccess;
  if (args->most_pairs < 0 || args->num_tensors < 0 || args->block_bytes <= 0 || args->block_bytes % 16 != 0)
    return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(items < kMostBlocks ? items : kMostBlocks);
  return launch(copy_blocks_kernel, blocks, kBlock, 0, static_cast<cudaStream_t>(stream), *args);
}
