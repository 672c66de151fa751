// Two kernels with the same sums (linear.h). Few rows: each warp streams one slice of a strip from memory into
// registers, a block has eight slices. More rows: a block has 128 outputs and 16 or 64 rows; rows, codes and scales
// come through shared memory, several tiles ahead.
//
// Registers (sm_90): up to 128 with few rows, so two blocks of eight warps fit a multiprocessor; 124 to 128 with 16
// rows, so four blocks of four; 240 to 250 with 64 rows, so two blocks of four, and 190 with biases, one block of
// eight.
//
// What waits in flight on a multiprocessor (sm_90): few rows, two blocks of eight warps with kDepth tiles of 512 bytes
// each, 64 KB with 4 bits; 16 rows, four blocks with five stages of 4 KB of codes, 80 KB.
#include "cuda/quantized_linear.h"

#include "cuda/linear_tile.h"
#include "cuda/packed_weights.h"

namespace llmserve::cuda {

namespace {

constexpr int kStreamWarps = 8;     // slices of a block, and so what the number of slices is a multiple of
constexpr int64_t kStreamRows = 4;  // more rows of the batch are read too often from the second cache

// The end of a group: its sum is scaled in float32, and the bias counts as often as the sum of the inputs says.
template <bool kBiases>
__device__ void scale_group(float2 scale, float2 bias, const float (&sum)[4], const float (&inputs)[4],
                            float (&total)[4]) {
  for (int i = 0; i < 4; ++i) {
    total[i] = __fmaf_rn(i < 2 ? scale.x : scale.y, sum[i], total[i]);
    if constexpr (kBiases) total[i] = __fmaf_rn(i < 2 ? bias.x : bias.y, inputs[i], total[i]);
  }
}

__device__ void set_zero(float (&x)[4]) {
  for (int i = 0; i < 4; ++i) x[i] = 0.0f;
}

// The right operands of the two steps of half a tile, as eight consecutive inputs of a row hold them.
__device__ void operands_of(const uint4& x, uint32_t (&b)[2][2]) {
  b[0][0] = x.x;
  b[0][1] = x.y;
  b[1][0] = x.z;
  b[1][1] = x.w;
}

// Groups of 16 are the inputs of two of the four quads of a half: the product of one of them has zeros in the others.
__device__ uint4 only_group(const uint4& x, int group) {
  return static_cast<int>(threadIdx.x) % 4 / 2 == group ? x : uint4{0, 0, 0, 0};
}

// --- few rows --------------------------------------------------------------------------------------------------------

// One slice of a strip, by one warp: codes and scales are loaded kDepth tiles ahead, the rows, which lie in a cache,
// one or two. Lanes without a row read the first: what they multiply is not written.
template <int kBits, int kPerTile, bool kBiases, bool kIsFloat32>
struct Stream {
  static constexpr int kAheadOfX = kBits == 4 && kPerTile > 1 && kBiases ? 1 : 2;  // what registers allow
  static constexpr int kDepth = kBits == 4 ? (kPerTile > 1 ? 4 : kBiases ? 6 : 8) : (kPerTile == 4 || kBiases ? 2 : 4);
  static constexpr int kVectors = kBits / 4, kGroupsOfHalf = kPerTile == 4 ? 2 : 1;

  struct Weights {
    uint4 codes[kVectors];
    uint2 scales[kPerTile], biases[kBiases ? kPerTile : 1];
  };
  struct Rows {
    uint4 halves[2];
  };

  const Groups& groups;
  const unsigned char* codes;   // of this lane, in the strip's first tile
  const void *scales, *biases;  // of this lane, in the strip's first group
  const __nv_bfloat16* x;       // of this lane, in the first tile
  int tiles, in_last;           // inputs from this lane's first on in the last tile
  float sum[4] = {}, inputs[4] = {}, total[4] = {};

  __device__ void load(int tile, Weights& out) const {
    for (int i = 0; i < kVectors; ++i)
      out.codes[i] = load_streaming(codes + int64_t{tile} * kTileBytes<kBits> + i * kWarp * kChunk);
    for (int i = 0; i < kPerTile; ++i) {
      const int group = kPerTile > 1 ? tile * kPerTile + i : tile >> groups.shift;
      out.scales[i] = load_pair(scales, group, 0, kIsFloat32);
      if constexpr (kBiases) out.biases[i] = load_pair(biases, group, 0, kIsFloat32);
    }
  }

