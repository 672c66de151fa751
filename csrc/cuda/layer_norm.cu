// As rms_norm.cu, with the mean taken first: the row waits in registers, so the variance is that of the centered values
// and loses nothing to a large mean. 64 registers at most, as there.
#include "cuda/layer_norm.h"

#include "cuda/rows.h"

namespace llmserve::cuda {

namespace {

template <typename T, int kThreads, bool kWhole>
__global__ void __launch_bounds__(kThreads < kRowBlock ? kRowBlock : kThreads) layer_norm_kernel(LayerNormArgs args) {
  constexpr bool kShared = kThreads < kRowBlock;  // a block has several rows
  const int in_row = static_cast<int>(threadIdx.x) % (kShared ? kThreads : kMostRowThreads);
  const int64_t row = kShared ? int64_t{blockIdx.x} * (kRowBlock / kThreads) + threadIdx.x / kThreads : blockIdx.x;
  const bool exists = !kShared || row < args.rows;  // all threads take part in the sums
  const T* x = static_cast<const T*>(args.x) + (exists ? row : 0) * args.x_stride;
  float* residual = args.residual == nullptr ? nullptr : args.residual + row * args.columns;
  const int columns = exists ? static_cast<int>(args.columns) : 0;
  const auto column_of = [&](int v) { return (v * kThreads + in_row) * kRowWidth; };
  float values[kRowVectors][kRowWidth];
  float sum = 0.0f;
  for (int v = 0; v < kRowVectors; ++v) {
    if (column_of(v) >= columns) break;
    load_vector<T, kWhole>(x, column_of(v), columns, values[v]);
    if (residual != nullptr) add_to_residual<kWhole>(residual, column_of(v), columns, values[v]);
    for (int i = 0; i < kRowWidth; ++i) sum += values[v][i];
  }
  const float mean = sum_of_row<kThreads, 0>(sum) / static_cast<float>(args.columns);
  float squares = 0.0f;
  for (int v = 0; v < kRowVectors; ++v) {
    if (column_of(v) >= columns) break;
    for (int i = 0; i < kRowWidth; ++i) {
      values[v][i] = column_of(v) + i < columns ? values[v][i] - mean : 0.0f;
      squares += values[v][i] * values[v][i];
    }
  }
  const float factor = rsqrtf(sum_of_row<kThreads, 1>(squares) / static_cast<float>(args.columns) + args.eps);
  uint32_t largest = 0;
  for (int v = 0; v < kRowVectors; ++v) {
    if (column_of(v) >= columns) break;
    for (int i = 0; i < kRowWidth; ++i) {
      const int column = column_of(v) + i;
      if (column >= columns) break;
      const float bias = args.bias == nullptr ? 0.0f : args.bias[column];
      values[v][i] = values[v][i] * factor * args.weight[column] + bias;
      largest = max(largest, magnitude(values[v][i]));
    }
  }
  store_row<kThreads, kWhole>(args, exists ? row : -1, in_row, largest, values);
}

template <typename T>
cudaError_t launch_type(const LayerNormArgs& args, cudaStream_t stream) {
  const bool whole = args.columns % kRowWidth == 0 && rows_are_aligned<T>(args.x, args.x_stride) &&
                     rows_are_aligned<float>(args.residual, args.columns) &&
                     results_are_aligned(args.out, args.out_stride, args.scales != nullptr);
  return with_row_threads(args.columns, [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    constexpr int kRows = kThreads < kRowBlock ? kRowBlock / kThreads : 1;
    const auto blocks = static_cast<unsigned>((args.rows + kRows - 1) / kRows);
    const auto kernel = whole ? layer_norm_kernel<T, kThreads, true> : layer_norm_kernel<T, kThreads, false>;
    return launch(kernel, blocks, kRows * kThreads, 0, stream, args);
  });
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_layer_norm(const llmserve::cuda::LayerNormArgs* args, void* stream) {
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
