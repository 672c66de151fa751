// A thread writes one value of several rows, so that the order is read once for them; writes are in sequence, reads are
// scattered over a row, which lies in a cache.
#include "cuda/gather_columns.h"

#include "cuda/device.h"

namespace llmserve::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kRows = 4;  // of a block

__global__ void __launch_bounds__(kBlock) gather_columns_kernel(GatherColumnsArgs args) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (column >= args.columns) return;
  const int64_t from = args.order[column], first = static_cast<int64_t>(blockIdx.y) * kRows;
  for (int64_t row = first; row < first + kRows && row < args.rows; ++row)
    static_cast<uint16_t*>(args.out)[row * args.out_stride + column] =
        static_cast<const uint16_t*>(args.x)[row * args.x_stride + from];
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_gather_columns(const llmserve::cuda::GatherColumnsArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->rows == 0) return cudaSuccess;
  if (args->rows < 0 || args->columns <= 0) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((args->columns + kBlock - 1) / kBlock),
                  static_cast<unsigned>((args->rows + kRows - 1) / kRows));
  return launch(gather_columns_kernel, grid, kBlock, 0, static_cast<cudaStream_t>(stream), *args);
}
