// The packed weight layout "N64K4" and the activation layouts that its kernels read.
//
// A weight matrix [N, K] is cut into tiles of 64 output channels; a tile is one linear stream of blocks along K. A
// block of a quantized format is the smallest number of code groups (32 k, that is 8 k4-steps) that its scales span,
// followed by its tables:
//
//   codes, 8 bits   [step 0..7][channel 0..63][k 0..3]  u8     2048 bytes a group: four zmm of 16 channels x 4 k a step
//          4 bits   [step 0..3][channel 0..63][k 0..3]  u8     1024 bytes: low nibbles = step s, high = step s + 4
//          5 bits   the 4-bit lines, then the fifth bits:
//                   [step 0..7][vector 0..3] u64                256 bytes: bit i belongs to byte i of that zmm
//          6 bits   the 4-bit lines, then two such planes
//   scales          [part][channel 0..63]  fp16               128 bytes a part; two parts where a scale spans 16 k
//   minimums        the same, formats with minimum only
//
//   group 16: one group, two parts     32: one group     64: two groups     128: four groups
//
//   i8     [step][channel 0..63][k 0..3]  u8 over all of K, then [channel] fp32 scales
//   bf16   [k/2][channel 0..63][2]        bf16    256 bytes per k2-step
//   f32    [k][channel 0..63]             f32     256 bytes per k
//
// A weight is scale * (code - zero_point) + minimum; formats with a codebook look the code up first. Channels and k
// past the matrix are zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace llmserve {

// Part of the name of a kept image of packed weights: whatever changes packed bytes raises it.
constexpr int kLayoutVersion = 2;

constexpr int kTile = 64;        // output channels of a tile
constexpr int kGroup = 32;       // k values of a code group, and of a group of activations
constexpr int kRangeRows = 128;  // activation rows of one work item
constexpr int kSlabGroups = 64;  // code groups of a tile that are unpacked at a time: 2048 k
constexpr int kExactGroups = 4;  // the same as float32: 128 k
constexpr size_t kTableBytes = kTile * sizeof(uint16_t);
constexpr size_t kNibbleBytes = kTile * kGroup / 2;
constexpr size_t kByteBytes = kTile * kGroup;
constexpr size_t kPlaneBytes = kTile * kGroup / 8;

// What a packed matrix holds.
enum class PackedType : uint8_t {
  kQ4_0,      // Q4_0, symmetric INT4 in groups of 32
  kQ4_1,      // Q4_1, Q4_K, INT4 with zero points in groups of 32
  kQ4_G64,    // symmetric INT4 in groups of 64
  kQ4_G64M,   // INT4 with zero points in groups of 64
  kQ4_G128,   // symmetric INT4 in groups of 128 and more
  kQ4_G128M,  // INT4 with zero points in groups of 128 and more
  kQ4_NL,     // IQ4_NL, IQ4_XS
  kQ5_0,
  kQ5_1,  // Q5_1, Q5_K
  kQ2_K,
  kQ3_K,
  kQ6_K,
  kQ8_0,
  kI8,  // INT8 per channel, with activations scaled per token
  kBF16,
  kF32,
};
constexpr int kNumPackedTypes = 16;

struct PackedFormat {
  int bits = 0;        // of a code; 0: not quantized
  int group = 0;       // k values that share a scale; 0: all
  int zero_shift = 0;  // log2 of the zero point
  bool minimum = false;
  bool codebook = false;
  bool small_codes = false;  // below 16, unpacked too
};

constexpr PackedFormat packed_format(PackedType type) {
  switch (type) {
    case PackedType::kQ4_0: return {4, 32, 3, false, false, true};
    case PackedType::kQ4_1: return {4, 32, 0, true, false, true};
    case PackedType::kQ4_G64: return {4, 64, 3, false, false, true};
    case PackedType::kQ4_G64M: return {4, 64, 0, true, false, true};
    case PackedType::kQ4_G128: return {4, 128, 3, false, false, true};
    case PackedType::kQ4_G128M: return {4, 128, 0, true, false, true};
    case PackedType::kQ4_NL: return {4, 32, 7, false, true};
    case PackedType::kQ5_0: return {5, 32, 4, false, false};
    case PackedType::kQ5_1: return {5, 32, 0, true, false};
    case PackedType::kQ2_K: return {4, 16, 0, true, false, true};
    case PackedType::kQ3_K: return {4, 16, 2, false, false, true};
    case PackedType::kQ6_K: return {6, 16, 5, false, false};
    case PackedType::kQ8_0: return {8, 32, 7, false, false};
    case PackedType::kI8: return {8, 0, 7, false, false};
    default: return {};
  }
}
constexpr const char* packed_name(PackedType type) {
  constexpr const char* kNames[kNumPackedTypes] = {"q4_0",  "q4_1", "q4_g64", "q4_g64m", "q4_g128", "q4_g128m",
                                                   "q4_nl", "q5_0", "q5_1",   "q2_k",    "q3_k",    "q6_k",
                                                   "q8_0",  "i8",   "bf16",   "f32"};
  return kNames[static_cast<size_t>(type)];
}

