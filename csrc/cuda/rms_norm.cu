// Each row is read once into registers, eight values of a thread at a time, summed in float32 and written scaled. A
// group of threads has a row: as many as its vectors, so that heads of 64 values do not occupy whole blocks.
#include "cuda/rms_norm.h"

#include "cuda/device.h"

namespace llmserve::cuda {

namespace {

constexpr int kBlock = 256;         // threads of a block, where a row takes fewer
constexpr int kWidth = 8;           // values of a vector
constexpr int kVectors = 4;         // of a thread
constexpr int kMostThreads = 1024;  // of a row
constexpr int64_t kMostColumns = int64_t{kMostThreads} * kWidth * kVectors;

// Eight values from `column` on; past the row they are zero.
template <typename T, bool kWhole>
__device__ void load(const T* row, int64_t column, int64_t columns, float (&out)[kWidth]) {
  if constexpr (kWhole) {
    const auto vector = *reinterpret_cast<const Vector<T, kWidth>*>(row + column);
    for (int i = 0; i < kWidth; ++i) out[i] = to_float(vector.values[i]);
  } else {
    for (int i = 0; i < kWidth; ++i) out[i] = column + i < columns ? to_float(row[column + i]) : 0.0f;
  }
}

template <typename T, bool kWhole>
__device__ void store(T* row, int64_t column, int64_t columns, const float (&x)[kWidth]) {
  if constexpr (kWhole) {
    Vector<T, kWidth> vector;
    for (int i = 0; i < kWidth; ++i) from_float(x[i], vector.values[i]);
    *reinterpret_cast<Vector<T, kWidth>*>(row + column) = vector;
  } else {
    for (int i = 0; i < kWidth; ++i)
      if (column + i < columns) from_float(x[i], row[column + i]);
  }
}

// The sum over the kThreads threads of a row, in one order whatever the block holds besides.
template <int kThreads>
__device__ float sum_of_row(float x) {
  constexpr int kLanes = kThreads < kWarp ? kThreads : kWarp;
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step, kLanes);
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ float sums[kMostThreads / kWarp];
    const int warp = static_cast<int>(threadIdx.x) / kWarp, first = warp / kWarps * kWarps;
    if (threadIdx.x % kWarp == 0) sums[warp] = x;
    __syncthreads();
    x = 0.0f;
    for (int i = 0; i < kWarps; ++i) x += sums[first + i];
  }
  return x;
}

template <typename T, int kThreads, bool kWhole>
__global__ void rms_norm(RmsNormArgs args) {
  const int in_row = static_cast<int>(threadIdx.x) % kThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) + threadIdx.x / kThreads;
  const bool exists = row < args.rows;  // all threads take part in the sums
  const T* x = static_cast<const T*>(args.x) + (exists ? row : 0) * args.x_stride;
  T* residual = args.residual == nullptr ? nullptr : static_cast<T*>(args.residual) + row * args.columns;
  T* out = static_cast<T*>(args.out) + row * args.out_stride;
  float values[kVectors][kWidth];
  float squares = 0.0f;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = (static_cast<int64_t>(v) * kThreads + in_row) * kWidth;
    if (!exists || column >= args.columns) break;
    load<T, kWhole>(x, column, args.columns, values[v]);
    if (residual != nullptr) {
      float before[kWidth];
      load<T, kWhole>(residual, column, args.columns, before);
      for (int i = 0; i < kWidth; ++i) {
        T rounded;  // what is normalized is what the residual stream holds
        from_float(values[v][i] + before[i], rounded);
        values[v][i] = to_float(rounded);
      }
      store<T, kWhole>(residual, column, args.columns, values[v]);
    }
    for (int i = 0; i < kWidth; ++i) squares += values[v][i] * values[v][i];
  }
  const float factor = rsqrtf(sum_of_row<kThreads>(squares) / static_cast<float>(args.columns) + args.eps);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = (static_cast<int64_t>(v) * kThreads + in_row) * kWidth;
    if (!exists || column >= args.columns) break;
    float scaled[kWidth];
    for (int i = 0; i < kWidth; ++i)
      scaled[i] = column + i < args.columns ? values[v][i] * factor * args.weight[column + i] : 0.0f;
    store<T, kWhole>(out, column, args.columns, scaled);
  }
}

template <typename T, int kThreads>
cudaError_t launch_rows(const RmsNormArgs& args, cudaStream_t stream) {
  constexpr int kRows = kThreads < kBlock ? kBlock / kThreads : 1;
  const auto blocks = static_cast<unsigned>((args.rows + kRows - 1) / kRows);
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Vector<T, kWidth>) == 0; };
  const bool whole = args.columns % kWidth == 0 && args.x_stride % kWidth == 0 && args.out_stride % kWidth == 0 &&
                     is_aligned(args.x) && is_aligned(args.residual) && is_aligned(args.out);
  const auto kernel = whole ? rms_norm<T, kThreads, true> : rms_norm<T, kThreads, false>;
  return launch(kernel, blocks, kRows * kThreads, 0, stream, args);
}

template <typename T>
cudaError_t launch_type(const RmsNormArgs& args, cudaStream_t stream) {
  const int64_t vectors = (args.columns + kWidth - 1) / kWidth;
  if (vectors <= 8) return launch_rows<T, 8>(args, stream);
  if (vectors <= 32) return launch_rows<T, 32>(args, stream);
  if (vectors <= 512) return launch_rows<T, 256>(args, stream);
  return launch_rows<T, kMostThreads>(args, stream);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_rms_norm(const llmserve::cuda::RmsNormArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->rows == 0) return cudaSuccess;
  if (args->rows < 0 || args->columns <= 0 || args->columns > kMostColumns) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args->type) {
    case Type::kBF16: return launch_type<__nv_bfloat16>(*args, on);
    case Type::kF16: return launch_type<__half>(*args, on);
    case Type::kF32: return launch_type<float>(*args, on);
    default: return cudaErrorInvalidValue;
  }
}
