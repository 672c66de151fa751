// A block has 4,096 logits of a row: it copies them under the mask, then computes the tokens that have an entry anew
// from the raw logits. Each step is rounded to float32 as in llmserve/ops/reference_sampler.py: no product is fused
// with a sum.
#include "cuda/edit_logits.h"

#include "cuda/device.h"

namespace llmserve::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kChunk = 4096;

// The first entry of [begin, end) whose token is not below `token`.
__device__ int lower_bound(const int32_t* tokens, int begin, int end, int64_t token) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (tokens[middle] < token)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

__device__ float edit(const EditLogitsArgs& args, int64_t row, int entry, float logit) {
  for (int i = args.bias_start[entry]; i < args.bias_start[entry + 1]; ++i) logit = __fadd_rn(logit, args.biases[i]);
  const float repetition = args.repetition[row];
  if ((args.flags[entry] & kSeen) != 0 && repetition != 1.0f)
    logit = logit > 0.0f ? __fdiv_rn(logit, repetition) : __fmul_rn(logit, repetition);
  const int32_t count = args.counts[entry];
  if (count == 0) return logit;
  logit = __fsub_rn(logit, __fmul_rn(args.frequency[row], static_cast<float>(count)));
  return __fsub_rn(logit, args.presence[row]);
}

__global__ void edit_logits_kernel(EditLogitsArgs args) {
  const int64_t row = blockIdx.y;
  if (args.rows[row] < 0) return;
  const float* logits = args.logits + args.rows[row] * args.logits_stride;
  float* edited = args.edited + row * args.edited_stride;
  const int64_t words = (args.vocab + 31) / 32;
  const uint32_t* mask = args.mask_rows[row] < 0 ? nullptr : args.masks + args.mask_rows[row] * words;
  const auto is_allowed = [&](int64_t id) { return mask == nullptr || (mask[id / 32] >> id % 32 & 1) != 0; };
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk, end = min(begin + kChunk, args.vocab);
  for (int64_t id = begin + threadIdx.x; id < end; id += kBlock) edited[id] = is_allowed(id) ? logits[id] : -INFINITY;
  __syncthreads();
  const int first = lower_bound(args.tokens, args.entry_start[row], args.entry_start[row + 1], begin);
  const int last = lower_bound(args.tokens, first, args.entry_start[row + 1], end);
  for (int entry = first + static_cast<int>(threadIdx.x); entry < last; entry += kBlock) {
    const int32_t token = args.tokens[entry];
    const bool stays = is_allowed(token) && (args.flags[entry] & kForbidden) == 0;
    edited[token] = stays ? edit(args, row, entry, logits[token]) : -INFINITY;
  }
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_edit_logits(const llmserve::cuda::EditLogitsArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->edited_rows == 0) return cudaSuccess;
  if (args->edited_rows < 0 || args->edited_rows > 65535 || args->vocab <= 0) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((args->vocab + kChunk - 1) / kChunk), static_cast<unsigned>(args->edited_rows));
  return launch(edit_logits_kernel, grid, kBlock, 0, static_cast<cudaStream_t>(stream), *args);
}
