// A warp has a tile, which is one or two loads of 16 bytes a lane. A lane then holds eight consecutive inputs of two
// channels in each half of the tile: four stores of 16 bytes, of which four lanes fill 64 bytes of a row.
#include "cuda/dequantize.h"

#include "cuda/packed_weights.h"

namespace llmserve::cuda {

namespace {

constexpr int kBlock = 256;

// The eight inputs of channel r, or r + 8 (`is_upper`), in a half: scaled in float32, then rounded.
template <bool kBiases>
__device__ uint4 scaled(const uint32_t (&a)[2][4], int is_upper, float scale, float bias) {
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = a[i / 2][is_upper + i % 2 * 2];
    float low = __fmul_rn(__uint_as_float(pair << 16), scale),
          high = __fmul_rn(__uint_as_float(pair & 0xFFFF0000u), scale);
    if constexpr (kBiases) low = __fadd_rn(low, bias), high = __fadd_rn(high, bias);
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(low, high);
    words[i] = static_cast<uint32_t>(__bfloat16_as_ushort(rounded.x)) |
               static_cast<uint32_t>(__bfloat16_as_ushort(rounded.y)) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

template <int kBits, bool kBiases>
__global__ void __launch_bounds__(kBlock) dequantize_kernel(DequantizeArgs args, Groups groups) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, tiles = static_cast<int>((args.inputs + kTileK - 1) / kTileK);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (kBlock / kWarp) + threadIdx.x / kWarp;
  const int64_t strip = at / tiles;
  const int tile = static_cast<int>(at % tiles);
  if (strip * kStrip >= args.outputs) return;
  const auto* codes = static_cast<const unsigned char*>(args.codes) + at * kTileBytes<kBits>;
  for (int half = 0; half < 2; ++half) {
    uint32_t a[2][4];
    unpack_half<kBits>(load_streaming(codes + ((kBits == 4 ? 0 : half) * kWarp + lane) * kChunk), half,
                       kBiases ? k128 : k136, a);
    const int in_tile = (half * kHalfK + lane % 4 * 8) * groups.per_tile / kTileK;  // which group of several
    const int64_t group =
        strip * groups.per_strip + (groups.per_tile > 1 ? tile * groups.per_tile + in_tile : tile >> groups.shift);
    const float2 scale = pair_of(load_pair(args.scales, group, lane / 4, groups.is_float32), groups.is_float32);
    float2 bias{0, 0};
    if constexpr (kBiases)
      bias = pair_of(load_pair(args.biases, group, lane / 4, groups.is_float32), groups.is_float32);
    const int64_t k = int64_t{tile} * kTileK + half * kHalfK + lane % 4 * 8;
    for (int upper = 0; upper < 2; ++upper) {
      const int64_t channel = strip * kStrip + lane / 4 + upper * 8;
      if (channel >= args.outputs || k >= args.inputs) continue;
      *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(args.out) + channel * args.out_stride + k) =
          scaled<kBiases>(a, upper, upper == 0 ? scale.x : scale.y, upper == 0 ? bias.x : bias.y);
    }
  }
}

template <int kBits, bool kBiases>
cudaError_t launch_bits(const DequantizeArgs& args, cudaStream_t stream) {
  const int64_t tiles = (args.inputs + kTileK - 1) / kTileK, strips = (args.outputs + kStrip - 1) / kStrip;
  const Groups groups = groups_of(args.group, tiles, args.scale_type == Type::kF32);
  const auto blocks = static_cast<unsigned>((tiles * strips + kBlock / kWarp - 1) / (kBlock / kWarp));
  return launch(dequantize_kernel<kBits, kBiases>, blocks, kBlock, 0, stream, args, groups);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_dequantize(const llmserve::cuda::DequantizeArgs* args, void* stream) {
  using namespace llmserve::cuda;
  const bool is_valid = args->outputs > 0 && args->inputs > 0 && args->inputs % 8 == 0 && args->out_stride % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(args->out) % kChunk == 0 && (args->bits == 4 || args->bits == 8) &&
                        (args->scale_type == Type::kF16 || args->scale_type == Type::kF32);
  if (!is_valid) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->bits == 4)
    return args->biases == nullptr ? launch_bits<4, false>(*args, on) : launch_bits<4, true>(*args, on);
  return args->biases == nullptr ? launch_bits<8, false>(*args, on) : launch_bits<8, true>(*args, on);
}
