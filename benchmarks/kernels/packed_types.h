// What the benchmark needs to know of each packed type. A type without its line does not compile.
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
    case PackedType::kQ4_0: return {"q4_0", kFormQ8, kInt8, 32, true};
    case PackedType::kQ4_1: return {"q4_1", kFormQ8, kInt8, 32, true};
    case PackedType::kQ8_0: return {"q8_0", kFormQ8, kInt8, 32, true};
    case PackedType::kBF16: return {"bf16", kFormBF16, kBf16, 1, true};
    case PackedType::kF32: return {"f32", kFormF32, kF32, 1, false};
  }
  return {};
}

inline std::vector<PackedType> all_types() {
  std::vector<PackedType> types;
  for (int code = 0; code < 256; ++code)
    if (describe(static_cast<PackedType>(code)).name != nullptr) types.push_back(static_cast<PackedType>(code));
  return types;
}

}  // namespace llmserve::bench
