// What every kernel source includes: the CUDA headers, conversions between the types of activations, and the launch.
// Compiled by nvcc for GPUs; with LLMSERVE_CUDA_EMULATOR by the host's compiler, for the emulator of
// csrc/cuda/emulator.
#pragma once

#ifdef LLMSERVE_CUDA_EMULATOR
#include "cuda/emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

#include "cuda/abi.h"

namespace llmserve::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr size_t kSharedWithoutAsking = 48 * 1024;  // bytes of shared memory that a kernel has by default

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(float x) { return x; }
__device__ inline void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void from_float(float x, float& out) { out = x; }

// kWidth values that are loaded and stored as one, 16 bytes at most at a time.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Vector {
  T values[kWidth];
};

#ifdef LLMSERVE_CUDA_EMULATOR

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::dynamic_shared());
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  return emulator::run(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

#else

// The shared memory whose size the launch says, aligned for everything that reads it.
template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// Starts `kernel` with `shared_bytes` of dynamic shared memory. Returns what is wrong with the launch.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

#endif

}  // namespace llmserve::cuda