// The values of the 4-bit codebook, plus 128.
constexpr uint8_t kCodebook[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

constexpr bool is_quantized(PackedType type) { return packed_format(type).bits != 0; }
constexpr bool is_grouped(PackedType type) { return packed_format(type).group != 0; }
constexpr int zero_point(PackedFormat format) { return format.minimum ? 0 : 1 << format.zero_shift; }

// Code groups and table parts of a block.
constexpr int block_groups(PackedFormat format) { return format.group <= kGroup ? 1 : format.group / kGroup; }
constexpr int block_parts(PackedFormat format) { return format.group == 16 ? 2 : 1; }
constexpr int block_columns(PackedFormat format) { return block_groups(format) * kGroup; }

constexpr size_t codes_bytes(int bits) {
  return bits == 8 ? kByteBytes : kNibbleBytes + static_cast<size_t>(bits - 4) * kPlaneBytes;
}
constexpr size_t tables_bytes(PackedFormat format) {
  return static_cast<size_t>(block_parts(format)) * kTableBytes * (format.minimum ? 2 : 1);
}
constexpr size_t packed_block_bytes(PackedFormat format) {
  return static_cast<size_t>(block_groups(format)) * codes_bytes(format.bits) + tables_bytes(format);
}
// The format of a tile whose codes were unpacked to bytes (and looked up).
constexpr PackedFormat unpacked(PackedFormat format) {
  return {8, format.group, format.zero_shift, format.minimum, false, format.small_codes};
}

static_assert(packed_block_bytes(packed_format(PackedType::kQ4_0)) == 1152);
static_assert(packed_block_bytes(packed_format(PackedType::kQ4_1)) == 1280);
static_assert(packed_block_bytes(packed_format(PackedType::kQ4_G128)) == 4224);
static_assert(packed_block_bytes(packed_format(PackedType::kQ5_1)) == 1536);
static_assert(packed_block_bytes(packed_format(PackedType::kQ6_K)) == 1792);
static_assert(packed_block_bytes(packed_format(PackedType::kQ8_0)) == 2176);
static_assert(packed_format(PackedType::kF32).bits == 0 && is_quantized(PackedType::kI8));

// Bytes of one tile over all of K.
constexpr size_t tile_bytes(PackedType type, int64_t columns) {
  const PackedFormat format = packed_format(type);
  if (type == PackedType::kI8) return static_cast<size_t>(columns + 3) / 4 * 4 * kTile + kTile * sizeof(float);
  if (is_grouped(type)) {
    const int64_t width = block_columns(format);
    return static_cast<size_t>((columns + width - 1) / width) * packed_block_bytes(format);
  }
  if (type == PackedType::kBF16) return static_cast<size_t>((columns + 1) / 2) * kTile * 4;
  return static_cast<size_t>(columns) * kTile * 4;
}

// One group of 32 activations quantized to int8. The four values of one step, the one with the largest magnitude, have
// codes of 12 bits: 128 * high + the int8 code, with high parts up to 15. So a value that towers over its group leaves
// the others their codes. The high parts are kept times 8: a GEMM multiplies them with 16 times the weights' codes.
struct GroupMeta {
  float scale;
  int32_t negative_sum;  // of all codes
  float scaled_sum;      // scale * sum
  int32_t high;          // four int8: 8 times the high parts of that step
  int32_t high_step;
  int32_t negative_first_sum;  // of the codes of steps 0..3
  float scaled_first_sum;
  float scaled_second_sum;  // of steps 4..7
};
static_assert(sizeof(GroupMeta) == 32);
constexpr int kHighBits = 7;                 // of a code below its high part
constexpr int kHighShift = 4;                // what the stored high parts lack of them
constexpr float kLeastShare = 1.0f / 15.5f;  // of the largest magnitude that the scale's is

// The same for matrix units: panels of 16 rows, [rows / 16][group][row][64], the codes of a row and behind them 32
// bytes that are zero but for the high parts in their step; and what belongs to a group of each of the rows.
constexpr int kPanelRows = 16;
constexpr int kPanelRowBytes = 2 * kGroup;
constexpr int64_t kPanelBytes = kPanelRows * kPanelRowBytes;
struct PanelMeta {
  float scales[kPanelRows];
  float scaled_sums[kPanelRows];
  float scaled_first_sums[kPanelRows];
  float scaled_second_sums[kPanelRows];
};

// One row of activations quantized to int8 with one scale.
struct RowMeta {
  float scale;
  int32_t negative_sum;
};

constexpr int64_t padded_columns(int64_t columns) { return (columns + kTile - 1) / kTile * kTile; }

// Rows of activations in the forms that GEMM reads; unused forms are null. Strides: `columns` for f32,
// `padded_columns` for q8, i8 and bf16, `padded_columns / kGroup` for the meta of groups, 1 for that of rows. Panels
// only where the first row is the first of one.
struct Activations {
  const float* f32 = nullptr;
  const int8_t* q8 = nullptr;
  const GroupMeta* q8_meta = nullptr;
  const int8_t* panels = nullptr;
  const PanelMeta* panel_meta = nullptr;
  const int8_t* i8 = nullptr;
  const RowMeta* i8_meta = nullptr;
  const uint16_t* bf16 = nullptr;
  int64_t columns = 0;
};

}  // namespace llmserve
