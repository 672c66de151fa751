// Element types of checkpoints and packed weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmserve {

enum class DType : uint8_t { kF32, kF16, kBF16, kQ4_0, kQ4_1, kQ8_0 };

// Values that share one scale in the block formats; 1 for plain types.
constexpr int block_values(DType type) {
  return type == DType::kF32 || type == DType::kF16 || type == DType::kBF16 ? 1 : 32;
}

// Bytes of one block (block formats) or of one element (plain types).
constexpr size_t block_bytes(DType type) {
  switch (type) {
    case DType::kF32: return 4;
    case DType::kF16: return 2;
    case DType::kBF16: return 2;
    case DType::kQ4_0: return 18;  // fp16 scale, 16 bytes of codes
    case DType::kQ4_1: return 20;  // fp16 scale, fp16 minimum, 16 bytes of codes
    case DType::kQ8_0: return 34;  // fp16 scale, 32 signed bytes
  }
  return 0;
}

constexpr size_t row_bytes(DType type, int64_t columns) {
  return static_cast<size_t>(columns / block_values(type)) * block_bytes(type);
}

constexpr const char* dtype_name(DType type) {
  switch (type) {
    case DType::kF32: return "f32";
    case DType::kF16: return "f16";
    case DType::kBF16: return "bf16";
    case DType::kQ4_0: return "q4_0";
    case DType::kQ4_1: return "q4_1";
    case DType::kQ8_0: return "q8_0";
  }
  return "?";
}

}  // namespace llmserve