  // kMayBeLast: inputs past the last are zero.
  template <bool kMayBeLast>
  __device__ void load(int tile, Rows& out) const {
    for (int half = 0; half < 2; ++half) {
      const uint4* from = reinterpret_cast<const uint4*>(x + int64_t{tile} * kTileK + half * kHalfK);
      if (kMayBeLast && tile + 1 == tiles)
        out.halves[half] = half * kHalfK < in_last ? *from : uint4{0, 0, 0, 0};
      else
        out.halves[half] = *from;
    }
  }

  __device__ void scale(const Weights& weights, int i) {
    const float2 bias = kBiases ? pair_of(weights.biases[kBiases ? i : 0], kIsFloat32) : float2{0, 0};
    scale_group<kBiases>(pair_of(weights.scales[i], kIsFloat32), bias, sum, inputs, total);
    set_zero(sum);
    set_zero(inputs);
  }

  __device__ void multiply(const Weights& weights, const Rows& rows, bool ends) {
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4], b[2][2];
      unpack_half<kBits>(weights.codes[kBits == 4 ? 0 : half], half, kBiases ? k128 : k136, a);
      for (int group = 0; group < kGroupsOfHalf; ++group) {
        operands_of(kPerTile == 4 ? only_group(rows.halves[half], group) : rows.halves[half], b);
        for (int step = 0; step < 2; ++step) {
          mma_bf16(sum, a[step], b[step]);
          if constexpr (kBiases) mma_bf16(inputs, {kOnes, kOnes, kOnes, kOnes}, b[step]);
        }
        if constexpr (kPerTile > 1) scale(weights, half * kGroupsOfHalf + group);
      }
    }
    if (kPerTile == 1 && ends) scale(weights, 0);
  }

  // kDepth tiles from `first` on. kIsInside: so many are left that nothing need be asked.
  template <bool kIsInside>
  __device__ void run_depth(int first, int end, Weights (&weights)[kDepth], Rows (&rows)[kAheadOfX]) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int tile = first + i;
      if (!kIsInside && tile >= end) break;
      multiply(weights[i], rows[i % kAheadOfX], groups.ends(tile, end));
      if (kIsInside || tile + kDepth < end) load(tile + kDepth, weights[i]);
      if (kIsInside || tile + kAheadOfX < end) load<!kIsInside>(tile + kAheadOfX, rows[i % kAheadOfX]);
    }
  }

  __device__ void run(int begin, int end) {
    Weights weights[kDepth];
    Rows rows[kAheadOfX];
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
      if (begin + i < end) load(begin + i, weights[i]);
#pragma unroll
    for (int i = 0; i < kAheadOfX; ++i)
      if (begin + i < end) load<true>(begin + i, rows[i]);
    int first = begin;
#pragma unroll 1
    for (; first + 2 * kDepth < end; first += kDepth) run_depth<true>(first, end, weights, rows);
#pragma unroll 1
    for (; first < end; first += kDepth) run_depth<false>(first, end, weights, rows);
  }
};

// Writes one strip's outputs from the sums of the block's slices, or leaves those to the last block of the strip.
__device__ void finish_strip(const LinearArgs& args, const float (&sums)[kStreamWarps][kRowOctet][kStrip]) {
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x) * kStrip;
  const int channel = static_cast<int>(threadIdx.x) % kStrip, row = static_cast<int>(threadIdx.x) / kStrip % kRowOctet;
  const bool exists = first_channel + channel < args.outputs && row < args.rows;
  const bool is_first = threadIdx.x < kStrip * kRowOctet;
  float sum = 0.0f;
  if (gridDim.y == 1) {
    for (int slice = 0; slice < kStreamWarps; ++slice) sum += sums[slice][row][channel];
  } else {
    const int first_slice = static_cast<int>(blockIdx.y) * kStreamWarps, threads = static_cast<int>(blockDim.x);
    for (int slice = static_cast<int>(threadIdx.x) / (kStrip * kRowOctet); slice < kStreamWarps;
         slice += threads / (kStrip * kRowOctet))
      if (exists)
        *workspace_at<float>(args, first_slice + slice, row, first_channel + channel) = sums[slice][row][channel];
    if (!is_last_block(args.counters + blockIdx.x, static_cast<int>(gridDim.y))) return;
    if (exists && is_first) sum = sum_of_slices<float>(args, row, first_channel + channel);
  }
  if (exists && is_first) write_output(args, row, first_channel + channel, sum);
}

