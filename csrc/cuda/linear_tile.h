// Device code of the linear layers: slices, sums of several blocks, and how an output is written.
#pragma once

#include "cuda/device.h"
#include "cuda/linear.h"

namespace llmserve::cuda {

constexpr int kChannels = 128;     // outputs of a block of the tiled kernels
constexpr int kWarpChannels = 32;  // of a warp: a pair of strips
constexpr int kChannelWarps = kChannels / kWarpChannels;
constexpr int kSumPitch = kChannels + 4;  // values: eight rows two apart lie in different banks
constexpr int kMultiprocessors = 132;     // that blocks are counted for; others get fewer or more waves

// Where slice `slice` begins, in units that are not cut.
__host__ __device__ inline int64_t slice_begin(int64_t units, int slices, int slice) { return units * slice / slices; }

// How many blocks share the slices of one tile of outputs, so that about `wanted` blocks run.
inline int blocks_per_tile(int64_t tiles, int slices, int64_t wanted) {
  const int64_t blocks = wanted / (tiles > 0 ? tiles : 1);
  return static_cast<int>(blocks < 1 ? 1 : blocks > slices ? slices : blocks);
}

// Whether the launch has what blocks that share a tile need.
inline bool fits_workspace(const LinearArgs& args, int64_t tiles, int blocks) {
  return blocks == 1 || (args.workspace != nullptr && args.counters != nullptr && tiles <= args.num_counters &&
                         args.workspace_bytes >= args.slices * args.rows * args.outputs * int64_t{4});
}

// Whether a block on the current device may have so much shared memory: some GPUs newer than sm_80 have less, and take
// smaller tiles, whose results are the same.
inline bool fits_shared(size_t bytes) {
#ifdef LLMSERVE_CUDA_EMULATOR
  return bytes > 0;
#else
  int device = 0, most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
         bytes <= static_cast<size_t>(most);
#endif
}

// `each(i)` of kCount things, dealt to the kThreads threads of the block in turn. Two rounds at a time: the addresses
// of more would take registers for as long as the kernel runs.
template <int kCount, int kThreads, typename Each>
__device__ inline void deal(const Each& each) {
#pragma unroll 2
  for (int round = 0; round < (kCount + kThreads - 1) / kThreads; ++round) {
    const int i = round * kThreads + static_cast<int>(threadIdx.x);
    if (kCount % kThreads == 0 || i < kCount) each(i);
  }
}

// One finished sum: bias and residual are added in float32, and it is rounded once.
__device__ inline void write_output(const LinearArgs& args, int64_t row, int64_t channel, float sum) {
  if (args.bias != nullptr) sum += args.bias[channel];
  if (args.residual != nullptr) sum += args.residual[row * args.residual_stride + channel];
  if (args.out_type == Type::kF32)
    static_cast<float*>(args.out)[row * args.out_stride + channel] = sum;
  else
    static_cast<__nv_bfloat16*>(args.out)[row * args.out_stride + channel] = __float2bfloat16_rn(sum);
}

template <typename T>
__device__ inline T* workspace_at(const LinearArgs& args, int slice, int64_t row, int64_t channel) {
  return static_cast<T*>(args.workspace) + (slice * args.rows + row) * args.outputs + channel;
}

// Whether this block is the last of the `blocks` that share a tile: then it sees what the others wrote before they came
// here. The counter is left zero.
__device__ inline bool is_last_block(int32_t* counter, int blocks) {
  __shared__ int32_t is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(counter, 1) == blocks - 1 ? 1 : 0;
    if (is_last != 0) *counter = 0;
  }
  __syncthreads();
  if (is_last == 0) return false;
  __threadfence();
  return true;
}

// The sum of all slices of an output that blocks left in the workspace, from the first slice on.
template <typename T>
__device__ inline T sum_of_slices(const LinearArgs& args, int64_t row, int64_t channel) {
  T sum = 0;
  for (int slice = 0; slice < args.slices; ++slice) sum += __ldcg(workspace_at<T>(args, slice, row, channel));
  return sum;
}

// The sums of one block of a tiled kernel, [kRows][kSumPitch] in shared memory. Every thread has its own places, so
// adding to them waits for nobody. A block that has all slices sums them here; others leave each in the workspace.
template <typename T, int kRows>
struct TileSums {
  static constexpr size_t kBytes = sizeof(T) * kRows * kSumPitch;

  T* sums;
  int64_t first_row, first_channel;
  bool is_shared;  // the tile, with other blocks

  // Before a barrier.
  __device__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kSumPitch; i += static_cast<int>(blockDim.x)) sums[i] = 0;
  }

  // Adds what a warp's product of a strip and eight rows holds: `d` as mma_bf16 leaves it.
  __device__ void add_product(int row, int channel, const T (&d)[4]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    T* at = sums + (row + lane % 4 * 2) * kSumPitch + channel + lane / 4;
    for (int i = 0; i < 4; ++i) at[i % 2 * kSumPitch + i / 2 * 8] += d[i];
  }

  // `visit(row, channel, sum)` of each output that exists.
  template <typename Visit>
  __device__ void for_each(const LinearArgs& args, const Visit& visit) {
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kChannels; i += static_cast<int>(blockDim.x)) {
      const int row = i / kChannels, channel = i % kChannels;
      if (first_row + row < args.rows && first_channel + channel < args.outputs)
        visit(first_row + row, first_channel + channel, sums[row * kSumPitch + channel]);
    }
  }

  // All threads have added what they have of `slice`.
  __device__ void end_slice(const LinearArgs& args, int slice) {
    if (!is_shared) return;
    __syncthreads();
    for_each(args, [&](int64_t row, int64_t channel, T& sum) {
      *workspace_at<T>(args, slice, row, channel) = sum;
      sum = 0;
    });
    __syncthreads();
  }

  // Writes the outputs, `write(row, channel, sum)` one by one; the last block that shares a tile does.
  template <typename Write>
  __device__ void finish(const LinearArgs& args, int32_t* counter, int blocks, const Write& write) {
    if (is_shared && !is_last_block(counter, blocks)) return;
    __syncthreads();
    for_each(args, [&](int64_t row, int64_t channel, T& sum) {
      write(row, channel, is_shared ? sum_of_slices<T>(args, row, channel) : sum);
    });
  }
};

}  // namespace llmserve::cuda
