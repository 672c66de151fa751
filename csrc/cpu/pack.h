// Packing: checkpoint rows into tiles of the N64K4 layout (layout.h).
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor_view.h"
#include "cpu/kernel_table.h"

namespace llmserve {

// The packed form of a stored type: its own, or BF16 for floats.
PackedType packed_type_of(DType dtype);

// The rows that make one tile: `num_rows` (at most 64) rows of a tensor from `row` on; the rest of the tile is zero.
struct TileSource {
  int32_t tensor;
  int32_t row;
  int32_t num_rows;
};

// A packed weight. The bytes belong to the program's weight arena.
struct PackedMatrix {
  PackedType type = PackedType::kF32;
  int64_t columns = 0;
  std::vector<TensorView> tensors;
  std::vector<TileSource> sources;
  uint8_t* data = nullptr;

  int num_tiles() const { return static_cast<int>(sources.size()); }
  size_t bytes_per_tile() const { return tile_bytes(type, columns); }
  size_t num_bytes() const { return bytes_per_tile() * sources.size(); }
  const uint8_t* tile(int index) const { return data + static_cast<size_t>(index) * bytes_per_tile(); }

  // Throws std::invalid_argument where sources, shapes and types do not fit together.
  void check() const;
  void pack_tile(int index, const KernelTable& kernels) const;
};

}  // namespace llmserve
