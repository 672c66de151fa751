// A thread has eight values of a row; the sum is float32, and rounded once where the result is not.
#include "cuda/embed.h"

#include "cuda/rows.h"

namespace llmserve::cuda {

namespace {

template <bool kWhole>
__device__ void add(const void* row, int column, int columns, float (&sum)[kRowWidth]) {
  float values[kRowWidth];
  load_vector<__nv_bfloat16, kWhole>(static_cast<const __nv_bfloat16*>(row), column, columns, values);
  for (int i = 0; i < kRowWidth; ++i) sum[i] += values[i];
}

template <typename T, bool kWhole>
__global__ void embed_kernel(EmbedArgs args) {
  const int64_t row = blockIdx.x;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kRowWidth;
  const int columns = static_cast<int>(args.columns);
  if (column >= columns) return;
  const auto row_of = [&](const void* table, int32_t index) {
    return static_cast<const __nv_bfloat16*>(table) + index * args.columns;
  };
  float sum[kRowWidth];
  load_vector<__nv_bfloat16, kWhole>(row_of(args.table, args.ids[row]), column, columns, sum);
  for (float& value : sum) value *= args.scale;
  if (args.position_table != nullptr)
    add<kWhole>(row_of(args.position_table, args.positions[row]), column, columns, sum);
  if (args.type_row != nullptr) add<kWhole>(args.type_row, column, columns, sum);
  store_vector<T, kWhole>(static_cast<T*>(args.out) + row * args.out_stride, column, columns, sum);
}

template <typename T>
cudaError_t launch_type(const EmbedArgs& args, cudaStream_t stream) {
  using Table = __nv_bfloat16;
  const bool whole = args.columns % kRowWidth == 0 && rows_are_aligned<Table>(args.table, args.columns) &&
                     rows_are_aligned<Table>(args.position_table, args.columns) &&
                     rows_are_aligned<Table>(args.type_row, args.columns) &&
                     rows_are_aligned<T>(args.out, args.out_stride);
  const int64_t vectors = (args.columns + kRowWidth - 1) / kRowWidth;
  const auto threads = static_cast<unsigned>(vectors < kRowBlock ? (vectors + kWarp - 1) / kWarp * kWarp : kRowBlock);
  const dim3 grid(static_cast<unsigned>(args.rows), static_cast<unsigned>((vectors + threads - 1) / threads));
  return launch(whole ? embed_kernel<T, true> : embed_kernel<T, false>, grid, threads, 0, stream, args);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_embed(const llmserve::cuda::EmbedArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->rows == 0) return cudaSuccess;
  if (args->rows < 0 || args->rows > INT32_MAX || args->columns <= 0 || args->columns > (int64_t{1} << 24))
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args->type) {
    case Type::kBF16: return launch_type<__nv_bfloat16>(*args, on);
    case Type::kF32: return launch_type<float>(*args, on);
    default: return cudaErrorInvalidValue;
  }
}
