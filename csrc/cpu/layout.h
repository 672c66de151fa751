// The packed weight layout "N64K4" and the activation layouts that its kernels read.
//
// A weight matrix [N, K] is cut into tiles of 64 output channels; a tile is one linear stream. Quantized types are cut
// along K into groups of 32, which are 8 k4-steps:
//
//   u8 group      [step 0..7][channel 0..63][k 0..3]  u8      2048 bytes: four zmm of 16 channels x 4 k per step
//                 [channel 0..63] fp16 scale                   128 bytes
//                 [channel 0..63] fp16 minimum                 128 bytes, types with minimum only
//   4-bit group   [step 0..3][channel 0..63][k 0..3]  u8      1024 bytes: low nibbles = step s, high = step s + 4
//                 scales, minimums as above
//   bf16          [k/2][channel 0..63][2]             bf16     256 bytes per k2-step
//   f32           [k][channel 0..63]                  f32      256 bytes per k
//
// A weight is scale * (code - zero_point) + minimum. Channels and k past the matrix are zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace llmserve {

// Part of the name of a kept image of packed weights: whatever changes packed bytes raises it.
constexpr int kLayoutVersion = 1;

constexpr int kTile = 64;       // output channels of a tile
constexpr int kGroup = 32;      // k values that share a scale
constexpr int kSlabRows = 64;   // activation rows of one pass over an unpacked tile
constexpr int kDirectRows = 8;  // up to this many rows 4-bit codes are unpacked in registers
constexpr size_t kTableBytes = kTile * sizeof(uint16_t);
constexpr size_t kNibbleBytes = kTile * kGroup / 2;
constexpr size_t kByteBytes = kTile * kGroup;

// What a packed matrix holds; one set of kernels each.
enum class PackedType : uint8_t { kQ4_0, kQ4_1, kQ8_0, kBF16, kF32 };

constexpr bool is_quantized(PackedType type) {
  return type == PackedType::kQ4_0 || type == PackedType::kQ4_1 || type == PackedType::kQ8_0;
}
constexpr bool has_minimum(PackedType type) { return type == PackedType::kQ4_1; }
constexpr int zero_point(PackedType type) {
  return type == PackedType::kQ4_0 ? 8 : type == PackedType::kQ8_0 ? 128 : 0;
}

constexpr size_t codes_bytes(PackedType type) { return type == PackedType::kQ8_0 ? kByteBytes : kNibbleBytes; }
constexpr size_t group_bytes(PackedType type) { return codes_bytes(type) + kTableBytes * (has_minimum(type) ? 2 : 1); }
constexpr size_t unpacked_group_bytes(bool minimum) { return kByteBytes + kTableBytes * (minimum ? 2 : 1); }

static_assert(group_bytes(PackedType::kQ4_0) == 1152 && group_bytes(PackedType::kQ4_1) == 1280);
static_assert(group_bytes(PackedType::kQ8_0) == 2176 && unpacked_group_bytes(false) == 2176);
static_assert(unpacked_group_bytes(true) == 2304);
static_assert(group_bytes(PackedType::kQ4_0) % 64 == 0 && group_bytes(PackedType::kQ8_0) % 64 == 0);

// Bytes of one tile over all of K.
constexpr size_t tile_bytes(PackedType type, int64_t columns) {
  if (is_quantized(type)) return static_cast<size_t>((columns + kGroup - 1) / kGroup) * group_bytes(type);
  if (type == PackedType::kBF16) return static_cast<size_t>((columns + 1) / 2) * kTile * 4;
  return static_cast<size_t>(columns) * kTile * 4;
}

// One group of 32 activations quantized to int8. A value that towers over its group would leave the others few codes:
// it is kept apart as float32 (its code is 0), and the GEMM adds its product with the dequantized weight at the end.
struct GroupMeta {
  float scale;
  int16_t sum;       // of the codes
  int16_t outlier;   // index within the group, meaningful where `value` is not 0
  float scaled_sum;  // scale * sum + value
  float value;       // of the outlier, 0: none
};
static_assert(sizeof(GroupMeta) == 16);
constexpr float kOutlierRatio = 1.75f;  // to the second largest magnitude of the group

constexpr int64_t padded_columns(int64_t columns) { return (columns + kTile - 1) / kTile * kTile; }

// Rows of activations in the forms that GEMM reads; unused forms are null. Strides: `columns` for f32,
// `padded_columns` for q8 and bf16, `padded_columns / kGroup` for the meta.
struct Activations {
  const float* f32 = nullptr;
  const int8_t* q8 = nullptr;
  const GroupMeta* q8_meta = nullptr;
  const uint16_t* bf16 = nullptr;
  int64_t columns = 0;
};

}  // namespace llmserve
