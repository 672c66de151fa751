#include "cpu/grid.h"

#include <cstddef>

namespace llmserve {

namespace {

#include "cpu/numbers.inl"
#include "cpu/grid.inl"

}  // namespace

void read_grid(DType type, const uint8_t* row, int64_t columns, uint8_t* codes, float* scales, float* minimums) {
  const GridSpec spec = grid_spec(type);
  const int values = block_values(type), groups = values / spec.group;
  if (!spec.minimum)
    for (int64_t g = 0; g < columns / spec.group; ++g) minimums[g] = 0.0f;
  for (int64_t b = 0; b < columns / values; ++b)
    read_block(type, row + static_cast<size_t>(b) * block_bytes(type), codes + b * values, scales + b * groups,
               minimums + b * groups);
}

}  // namespace llmserve
