// One block a row, which is read twice: for its largest value and, from a cache, for its codes. scale = largest / 127;
// code = round(x / scale), half to even; a row of zeros has scale 0. What is not finite spreads over its row: a NaN or
// an infinity makes the scale NaN or infinite, and so all that is computed from the row.
#include "cuda/quantize_rows.h"

#include "cuda/device.h"

namespace llmserve::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kWidth = 8;  // values of a load

// The largest bit pattern of the block's: of floats that are not negative it is the largest float, or a NaN.
__device__ unsigned largest_of_block(unsigned x) {
  __shared__ unsigned all[kBlock / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, step));
  if (threadIdx.x % kWarp == 0) all[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (const unsigned other : all) x = max(x, other);
  return x;
}

__device__ int8_t code_of(float x, float scale) {
  if (scale == 0.0f) return 0;
  return static_cast<int8_t>(max(-127, min(127, __float2int_rn(__fdiv_rn(x, scale)))));
}

template <bool kWhole>
__global__ void __launch_bounds__(kBlock) quantize_rows_kernel(QuantizeRowsArgs args) {
  constexpr int kTake = kWhole ? kWidth : 1;
  using Values = Vector<__nv_bfloat16, kTake>;
  using Codes = Vector<int8_t, kTake>;
  const int64_t row = blockIdx.x, step = int64_t{kBlock} * kTake;
  const auto* x = static_cast<const __nv_bfloat16*>(args.x) + row * args.x_stride;
  int8_t* codes = args.codes + row * args.codes_stride;
  unsigned largest = 0;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * kTake; column < args.columns; column += step) {
    const Values values = *reinterpret_cast<const Values*>(x + column);
    for (int i = 0; i < kTake; ++i) largest = max(largest, __float_as_uint(to_float(values.values[i])) & 0x7FFFFFFFu);
  }
  const float scale = __fdiv_rn(__uint_as_float(largest_of_block(largest)), 127.0f);
  if (threadIdx.x == 0) args.scales[row] = scale;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * kTake; column < args.columns; column += step) {
    const Values values = *reinterpret_cast<const Values*>(x + column);
    Codes out;
    for (int i = 0; i < kTake; ++i) out.values[i] = code_of(to_float(values.values[i]), scale);
    *reinterpret_cast<Codes*>(codes + column) = out;
  }
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_quantize_rows(const llmserve::cuda::QuantizeRowsArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->rows == 0) return cudaSuccess;
  if (args->rows < 0 || args->columns <= 0) return cudaErrorInvalidValue;
  const bool whole = args->columns % kWidth == 0 && args->x_stride % kWidth == 0 && args->codes_stride % kWidth == 0 &&
                     reinterpret_cast<uintptr_t>(args->x) % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(args->codes) % 8 == 0;
  return launch(whole ? quantize_rows_kernel<true> : quantize_rows_kernel<false>, static_cast<unsigned>(args->rows),
                kBlock, 0, static_cast<cudaStream_t>(stream), *args);
}
