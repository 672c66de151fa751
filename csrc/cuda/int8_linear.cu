// Sums of integers are exact, so they are the same however they are cut: outputs do not depend on the batch. A block
// has 128 outputs and 16, 64 or 128 rows; rows and codes come through shared memory several tiles ahead; slices of the
// inputs are shared between blocks where there are few tiles of outputs.
//
// With 16 rows five stages of 9 KB wait in flight, and four blocks fit a multiprocessor.
#include "cuda/int8_linear.h"

#include "cuda/linear_tile.h"
#include "cuda/packed_weights.h"

namespace llmserve::cuda {

namespace {

constexpr int64_t kMostInputs = (int64_t{1} << 31) / (128 * 128) - 1;  // whose sums an int32 holds

// One block: kChannels outputs, the octets of rows dealt to kRowWarps warps in turn, kOctets each.
//
//   stage: | rows x 64 inputs, 64 bytes a row | codes of 8 strips, 1 KB each |
//
// The halves of a row are exchanged in rows 2 and 3 of each four: 16 lanes read four rows at once, 32 bytes of each,
// which then lie in different banks.
template <int kOctets, int kRowWarps>
struct Tile {
  static constexpr int kRows = kOctets * kRowWarps * kRowOctet, kThreads = kChannelWarps * kRowWarps * kWarp;
  static constexpr int kStrips = kChannels / kStrip, kStages = kRows <= 64 ? 5 : 4;
  static constexpr int kCodes = kRows * kTileK, kStageBytes = kCodes + kStrips * kTileBytes<8>;
  using Sums = TileSums<int32_t, kRows>;
  static constexpr size_t kSharedBytes = kStages * kStageBytes + Sums::kBytes;

  const LinearArgs& args;
  int tiles, strips, rows;         // of a strip; from this block on; of this block
  const unsigned char *x, *codes;  // of this block
  unsigned char* stages;
  int32_t sum[kStripPair][kOctets][4] = {};

  static __device__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ int lane() { return thread() % kWarp; }
  static __device__ int octet(int i) { return i * kRowWarps + thread() / kWarp / kChannelWarps; }
  static __device__ int strip(int i) { return thread() / kWarp % kChannelWarps * kStripPair + i; }
  __device__ unsigned char* stage(int tile) const { return stages + tile % kStages * kStageBytes; }

  __device__ void copy(int tile) const {
    unsigned char* to = stage(tile);
    deal<kRows * kTileK / kChunk, kThreads>([&](int i) {
      const int row = i / 4, chunk = i % 4, k = tile * kTileK + chunk * kChunk;
      const bool exists = row < rows && k < args.inputs;
      cp_async(to + row * kTileK + (chunk ^ (row & 2)) * kChunk, exists ? x + row * args.x_stride + k : x, exists);
    });
    constexpr int kChunks = kTileBytes<8> / kChunk;
    deal<kStrips * kChunks, kThreads>([&](int i) {
      cp_async(to + kCodes + i * kChunk,
               codes + (min(i / kChunks, strips - 1) * tiles + tile) * kTileBytes<8> + i % kChunks * kChunk);
    });
  }

  // Rows that do not exist are left out by eights, unless there are none (kIsFull): branches would keep the
  // compiler from loading some while others are multiplied.
  template <bool kIsFull>
  __device__ void multiply(int tile) {
    const unsigned char* from = stage(tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kStripPair][4];
#pragma unroll
      for (int s = 0; s < kStripPair; ++s) {
        const auto* codes = reinterpret_cast<const uint4*>(from + kCodes + strip(s) * kTileBytes<8>);
        const uint4 vector = codes[half * kWarp + lane()];
        for (int i = 0; i < 4; ++i) a[s][i] = word_of(vector, i);
      }
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        if (!kIsFull && octet(i) * kRowOctet >= rows) continue;
        const int row = octet(i) * kRowOctet + lane() / 4, chunk = (half * 2 + lane() % 4 / 2) ^ (row & 2);
        const uint2 both = *reinterpret_cast<const uint2*>(from + row * kTileK + chunk * kChunk + lane() % 2 * 8);
        const uint32_t b[2] = {both.x, both.y};
        for (int s = 0; s < kStripPair; ++s) mma_s8(sum[s][i], a[s], b);
      }
    }
  }

