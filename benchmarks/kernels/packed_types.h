// What the benchmark needs to know of each packed type.
#pragma once

#include <string>
#include <vector>

#include "cpu/layout.h"
#include "cpu/value.h"
#include "roofs.h"

namespace llmserve::bench {

struct TypeInfo {
  const char* name = nullptr;
  unsigned form = 0;  // of the activations that its kernels read
  Roof roof = kF32;
  int64_t multiple = 1;  // columns must be a multiple of it
  bool by_default = false;
};

constexpr TypeInfo describe(PackedType type) {
  switch (type) {
    case PackedType::kI8: return {packed_name(type), kFormI8, kInt8, 1, true};
    case PackedType::kBF16: return {packed_name(type), kFormBF16, kBf16, 1, true};
    case PackedType::kF32: return {packed_name(type), kFormF32, kF32, 1, false};
    default: break;
  }
  const PackedFormat format = packed_format(type);
  // Of the grouped types those by default whose kernels differ most; the others have the same dot products.
  const bool by_default = type == PackedType::kQ4_0 || type == PackedType::kQ4_1 || type == PackedType::kQ4_G128 ||
                          type == PackedType::kQ8_0;
  return {packed_name(type), kFormQ8, kInt8, block_columns(format), by_default};
}

inline std::vector<PackedType> all_types() {
  std::vector<PackedType> types;
  for (int code = 0; code < kNumPackedTypes; ++code) types.push_back(static_cast<PackedType>(code));
  return types;
}

}  // namespace llmserve::bench
