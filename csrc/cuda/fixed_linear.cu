// The weight is the left operand at every size of batch and rows are the right one, 16 inputs after 16 from the first
// of a slice to its last, so an output is one chain of the same instructions whatever tile it falls into. A block has
// 128 outputs and 16, 64 or 128 rows; both operands come through shared memory several tiles ahead.
//
// Registers and shared memory (sm_90) let two blocks of 16 or 64 rows live on a multiprocessor, and one of 128 rows.
#include "cuda/fixed_linear.h"

#include "cuda/linear_tile.h"
#include "cuda/ptx.h"

namespace llmserve::cuda {

namespace {

constexpr int kTileK = 64;                  // inputs of a stage
constexpr int kStep = 16;                   // of one product
constexpr int kChunk = 16;                  // bytes of a copy, eight values
constexpr int kLine = kTileK / 8;           // chunks of a row of a stage: 128 bytes, all banks
constexpr int kStripPair = 2, kStrip = 16;  // outputs of a product, and how many of them a warp has

// One block: kChannels outputs, kPairs times 16 rows for each of kRowWarps warps.
//
//   stage: | 128 rows of the weight, 128 bytes each | rows of the batch, 128 bytes each |
//
// Chunk c of row r lies at place c ^ r % 8, so that eight rows' chunks of one column, which ldmatrix reads at once, lie
// in different banks.
template <int kPairs, int kRowWarps>
struct Tile {
  static constexpr int kWarpRows = kPairs * kStep, kRows = kWarpRows * kRowWarps;
  static constexpr int kThreads = kChannelWarps * kRowWarps * kWarp;
  static constexpr int kStages = kRows <= 16 ? 4 : 3, kStageChunks = (kChannels + kRows) * kLine;
  using Sums = TileSums<float, kRows>;
  static constexpr size_t kSharedBytes = size_t{kStages} * kStageChunks * kChunk + Sums::kBytes;

  const LinearArgs& args;
  const __nv_bfloat16 *x, *weight;  // of this block
  int64_t weight_stride;
  int tiles, rows, channels;  // of the inputs; of this block that exist
  uint4* stages;
  float sum[kStripPair][2 * kPairs][4] = {};

  static __device__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ int lane() { return thread() % kWarp; }
  static __device__ int channel() { return thread() / kWarp % kChannelWarps * kWarpChannels; }
  static __device__ int row() { return thread() / kWarp / kChannelWarps * kWarpRows; }
  static __device__ int place(int row, int chunk) { return row * kLine + (chunk ^ row % 8); }
  __device__ uint4* stage(int tile) const { return stages + tile % kStages * kStageChunks; }

  // Rows past `existing` and inputs past the last are zero.
  template <int kCount>
  __device__ void copy_rows(uint4* to, const __nv_bfloat16* from, int64_t stride, int existing, int tile) const {
    deal<kCount * kLine, kThreads>([&](int i) {
      const int row = i / kLine, chunk = i % kLine, k = tile * kTileK + chunk * 8;
      const bool exists = row < existing && k < args.inputs;
      cp_async(to + place(row, chunk), exists ? from + row * stride + k : from, exists);
    });
  }

  __device__ void copy(int tile) const {
    uint4* to = stage(tile);
    copy_rows<kChannels>(to, weight, weight_stride, channels, tile);
    copy_rows<kRows>(to + kChannels * kLine, x, args.x_stride, rows, tile);
  }

  // Rows that do not exist are left out by sixteens, unless there are none (kIsFull): branches would keep the
  // compiler from loading some while others are multiplied.
  template <bool kIsFull>
  __device__ void multiply(int tile) {
    const uint4* weights = stage(tile);
    const uint4* batch = weights + kChannels * kLine;
#pragma unroll
    for (int step = 0; step < kTileK / kStep; ++step) {
      uint32_t a[kStripPair][4];
#pragma unroll
      for (int s = 0; s < kStripPair; ++s)  // matrices: channels, channels + 8, then both at inputs + 8
        ldmatrix(a[s], weights + place(channel() + s * kStrip + lane() % 16, step * 2 + lane() / 16));
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (!kIsFull && row() + i * kStep >= rows) continue;
        uint32_t both[4];  // rows, and those at inputs + 8; then the next eight rows
        ldmatrix(both, batch + place(row() + i * kStep + lane() % 8 + lane() / 16 * 8, step * 2 + lane() / 8 % 2));
        const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
        for (int s = 0; s < kStripPair; ++s) {
          mma_bf16(sum[s][2 * i], a[s], first);
          mma_bf16(sum[s][2 * i + 1], a[s], second);
        }
      }
    }
  }

