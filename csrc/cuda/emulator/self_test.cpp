// Kernels with a mistake each, and one without: what the emulator must say of them (tests/cuda/test_emulator.py).
#include "cuda/device.h"
#include "cuda/ptx.h"

namespace llmserve::cuda {

namespace {

constexpr unsigned kThreads = 64;

// Reverses a block's numbers by way of shared memory.
__global__ void reverse_kernel(int* out, bool waits) {
  int* shared = dynamic_shared<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (waits) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void half_barrier_kernel() {
  if (threadIdx.x < kThreads / 2) __syncthreads();
  __syncwarp();
  if (threadIdx.x >= kThreads / 2) __shfl_sync(0x1u << (threadIdx.x % 32) | 0x1u << ((threadIdx.x + 1) % 32), 1, 0);
}

__global__ void outside_kernel() {
  auto* shared = dynamic_shared<unsigned char>();
  if (threadIdx.x == 0) shared[kThreads] = 1;
}

__global__ void not_waited_for_kernel(const int* from) {
  cp_async(dynamic_shared<int>() + threadIdx.x * 4, from);
  cp_async_commit();
}

__global__ void early_read_kernel(const int* from, int* out) {
  int* shared = dynamic_shared<int>() + threadIdx.x * 4;
  cp_async(shared, from);
  cp_async_commit();
  out[threadIdx.x] = shared[0];  // what was there before
  cp_async_wait<0>();
}

__global__ void wrong_mask_kernel() { __shfl_sync(0x1u, 1, 0); }

}  // namespace

}  // namespace llmserve::cuda

// Runs one of them; `out` takes 64 numbers.
LLMSERVE_CUDA_API int32_t llmserve_emulator_self_test(int32_t which, int32_t* out) {
  using namespace llmserve::cuda;
  alignas(16) static const int numbers[4] = {1, 2, 3, 4};
  constexpr size_t kShared = kThreads * 16;
  switch (which) {
    case 0: return launch(reverse_kernel, 1, kThreads, kShared, nullptr, out, true);
    case 1: return launch(reverse_kernel, 1, kThreads, kShared, nullptr, out, false);
    case 2: return launch(half_barrier_kernel, 1, kThreads, 0, nullptr);
    case 3: return launch(outside_kernel, 1, kThreads, size_t{kThreads}, nullptr);
    case 4: return launch(not_waited_for_kernel, 1, kThreads, kShared, nullptr, numbers);
    case 5: return launch(early_read_kernel, 1, kThreads, kShared, nullptr, numbers, out);
    case 6: return launch(wrong_mask_kernel, 1, kThreads, 0, nullptr);
    default: return cudaErrorInvalidValue;
  }
}
