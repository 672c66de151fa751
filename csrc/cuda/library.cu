// What the library says of itself.
#include <cuda_runtime.h>

#include "cuda/abi.h"

LLMSERVE_CUDA_API int32_t llmserve_cuda_abi_version() { return llmserve::cuda::kAbiVersion; }

LLMSERVE_CUDA_API const char* llmserve_cuda_error(int32_t status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
