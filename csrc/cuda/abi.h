// The C ABI of libllmserve_cuda.so: plain structs of raw device pointers, sizes and strides, and a stream. Launchers
// return 0 or the cudaError of the launch; they neither allocate nor synchronize. It knows neither torch nor Python, so
// one library serves every version of both.
#pragma once

#include <cstdint>

#define LLMSERVE_CUDA_API extern "C" __attribute__((visibility("default")))

namespace llmserve::cuda {

// Raised by whatever changes a struct or a launcher: who loads the library compares.
constexpr int32_t kAbiVersion = 4;

enum class Type : int32_t { kBF16, kF16, kF32, kF8E4M3, kI8 };

}  // namespace llmserve::cuda