template <int kBits, int kPerTile, bool kBiases, bool kIsFloat32>
__global__ void __launch_bounds__(kStreamWarps* kWarp, 2)
    quantized_stream_kernel(QuantizedLinearArgs args, Groups groups) {
  __shared__ float sums[kStreamWarps][kRowOctet][kStrip];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int tiles = static_cast<int>((args.linear.inputs + kTileK - 1) / kTileK), row = lane / 4, input = lane % 4 * 8;
  const int slice = static_cast<int>(blockIdx.y) * kStreamWarps + warp;
  const int64_t strip = blockIdx.x, scales = (strip * groups.per_strip * kRowOctet + row) * (kIsFloat32 ? 8 : 4);
  const auto* x = static_cast<const __nv_bfloat16*>(args.linear.x);
  Stream<kBits, kPerTile, kBiases, kIsFloat32> stream{
      groups,
      static_cast<const unsigned char*>(args.codes) + strip * tiles * kTileBytes<kBits> + lane * kChunk,
      static_cast<const unsigned char*>(args.scales) + scales,
      static_cast<const unsigned char*>(args.biases) + scales,
      x + (row < args.linear.rows ? row * args.linear.x_stride : 0) + input,
      tiles,
      static_cast<int>(args.linear.inputs - int64_t{tiles - 1} * kTileK) - input};
  const int64_t units = tiles / groups.unit;
  stream.run(static_cast<int>(slice_begin(units, args.linear.slices, slice)) * groups.unit,
             static_cast<int>(slice_begin(units, args.linear.slices, slice + 1)) * groups.unit);
  for (int i = 0; i < 4; ++i) sums[warp][lane % 4 * 2 + i % 2][row + i / 2 * 8] = stream.total[i];
  __syncthreads();
  finish_strip(args.linear, sums);
}

// --- more rows -------------------------------------------------------------------------------------------------------

// One block: kChannels outputs, the octets of rows dealt to kRowWarps warps in turn, kOctets each.
//
//   stage: | rows x 64 inputs, 128 bytes a row | codes of 8 strips | scales, 128 or 256 bytes a strip | biases |
//
// The second half of an odd row comes first: two rows, which eight lanes read at once, then lie in different banks.
template <int kBits, bool kBiases, int kOctets, int kRowWarps>
struct Tile {
  static constexpr int kRows = kOctets * kRowWarps * kRowOctet, kThreads = kChannelWarps * kRowWarps * kWarp;
  static constexpr int kStrips = kChannels / kStrip;
  static constexpr int kNoGroup = -1;
  static constexpr int kStages = kRows <= 16 ? (kBits == 4 ? 6 : 4) : 4;
  static constexpr bool kHasSixteens = kBits == 8 && !kBiases;  // groups of 16
  static constexpr int kRowBytes = kTileK * 2, kScaleBytes = (kHasSixteens ? 4 : 2) * kStrip * 4;
  static_assert(kStrips * kScaleBytes / kChunk <= kThreads, "each thread copies scales once");
  static constexpr int kCodes = kRows * kRowBytes, kScales = kCodes + kStrips * kTileBytes<kBits>;
  static constexpr int kBiasesAt = kScales + kStrips * kScaleBytes;
  static constexpr int kStageBytes = kBiasesAt + (kBiases ? kStrips * kScaleBytes : 0);
  using Sums = TileSums<float, kRows>;
  static constexpr size_t kSharedBytes = kStages * kStageBytes + Sums::kBytes;

  const QuantizedLinearArgs& args;
  const Groups& groups;
  int tiles, strips, rows;  // of a strip; from this block on; of this block
  const __nv_bfloat16* x;   // of this block, like what follows
  const unsigned char *codes, *scales, *biases;
  unsigned char* stages;
  float sum[kStripPair][kOctets][4] = {}, total[kStripPair][kOctets][4] = {}, inputs[kBiases ? kOctets : 1][4] = {};