  __device__ void flush(Sums& sums, int slice) {
#pragma unroll
    for (int s = 0; s < kStripPair; ++s) {
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        sums.add_product(row() + i * 8, channel() + s * kStrip, sum[s][i]);
        for (float& one : sum[s][i]) one = 0.0f;
      }
    }
    sums.end_slice(args, slice);
  }

  // Slices [first, last), which lie one after the other.
  __device__ void run(Sums& sums, int first, int last) {
    const auto begin = [&](int slice) { return static_cast<int>(slice_begin(tiles, args.slices, slice)); };
    const int begin_tile = begin(first), end_tile = begin(last);
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      if (begin_tile + i < end_tile) copy(begin_tile + i);
      cp_async_commit();
    }
    int slice = first, tile = begin_tile;
    while (slice < last) {
      const int end = begin(slice + 1);
      for (; tile < end; ++tile) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        if (tile + kStages - 1 < end_tile) copy(tile + kStages - 1);
        cp_async_commit();
        if (rows > kRows - kStep)
          multiply<true>(tile);
        else
          multiply<false>(tile);
      }
      flush(sums, slice++);
    }
    cp_async_wait<0>();
  }
};

template <int kPairs, int kRowWarps>
__global__ void __launch_bounds__(kChannelWarps * kRowWarps * kWarp) fixed_linear_kernel(FixedLinearArgs args) {
  using Block = Tile<kPairs, kRowWarps>;
  const LinearArgs& linear = args.linear;
  auto* shared = dynamic_shared<uint4>();
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * Block::kRows;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x) * kChannels;
  const int blocks = static_cast<int>(gridDim.z), block = static_cast<int>(blockIdx.z);
  typename Block::Sums sums{reinterpret_cast<float*>(shared + Block::kStages * Block::kStageChunks), first_row,
                            first_channel, blocks > 1};
  sums.clear();
  __syncthreads();
  Block tile{linear,
             static_cast<const __nv_bfloat16*>(linear.x) + first_row * linear.x_stride,
             static_cast<const __nv_bfloat16*>(args.weight) + first_channel * args.weight_stride,
             args.weight_stride,
             static_cast<int>((linear.inputs + kTileK - 1) / kTileK),
             static_cast<int>(min(linear.rows - first_row, int64_t{Block::kRows})),
             static_cast<int>(min(linear.outputs - first_channel, int64_t{kChannels})),
             shared};
  tile.run(sums, static_cast<int>(slice_begin(linear.slices, blocks, block)),
           static_cast<int>(slice_begin(linear.slices, blocks, block + 1)));
  sums.finish(linear, linear.counters + (blockIdx.y * gridDim.x + blockIdx.x), blocks,
              [&](int64_t row, int64_t channel, float sum) { write_output(linear, row, channel, sum); });
}

template <int kPairs, int kRowWarps>
cudaError_t launch_tiles(const FixedLinearArgs& args, int64_t wanted, cudaStream_t stream) {
  using Block = Tile<kPairs, kRowWarps>;
  const int64_t across = (args.linear.outputs + kChannels - 1) / kChannels;
  const int64_t down = (args.linear.rows + Block::kRows - 1) / Block::kRows;
  int blocks = blocks_per_tile(across * down, args.linear.slices, wanted);
  if (!fits_workspace(args.linear, across * down, blocks)) blocks = 1;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down), static_cast<unsigned>(blocks));
  return launch(fixed_linear_kernel<kPairs, kRowWarps>, grid, Block::kThreads, Block::kSharedBytes, stream, args);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_fixed_linear(const llmserve::cuda::FixedLinearArgs* args, void* stream) {
  using namespace llmserve::cuda;
  const LinearArgs& linear = args->linear;
  if (linear.rows == 0) return cudaSuccess;
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kChunk == 0; };
  const bool is_valid = linear.rows > 0 && linear.outputs > 0 && linear.inputs > 0 && linear.inputs % 8 == 0 &&
                        linear.x_stride % 8 == 0 && args->weight_stride % 8 == 0 && is_aligned(linear.x) &&
                        is_aligned(args->weight) && linear.slices > 0 &&
                        (linear.out_type == Type::kBF16 || linear.out_type == Type::kF32);
  if (!is_valid) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  if (linear.rows <= 16 || !fits_shared(Tile<2, 2>::kSharedBytes))
    return launch_tiles<1, 1>(*args, 2 * kMultiprocessors, on);
  if (linear.rows <= 64 || !fits_shared(Tile<4, 2>::kSharedBytes))
    return launch_tiles<2, 2>(*args, kMultiprocessors, on);
  return launch_tiles<4, 2>(*args, kMultiprocessors, on);
}