  __device__ void flush(Sums& sums, int slice) {
#pragma unroll
    for (int s = 0; s < kStripPair; ++s) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        sums.add_product(octet(i) * kRowOctet, strip(s) * kStrip, sum[s][i]);
        for (int32_t& one : sum[s][i]) one = 0;
      }
    }
    sums.end_slice(args, slice);
  }

  // Slices [first, last). A block that has all sums them in registers.
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
      const int end = sums.is_shared ? begin(slice + 1) : end_tile;
      for (; tile < end; ++tile) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        if (tile + kStages - 1 < end_tile) copy(tile + kStages - 1);
        cp_async_commit();
        if (rows > kRows - kRowOctet)
          multiply<true>(tile);
        else
          multiply<false>(tile);
      }
      flush(sums, slice);
      slice = sums.is_shared ? slice + 1 : last;
    }
    cp_async_wait<0>();
  }
};

// The scale of an output, of [strip][8][2].
__device__ float scale_of(const float* scales, int64_t channel) {
  return scales[channel / kStrip * kStrip + channel % 8 * 2 + channel % kStrip / 8];
}

template <int kOctets, int kRowWarps>
__global__ void __launch_bounds__(kChannelWarps * kRowWarps * kWarp) int8_linear_kernel(Int8LinearArgs args) {
  using Block = Tile<kOctets, kRowWarps>;
  const LinearArgs& linear = args.linear;
  auto* shared = dynamic_shared<unsigned char>();
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * Block::kRows;
  const int blocks = static_cast<int>(gridDim.z), block = static_cast<int>(blockIdx.z);
  typename Block::Sums sums{reinterpret_cast<int32_t*>(shared + Block::kStages * Block::kStageBytes), first_row,
                            static_cast<int64_t>(blockIdx.x) * kChannels, blocks > 1};
  sums.clear();
  __syncthreads();
  const int tiles = static_cast<int>((linear.inputs + kTileK - 1) / kTileK);
  const int64_t first_strip = static_cast<int64_t>(blockIdx.x) * Block::kStrips;
  const int64_t all_strips = (linear.outputs + kWarpChannels - 1) / kWarpChannels * kStripPair;
  Block tile{linear,
             tiles,
             static_cast<int>(all_strips - first_strip),
             static_cast<int>(min(linear.rows - first_row, int64_t{Block::kRows})),
             static_cast<const unsigned char*>(linear.x) + first_row * linear.x_stride,
             static_cast<const unsigned char*>(args.codes) + first_strip * tiles * kTileBytes<8>,
             shared};
  tile.run(sums, static_cast<int>(slice_begin(linear.slices, blocks, block)),
           static_cast<int>(slice_begin(linear.slices, blocks, block + 1)));
  sums.finish(linear, linear.counters + (blockIdx.y * gridDim.x + blockIdx.x), blocks,
              [&](int64_t row, int64_t channel, int32_t sum) {
                const float scaled = __fmul_rn(static_cast<float>(sum), scale_of(args.scales, channel));
                write_output(linear, row, channel, __fmul_rn(scaled, args.x_scales[row]));
              });
}

template <int kOctets, int kRowWarps>
cudaError_t launch_tiles(const Int8LinearArgs& args, int64_t wanted, cudaStream_t stream) {
  using Block = Tile<kOctets, kRowWarps>;
  const int64_t across = (args.linear.outputs + kChannels - 1) / kChannels;
  const int64_t down = (args.linear.rows + Block::kRows - 1) / Block::kRows;
  int blocks = blocks_per_tile(across * down, args.linear.slices, wanted);
  if (!fits_workspace(args.linear, across * down, blocks)) blocks = 1;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down), static_cast<unsigned>(blocks));
  return launch(int8_linear_kernel<kOctets, kRowWarps>, grid, Block::kThreads, Block::kSharedBytes, stream, args);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_int8_linear(const llmserve::cuda::Int8LinearArgs* args, void* stream) {
  using namespace llmserve::cuda;
  const LinearArgs& linear = args->linear;
  if (linear.rows == 0) return cudaSuccess;
  const bool is_valid = linear.rows > 0 && linear.outputs > 0 && linear.inputs > 0 && linear.inputs <= kMostInputs &&
                        linear.inputs % kChunk == 0 && linear.x_stride % kChunk == 0 &&
                        reinterpret_cast<uintptr_t>(linear.x) % kChunk == 0 && linear.slices > 0 &&
                        (linear.out_type == Type::kBF16 || linear.out_type == Type::kF32);
  if (!is_valid) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  if (linear.rows <= 16 || !fits_shared(Tile<4, 2>::kSharedBytes))
    return launch_tiles<2, 1>(*args, 4 * kMultiprocessors, on);
  if (linear.rows <= 64 || !fits_shared(Tile<8, 2>::kSharedBytes))
    return launch_tiles<4, 2>(*args, kMultiprocessors, on);
  return launch_tiles<8, 2>(*args, kMultiprocessors, on);
}