  static __device__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ int lane() { return thread() % kWarp; }
  static __device__ int octet(int i) { return i * kRowWarps + thread() / kWarp / kChannelWarps; }
  static __device__ int strip(int i) { return thread() / kWarp % kChannelWarps * kStripPair + i; }
  __device__ unsigned char* stage(int tile) const { return stages + tile % kStages * kStageBytes; }

  // Past the last strip that is read again, and what it gives is not written.
  __device__ int stored(int strip) const { return min(strip, strips - 1); }

  __device__ void copy_rows(int tile, unsigned char* to) const {
    deal<kRows * kRowBytes / kChunk, kThreads>([&](int i) {
      const int row = i / 8, chunk = i % 8, k = tile * kTileK + chunk * 8;
      const bool exists = row < rows && k < args.linear.inputs;
      cp_async(to + row * kRowBytes + (chunk ^ row % 2 * 4) * kChunk, exists ? x + row * args.linear.x_stride + k : x,
               exists);
    });
  }

  __device__ void copy_scales(int tile, const unsigned char* from, unsigned char* to) const {
    constexpr int kChunks = kScaleBytes / kChunk;
    const int strip = thread() / kChunks, chunk = thread() % kChunks, size = groups.is_float32 ? 4 : 2;
    if (strip >= kStrips || chunk >= groups.per_tile * size) return;
    const int group =
        stored(strip) * groups.per_strip + (groups.per_tile > 1 ? tile * groups.per_tile : tile >> groups.shift);
    cp_async(to + strip * kScaleBytes + chunk * kChunk, from + group * kStrip * size + chunk * kChunk);
  }

  __device__ void copy(int tile) const {
    unsigned char* to = stage(tile);
    copy_rows(tile, to);
    constexpr int kChunks = kTileBytes<kBits> / kChunk;
    deal<kStrips * kChunks, kThreads>([&](int i) {
      cp_async(to + kCodes + i * kChunk,
               codes + (stored(i / kChunks) * tiles + tile) * kTileBytes<kBits> + i % kChunks * kChunk);
    });
    copy_scales(tile, scales, to + kScales);
    if constexpr (kBiases) copy_scales(tile, biases, to + kBiasesAt);
  }

  __device__ void scale(const unsigned char* from, int group) {
#pragma unroll
    for (int s = 0; s < kStripPair; ++s) {
      const unsigned char* scales = from + kScales + strip(s) * kScaleBytes;
      const unsigned char* biases = from + kBiasesAt + strip(s) * kScaleBytes;
      const float2 scale = pair_of(load_pair(scales, group, lane() / 4, groups.is_float32), groups.is_float32);
      float2 bias{0, 0};
      if constexpr (kBiases) bias = pair_of(load_pair(biases, group, lane() / 4, groups.is_float32), groups.is_float32);
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        scale_group<kBiases>(scale, bias, sum[s][i], inputs[kBiases ? i : 0], total[s][i]);
        set_zero(sum[s][i]);
      }
    }
    for (auto& one : inputs) set_zero(one);
  }

  // One half of the tile's inputs, or those of one group of 16 there. Octets without rows are left out, unless there
  // are none (kIsFull): branches would keep the compiler from loading one octet while another is multiplied.
  template <bool kIsFull>
  __device__ void multiply_half(const unsigned char* from, const uint32_t (&a)[kStripPair][2][4], int half, int group) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (!kIsFull && octet(i) * kRowOctet >= rows) continue;
      const int row = octet(i) * kRowOctet + lane() / 4, chunk = (half * 4 + lane() % 4) ^ row % 2 * 4;
      const uint4 x = *reinterpret_cast<const uint4*>(from + row * kRowBytes + chunk * kChunk);
      uint32_t b[2][2];
      operands_of(kHasSixteens && group != kNoGroup ? only_group(x, group) : x, b);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        for (int s = 0; s < kStripPair; ++s) mma_bf16(sum[s][i], a[s][step], b[step]);
        if constexpr (kBiases) mma_bf16(inputs[i], {kOnes, kOnes, kOnes, kOnes}, b[step]);
      }
    }
  }

  __device__ void multiply(int tile, bool ends) {
    const unsigned char* from = stage(tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kStripPair][2][4];
#pragma unroll
      for (int s = 0; s < kStripPair; ++s) {
        const unsigned char* codes = from + kCodes + strip(s) * kTileBytes<kBits>;
        const int vector = kBits == 4 ? 0 : half;
        unpack_half<kBits>(reinterpret_cast<const uint4*>(codes)[vector * kWarp + lane()], half, kBiases ? k128 : k136,
                           a[s]);
      }
      const int groups_of_half = kHasSixteens && groups.per_tile == 4 ? 2 : 1;
      for (int group = 0; group < groups_of_half; ++group) {
        const int only = groups_of_half == 2 ? group : kNoGroup;
        if (rows > kRows - kRowOctet)
          multiply_half<true>(from, a, half, only);
        else
          multiply_half<false>(from, a, half, only);
        if (groups.per_tile > 1 || (half == 1 && ends))
          scale(from, groups.per_tile > 1 ? half * groups_of_half + group : 0);
      }
    }
  }

  __device__ void flush(Sums& sums, int slice) {
#pragma unroll
    for (int s = 0; s < kStripPair; ++s) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        sums.add_product(octet(i) * kRowOctet, strip(s) * kStrip, total[s][i]);
        set_zero(total[s][i]);
      }
    }
    sums.end_slice(args.linear, slice);
  }

  // Slices [first, last), which lie one after the other.
  __device__ void run(Sums& sums, int first, int last) {
    const int64_t units = tiles / groups.unit;
    const auto begin = [&](int slice) {
      return static_cast<int>(slice_begin(units, args.linear.slices, slice)) * groups.unit;
    };
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
        multiply(tile, groups.ends(tile, end));
      }
      flush(sums, slice++);
    }
    cp_async_wait<0>();
  }
};

