// Each row is read once into registers, eight values of a thread at a time, summed in float32 and written scaled. A
// group of threads has a row: as many as its vectors, so that heads of 64 values do not occupy whole blocks.
// 64 registers at most: a multiprocessor has 1,024 threads.
#include "cuda/rms_norm.h"

#include "cuda/rows.h"

namespace llmserve::cuda {

namespace {

template <typename T, int kThreads, bool kWhole>
__global__ void __launch_bounds__(kThreads < kRowBlock ? kRowBlock : kThreads) rms_norm_kernel(RmsNormArgs args) {
  constexpr bool kShared = kThreads < kRowBlock;  // a block has several rows
  const int in_row = static_cast<int>(threadIdx.x) % (kShared ? kThreads : kMostRowThreads);
  const int64_t row = kShared ? int64_t{blockIdx.x} * (kRowBlock / kThreads) + threadIdx.x / kThreads : blockIdx.x;
  const bool exists = !kShared || row < args.rows;  // all threads take part in the sums
  const T* x = static_cast<const T*>(args.x) + (exists ? row : 0) * args.x_stride;
  float* residual = args.residual == nullptr ? nullptr : args.residual + row * args.columns;
  const int columns = exists ? static_cast<int>(args.columns) : 0;
  float values[kRowVectors][kRowWidth];
  float squares = 0.0f;
  for (int v = 0; v < kRowVectors; ++v) {
    const int column = (v * kThreads + in_row) * kRowWidth;
    if (column >= columns) break;
    load_vector<T, kWhole>(x, column, columns, values[v]);
    if (residual != nullptr) add_to_residual<kWhole>(residual, column, columns, values[v]);
    for (int i = 0; i < kRowWidth; ++i) squares += values[v][i] * values[v][i];
  }
  const float factor = rsqrtf(sum_of_row<kThreads>(squares) / static_cast<float>(args.columns) + args.eps);
  uint32_t largest = 0;
  for (int v = 0; v < kRowVectors; ++v) {
    const int column = (v * kThreads + in_row) * kRowWidth;
    if (column >= columns) break;
    for (int i = 0; i < kRowWidth; ++i) {
      if (column + i >= columns) break;
      values[v][i] = values[v][i] * factor * args.weight[column + i];
      largest = max(largest, magnitude(values[v][i]));
    }
  }
  store_row<kThreads, kWhole>(args, exists ? row : -1, in_row, largest, values);
}

template <typename T, int kThreads>
cudaError_t launch_rows(const RmsNormArgs& args, cudaStream_t stream) {
  constexpr int kRows = kThreads < kRowBlock ? kRowBlock / kThreads : 1;
  const auto blocks = static_cast<unsigned>((args.rows + kRows - 1) / kRows);
  const bool whole = args.columns % kRowWidth == 0 && rows_are_aligned<T>(args.x, args.x_stride) &&
                     rows_are_aligned<float>(args.residual, args.columns) &&
                     results_are_aligned(args.out, args.out_stride, args.scales != nullptr);
  const auto kernel = whole ? rms_norm_kernel<T, kThreads, true> : rms_norm_kernel<T, kThreads, false>;
  return launch(kernel, blocks, kRows * kThreads, 0, stream, args);
}

template <typename T>
cudaError_t launch_type(const RmsNormArgs& args, cudaStream_t stream) {
  return with_row_threads(args.columns,
                          [&](auto threads) { return launch_rows<T, decltype(threads)::value>(args, stream); });
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_rms_norm(const llmserve::cuda::RmsNormArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->rows == 0) return cudaSuccess;
  if (args->rows < 0 || args->columns <= 0 || args->columns > kMostRowColumns) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args->type) {
    case Type::kBF16: return launch_type<__nv_bfloat16>(*args, on);
    case Type::kF32: return launch_type<float>(*args, on);
    default: return cudaErrorInvalidValue;
  }
}
