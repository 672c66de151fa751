// Packed weights of 4 and 8 bits: the layout that llmserve/ops/cuda/packing.py writes, and what reads it.
//
// Weights are the left operand of the tensor cores, 16 output channels of a strip by 16 inputs; rows of the batch are
// the right one, eight at a time. So a batch of one row wastes nothing of the left operand, and one layout serves every
// size of batch. A tile has the 16 channels of a strip and 64 inputs; the tiles of a strip lie one after the other, so
// a warp streams through memory.
//
// The sum over the inputs of a tile may take them in any order, as long as both operands have the same. They are in the
// one that lets lane (row r = lane / 4, quad q = lane % 4) read eight consecutive values of a row of the batch at once:
//
//   input within the tile = 32 half + 8 q + 4 step + 2 pair + i        two steps (16 inputs each) in each half
//
//   4 bits, a tile is 32 lanes x 16 bytes. Word 2 half + step of a lane is its share of one 16 x 16 operand:
//
//        bit 31                                                     bit 0
//       | r+8 p1 | r p1 | r+8 p0 | r p0 | r+8 p1 | r p1 | r+8 p0 | r p0 |     p0, p1: pair 0 and 1
//       |----------- i = 1 of the pair -|----------- i = 0 -------------|
//
//     so that `word >> 4 j & 0x000F000F` are the two values of register j of the operand.
//
//   8 bits, a tile is 2 halves x 32 lanes x 16 bytes. Words of a lane, each the four inputs 2 pair + i of a step:
//
//       | r, step 0 | r+8, step 0 | r, step 1 | r+8, step 1 |
//
//     which as they are are the operand of a 16 x 32 product of int8.
//
// Scales and biases: [strip][group][r][2], channels r and r + 8 side by side; a group is 32, 64 or 128 inputs or all;
// with 8 bits and no biases also 16. A weight is scale * code; codes of 4 bits count from -8 (stored plus 8) where
// there are no biases. Where there are they count from 0, and the weight is scale * code + bias. The codes enter the
// products as bfloat16 integers, which are exact, and each group's sum is scaled in float32.
#pragma once

#include "cuda/device.h"
#include "cuda/ptx.h"

namespace llmserve::cuda {

constexpr int kStrip = 16;     // output channels
constexpr int kTileK = 64;     // inputs of a tile
constexpr int kHalfK = 32;     // of half a tile
constexpr int kRowOctet = 8;   // rows of the batch in a right operand
constexpr int kStripPair = 2;  // strips are padded to pairs
constexpr int kChunk = 16;     // bytes that a lane reads at once

template <int kBits>
constexpr int kTileBytes = kStrip * kTileK * kBits / 8;

static_assert(kTileBytes<4> == kWarp * kChunk, "a tile of 4 bits is one load of a warp");
static_assert(kTileBytes<8> == 2 * kWarp * kChunk, "a tile of 8 bits is two");

constexpr uint32_t k128 = 0x43004300;   // two bfloat16 whose last bit counts 1
constexpr uint32_t k136 = 0x43084308;   // the same of codes that count from -8
constexpr uint32_t kOnes = 0x3F803F80;  // 1
constexpr uint32_t kTableAndOr = 0xEA;  // lop3: a & b | c
static_assert(kTableAndOr == ((0xF0 & 0xCC) | 0xAA));

__device__ inline uint32_t word_of(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// One left operand of 4-bit codes. `zero` is what stands for code 0: k128, or k136 where codes count from -8.
__device__ inline void unpack4(uint32_t word, uint32_t zero, uint32_t (&a)[4]) {
  for (int j = 0; j < 4; ++j) a[j] = subtract_bf16(lop3<kTableAndOr>(word >> 4 * j, 0x000F000F, k128), zero);
}

// One left operand of int8 codes from the words of channels r and r + 8. The lower seven bits make 128 + x, the sign
// makes the last bit of the exponent, so 128 or 256 is subtracted.
__device__ inline void unpack8(uint32_t low, uint32_t high, uint32_t (&a)[4]) {
  for (int j = 0; j < 4; ++j) {
    const uint32_t pair = __byte_perm(j % 2 == 0 ? low : high, 0, j < 2 ? 0x4140 : 0x4342);
    a[j] = subtract_bf16(lop3<kTableAndOr>(pair, 0x007F007F, k128), lop3<kTableAndOr>(pair, 0x00800080, k128));
  }
}

// The left operands of both steps of one half of a tile. 4 bits: `vector` is the tile's; 8 bits: the half's.
template <int kBits>
__device__ inline void unpack_half(const uint4& vector, int half, uint32_t zero, uint32_t (&a)[2][4]) {
  for (int step = 0; step < 2; ++step) {
    if constexpr (kBits == 4)
      unpack4(word_of(vector, half * 2 + step), zero, a[step]);
    else
      unpack8(word_of(vector, step * 2), word_of(vector, step * 2 + 1), a[step]);
  }
}

// Which scales are whose. Passed to kernels as it is.
struct Groups {
  int per_tile;     // groups in a tile: 4, 2, or 1 where one has a tile or more
  int shift;        // tile >> shift is the group where per_tile is 1
  int per_strip;    // groups of a strip
  int unit;         // tiles that slices do not cut
  bool is_float32;  // the scales; else float16

  // Whether a group ends behind `tile`, that is before `end` at the latest.
  __device__ bool ends(int tile, int end) const { return tile + 1 == end || ((tile + 1) & ((1u << shift) - 1)) == 0; }
};

// How groups of so many inputs lie over the tiles of a strip; 0 inputs: one group has all.
inline Groups groups_of(int64_t inputs, int64_t tiles, bool is_float32) {
  constexpr int kNever = 31;
  const int all = static_cast<int>(tiles);
  if (inputs == 0) return {1, kNever, 1, 1, is_float32};
  if (inputs < kTileK) {
    const int per_tile = kTileK / static_cast<int>(inputs);
    return {per_tile, 0, per_tile * all, 1, is_float32};
  }
  const int group = static_cast<int>(inputs) / kTileK;
  return {1, group / 2, all / group, group, is_float32};
}

// The scales of channels r and r + 8, raw: `at` is the index of the group in the whole weight.
__device__ inline uint2 load_pair(const void* scales, int64_t at, int r, bool is_float32) {
  if (is_float32) return static_cast<const uint2*>(scales)[at * kRowOctet + r];
  return {static_cast<const uint32_t*>(scales)[at * kRowOctet + r], 0};
}

__device__ inline float2 pair_of(uint2 raw, bool is_float32) {
  if (is_float32) return {__uint_as_float(raw.x), __uint_as_float(raw.y)};
  const __half2_raw both{static_cast<unsigned short>(raw.x), static_cast<unsigned short>(raw.x >> 16)};
  return {__half2float(__half(__half_raw{both.x})), __half2float(__half(__half_raw{both.y}))};
}

}  // namespace llmserve::cuda
