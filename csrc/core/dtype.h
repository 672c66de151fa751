// Element types of checkpoints.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmserve {

enum class DType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_NL,
  kIQ4_XS,
  // Group-wise INT4 as rows of blocks: I4 is symmetric (zero point 8), U4 has minimums.
  kI4_G32,
  kI4_G64,
  kI4_G128,
  kU4_G32,
  kU4_G64,
  kU4_G128,
  kI8,  // INT8 per channel: a row's bytes, then its float32 scale
};

constexpr DType kDTypes[] = {DType::kF32,     DType::kF16,    DType::kBF16,    DType::kQ4_0,   DType::kQ4_1,
                             DType::kQ5_0,    DType::kQ5_1,   DType::kQ8_0,    DType::kQ2_K,   DType::kQ3_K,
                             DType::kQ4_K,    DType::kQ5_K,   DType::kQ6_K,    DType::kIQ4_NL, DType::kIQ4_XS,
                             DType::kI4_G32,  DType::kI4_G64, DType::kI4_G128, DType::kU4_G32, DType::kU4_G64,
                             DType::kU4_G128, DType::kI8};

struct DTypeInfo {
  const char* name;
  int block_values;    // 1 for plain types
  size_t block_bytes;  // of one block, or of one element of a plain type
};

constexpr DTypeInfo dtype_info(DType type) {
  switch (type) {
    case DType::kF32: return {"f32", 1, 4};
    case DType::kF16: return {"f16", 1, 2};
    case DType::kBF16: return {"bf16", 1, 2};
    case DType::kQ4_0: return {"q4_0", 32, 18};
    case DType::kQ4_1: return {"q4_1", 32, 20};
    case DType::kQ5_0: return {"q5_0", 32, 22};
    case DType::kQ5_1: return {"q5_1", 32, 24};
    case DType::kQ8_0: return {"q8_0", 32, 34};
    case DType::kQ2_K: return {"q2_k", 256, 84};
    case DType::kQ3_K: return {"q3_k", 256, 110};
    case DType::kQ4_K: return {"q4_k", 256, 144};
    case DType::kQ5_K: return {"q5_k", 256, 176};
    case DType::kQ6_K: return {"q6_k", 256, 210};
    case DType::kIQ4_NL: return {"iq4_nl", 32, 18};
    case DType::kIQ4_XS: return {"iq4_xs", 256, 136};
    case DType::kI4_G32: return {"i4_g32", 32, 18};
    case DType::kI4_G64: return {"i4_g64", 64, 34};
    case DType::kI4_G128: return {"i4_g128", 128, 66};
    case DType::kU4_G32: return {"u4_g32", 32, 20};
    case DType::kU4_G64: return {"u4_g64", 64, 36};
    case DType::kU4_G128: return {"u4_g128", 128, 68};
    case DType::kI8: return {"i8", 1, 1};
  }
  return {"?", 1, 0};
}

constexpr const char* dtype_name(DType type) { return dtype_info(type).name; }
constexpr int block_values(DType type) { return dtype_info(type).block_values; }
constexpr size_t block_bytes(DType type) { return dtype_info(type).block_bytes; }
constexpr size_t row_bytes(DType type, int64_t columns) {
  return static_cast<size_t>(columns / block_values(type)) * block_bytes(type) + (type == DType::kI8 ? 4 : 0);
}

}  // namespace llmserve
