// To bfloat16 every thread has eight values of its own and nothing is shared. To int8 a group of threads has a row, as
// in the norms: the values wait in registers until the largest is known, so that the input is read once.
//
// To bfloat16: 32 registers, 8 blocks of 256 a multiprocessor. To int8: up to 64 registers, 4 blocks of 256; rows above
// 8,192 values have 512 threads of about 100 registers each, one block.
#include "cuda/act.h"

#include "cuda/rows.h"

namespace llmserve::cuda {

namespace {

constexpr int64_t kMostColumns = int64_t{1} << 24;

// The fast exponential and quotient: wrong by 2^-20 at most where the result is not tiny, which bfloat16's 2^-8 hides.
__device__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
__device__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
__device__ float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); }
__device__ float relu2(float x) { return x > 0.0f ? x * x : x * 0.0f; }  // NaN stays

// In place.
__device__ void activate(Act kind, float (&x)[kRowWidth]) {
  switch (kind) {  // the same in all threads, and outside the loops
    case Act::kSilu:
      for (float& value : x) value = silu(value);
      break;
    case Act::kGelu:
      for (float& value : x) value = gelu(value);
      break;
    case Act::kGeluTanh:
      for (float& value : x) value = gelu_tanh(value);
      break;
    case Act::kRelu2:
      for (float& value : x) value = relu2(value);
      break;
  }
}

template <typename T, bool kWhole>
__device__ void compute(const ActArgs& args, Act kind, const T* row, int column, float (&out)[kRowWidth]) {
  load_vector<T, kWhole>(row, column, static_cast<int>(args.columns), out);
  activate(kind, out);
  if (args.gated == 0) return;
  float up[kRowWidth];
  load_vector<T, kWhole>(row + args.columns, column, static_cast<int>(args.columns), up);
  for (int i = 0; i < kRowWidth; ++i) out[i] *= up[i];
}

template <typename T, bool kWhole>
__global__ void act_kernel(ActArgs args) {
  const int64_t row = blockIdx.x;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kRowWidth;
  if (column >= args.columns) return;
  float values[kRowWidth];
  compute<T, kWhole>(args, args.kind, static_cast<const T*>(args.x) + row * args.x_stride, column, values);
  store_vector<__nv_bfloat16, kWhole>(static_cast<__nv_bfloat16*>(args.out) + row * args.out_stride, column,
                                      static_cast<int>(args.columns), values);
}

// Of one kind: a switch here would take registers. A thread of a wide row has twice the vectors instead of a block
// twice the threads, whose 64 registers each the error function overflows.
template <typename T, Act kKind, int kThreads, int kVectors, bool kWhole>
__global__ void __launch_bounds__(kThreads < kRowBlock ? kRowBlock : kThreads) act_int8_kernel(ActArgs args) {
  constexpr bool kShared = kThreads < kRowBlock;  // a block has several rows
  const int in_row = static_cast<int>(threadIdx.x) % (kShared ? kThreads : kMostRowThreads);
  const int64_t row = kShared ? int64_t{blockIdx.x} * (kRowBlock / kThreads) + threadIdx.x / kThreads : blockIdx.x;
  const bool exists = !kShared || row < args.rows;  // all threads take part in the maximum
  const T* x = static_cast<const T*>(args.x) + (exists ? row : 0) * args.x_stride;
  const int columns = exists ? static_cast<int>(args.columns) : 0;
  float values[kVectors][kRowWidth];
  uint32_t largest = 0;
  for_each_vector<kVectors>([&](int v) {
    const int column = (v * kThreads + in_row) * kRowWidth;
    if (column >= columns) return;
    compute<T, kWhole>(args, kKind, x, column, values[v]);
    for (const float value : values[v]) largest = max(largest, magnitude(value));  // past the row all are zero
  });
  store_row<kThreads, kWhole>(args, exists ? row : -1, in_row, largest, values);
}

template <typename T>
cudaError_t launch_bf16(const ActArgs& args, bool whole, cudaStream_t stream) {
  const int64_t vectors = (args.columns + kRowWidth - 1) / kRowWidth;
  const auto threads = static_cast<unsigned>(vectors < kRowBlock ? (vectors + kWarp - 1) / kWarp * kWarp : kRowBlock);
  const auto across = static_cast<unsigned>((vectors + threads - 1) / threads);
  return launch(whole ? act_kernel<T, true> : act_kernel<T, false>, dim3(static_cast<unsigned>(args.rows), across),
                threads, 0, stream, args);
}

template <typename T, Act kKind, int kThreads, int kVectors>
cudaError_t launch_int8_rows(const ActArgs& args, bool whole, cudaStream_t stream) {
  constexpr int kRows = kThreads < kRowBlock ? kRowBlock / kThreads : 1;
  const auto blocks = static_cast<unsigned>((args.rows + kRows - 1) / kRows);
  const auto kernel = whole ? act_int8_kernel<T, kKind, kThreads, kVectors, true>
                            : act_int8_kernel<T, kKind, kThreads, kVectors, false>;
  return launch(kernel, blocks, kRows * kThreads, 0, stream, args);
}

template <typename T, Act kKind>
cudaError_t launch_int8(const ActArgs& args, bool whole, cudaStream_t stream) {
  const int64_t vectors = (args.columns + kRowWidth - 1) / kRowWidth;
  if (vectors <= 32) return launch_int8_rows<T, kKind, 32, 1>(args, whole, stream);
  if (vectors <= 1024) return launch_int8_rows<T, kKind, 256, 4>(args, whole, stream);
  return launch_int8_rows<T, kKind, 512, 8>(args, whole, stream);
}

template <typename T>
cudaError_t launch_int8_kind(const ActArgs& args, bool whole, cudaStream_t stream) {
  if (args.columns > kMostRowColumns) return cudaErrorInvalidValue;
  switch (args.kind) {
    case Act::kSilu: return launch_int8<T, Act::kSilu>(args, whole, stream);
    case Act::kGelu: return launch_int8<T, Act::kGelu>(args, whole, stream);
    case Act::kGeluTanh: return launch_int8<T, Act::kGeluTanh>(args, whole, stream);
    case Act::kRelu2: return launch_int8<T, Act::kRelu2>(args, whole, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_type(const ActArgs& args, cudaStream_t stream) {
  const bool whole = args.columns % kRowWidth == 0 && rows_are_aligned<T>(args.x, args.x_stride) &&
                     results_are_aligned(args.out, args.out_stride, args.scales != nullptr);
  return args.scales != nullptr ? launch_int8_kind<T>(args, whole, stream) : launch_bf16<T>(args, whole, stream);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_act(const llmserve::cuda::ActArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->rows == 0) return cudaSuccess;
  if (args->rows < 0 || args->rows > INT32_MAX || args->columns <= 0 || args->columns > kMostColumns)
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args->type) {
    case Type::kBF16: return launch_type<__nv_bfloat16>(*args, on);
    case Type::kF32: return launch_type<float>(*args, on);
    default: return cudaErrorInvalidValue;
  }
}
