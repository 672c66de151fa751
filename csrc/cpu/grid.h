// The grid of a quantized row: every value is scale * (code - zero_point) + minimum.
//
// What all block formats have in common, whatever order they keep their bits in; packing reads rows through it. The
// product is exact in float32 (a half's 11 bits, a sub-block's scale and a code have at most 23), so the sum's is the
// only rounding, and the values are those of `dequantize`.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace llmserve {

constexpr int kMaxBlockValues = 256;
constexpr int kMaxBlockGroups = 16;

struct GridSpec {
  int group;       // consecutive values that share a scale and a minimum; 0: a plain type, which has no grid
  int zero_point;  // the code of 0, where the minimum is 0
  int bits;        // every code is less than 1 << bits
  bool minimum;    // whether the type has minimums; they are 0 otherwise
};

constexpr GridSpec grid_spec(DType type) {
  switch (type) {
    case DType::kQ4_0: return {32, 8, 4, false};
    case DType::kQ4_1: return {32, 0, 4, true};
    case DType::kQ5_0: return {32, 16, 5, false};
    case DType::kQ5_1: return {32, 0, 5, true};
    case DType::kQ8_0: return {32, 128, 8, false};
    case DType::kQ2_K: return {16, 0, 2, true};
    case DType::kQ3_K: return {16, 4, 3, false};
    case DType::kQ4_K: return {32, 0, 4, true};
    case DType::kQ5_K: return {32, 0, 5, true};
    case DType::kQ6_K: return {16, 32, 6, false};
    // The 16 values of the codebook are signed bytes: a code is such a value plus 128.
    case DType::kIQ4_NL: return {32, 128, 8, false};
    case DType::kIQ4_XS: return {32, 128, 8, false};
    case DType::kI4_G32: return {32, 8, 4, false};
    case DType::kI4_G64: return {64, 8, 4, false};
    case DType::kI4_G128: return {128, 8, 4, false};
    case DType::kU4_G32: return {32, 0, 4, true};
    case DType::kU4_G64: return {64, 0, 4, true};
    case DType::kU4_G128: return {128, 0, 4, true};
    default: return {0, 0, 0, false};
  }
}

// Reads a row of `columns` values, whole blocks of a type that has a grid: `columns` codes, and a scale and a minimum
// for each group.
void read_grid(DType type, const uint8_t* row, int64_t columns, uint8_t* codes, float* scales, float* minimums);

}  // namespace llmserve