template <int kBits, bool kBiases, int kOctets, int kRowWarps>
__global__ void __launch_bounds__(kChannelWarps * kRowWarps * kWarp, kOctets == 8     ? 2
                                                                     : kRowWarps == 2 ? 1
                                                                     : kBiases        ? 3
                                                                                      : 4)
    quantized_tile_kernel(QuantizedLinearArgs args, Groups groups) {
  using Block = Tile<kBits, kBiases, kOctets, kRowWarps>;
  auto* shared = dynamic_shared<unsigned char>();
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * Block::kRows;
  const int blocks = static_cast<int>(gridDim.z), block = static_cast<int>(blockIdx.z);
  typename Block::Sums sums{reinterpret_cast<float*>(shared + Block::kStages * Block::kStageBytes), first_row,
                            static_cast<int64_t>(blockIdx.x) * kChannels, blocks > 1};
  sums.clear();
  __syncthreads();
  const int tiles = static_cast<int>((args.linear.inputs + kTileK - 1) / kTileK);
  const int64_t first_strip = static_cast<int64_t>(blockIdx.x) * Block::kStrips,
                first_group = first_strip * groups.per_strip;
  const int64_t all_strips = (args.linear.outputs + kWarpChannels - 1) / kWarpChannels * kStripPair;
  const int64_t first_scale = first_group * kStrip * (groups.is_float32 ? 4 : 2);
  Block tile{args,
             groups,
             tiles,
             static_cast<int>(all_strips - first_strip),
             static_cast<int>(min(args.linear.rows - first_row, int64_t{Block::kRows})),
             static_cast<const __nv_bfloat16*>(args.linear.x) + first_row * args.linear.x_stride,
             static_cast<const unsigned char*>(args.codes) + first_strip * tiles * kTileBytes<kBits>,
             static_cast<const unsigned char*>(args.scales) + first_scale,
             static_cast<const unsigned char*>(args.biases) + first_scale,
             shared};
  tile.run(sums, static_cast<int>(slice_begin(args.linear.slices, blocks, block)),
           static_cast<int>(slice_begin(args.linear.slices, blocks, block + 1)));
  sums.finish(args.linear, args.linear.counters + (blockIdx.y * gridDim.x + blockIdx.x), blocks,
              [&](int64_t row, int64_t channel, float sum) { write_output(args.linear, row, channel, sum); });
}

// --- which
// ------------------------------------------------------------------------------------------------------------

template <int kBits, int kPerTile, bool kBiases>
cudaError_t launch_stream(const QuantizedLinearArgs& args, const Groups& groups, cudaStream_t stream) {
  const auto strips = static_cast<unsigned>((args.linear.outputs + kStrip - 1) / kStrip);
  const dim3 grid(strips, static_cast<unsigned>(args.linear.slices / kStreamWarps));
  const auto kernel = groups.is_float32 ? quantized_stream_kernel<kBits, kPerTile, kBiases, true>
                                        : quantized_stream_kernel<kBits, kPerTile, kBiases, false>;
  return launch(kernel, grid, kStreamWarps * kWarp, 0, stream, args, groups);
}

template <int kBits, bool kBiases, int kOctets, int kRowWarps>
cudaError_t launch_tiles(const QuantizedLinearArgs& args, const Groups& groups, int64_t wanted, cudaStream_t stream) {
  using Block = Tile<kBits, kBiases, kOctets, kRowWarps>;
  const int64_t across = (args.linear.outputs + kChannels - 1) / kChannels;
  const int64_t down = (args.linear.rows + Block::kRows - 1) / Block::kRows;
  int blocks = blocks_per_tile(across * down, args.linear.slices, wanted);
  if (!fits_workspace(args.linear, across * down, blocks)) blocks = 1;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down), static_cast<unsigned>(blocks));
  return launch(quantized_tile_kernel<kBits, kBiases, kOctets, kRowWarps>, grid, Block::kThreads, Block::kSharedBytes,
                stream, args, groups);
}

template <int kBits, bool kBiases>
cudaError_t launch_bits(const QuantizedLinearArgs& args, cudaStream_t stream) {
  const int64_t tiles = (args.linear.inputs + kTileK - 1) / kTileK;
  const Groups groups = groups_of(args.group, tiles, args.scale_type == Type::kF32);
  const int64_t strips = (args.linear.outputs + kStrip - 1) / kStrip;
  if (args.linear.rows <= kStreamRows && fits_workspace(args.linear, strips, args.linear.slices / kStreamWarps)) {
    if (groups.per_tile == 2) return launch_stream<kBits, 2, kBiases>(args, groups, stream);
    if constexpr (kBits == 8 && !kBiases)
      if (groups.per_tile == 4) return launch_stream<kBits, 4, kBiases>(args, groups, stream);
    if constexpr (kBits == 4 || !kBiases) return launch_stream<kBits, 1, kBiases>(args, groups, stream);
  }
  // Four small blocks are resident on a multiprocessor; large ones share their tiles only where most would be idle.
  // Sums of inputs take registers, so where there are biases two warps have the rows that one has otherwise.
  constexpr int kRowWarps = kBiases ? 2 : 1, kOctets = 8 / kRowWarps;
  if (args.linear.rows <= 16 || !fits_shared(Tile<kBits, kBiases, kOctets, kRowWarps>::kSharedBytes))
    return launch_tiles<kBits, kBiases, 2, 1>(args, groups, 4 * kMultiprocessors, stream);
  const int64_t wanted = !kBiases && args.linear.rows <= 64 ? 2 * kMultiprocessors : kMultiprocessors;
  return launch_tiles<kBits, kBiases, kOctets, kRowWarps>(args, groups, wanted, stream);
}

bool is_valid(const QuantizedLinearArgs& args) {
  const LinearArgs& linear = args.linear;
  const bool has_sixteens = args.bits == 8 && args.biases == nullptr;
  const bool is_group = args.group == 0 || (args.group == 16 && has_sixteens) || args.group == 32 || args.group == 64 ||
                        args.group == 128;
  return linear.rows > 0 && linear.outputs > 0 && linear.inputs > 0 && linear.inputs % 8 == 0 &&
         linear.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(linear.x) % kChunk == 0 && is_group &&
         (args.group == 0 || linear.inputs % args.group == 0) && linear.slices > 0 &&
         linear.slices % kStreamWarps == 0 && (linear.out_type == Type::kBF16 || linear.out_type == Type::kF32) &&
         (args.scale_type == Type::kF16 || args.scale_type == Type::kF32) && (args.bits == 4 || args.bits == 8);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_quantized_linear(const llmserve::cuda::QuantizedLinearArgs* args,
                                                         void* stream) {
  using namespace llmserve::cuda;
  if (args->linear.rows == 0) return cudaSuccess;
  if (!is_valid(*args)) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->bits == 4)
    return args->biases == nullptr ? launch_bits<4, false>(*args, on) : launch_bits<4, true>(*args, on);
  return args->biases == nullptr ? launch_bits<8, false>(*args, on) : launch_bits<8, true>(*args, on);
}
