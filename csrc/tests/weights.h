// Random checkpoint tensors in every stored type, with their values by definition of the format.
#pragma once

#include <vector>

#include "core/tensor_view.h"
#include "cpu/layout.h"
#include "cpu/pack.h"
#include "tests/buffers.h"

namespace llmserve::test {

struct Weights {
  DType dtype = DType::kF32;
  int64_t rows = 0, columns = 0;
  Exact<uint8_t> bytes;

  TensorView view() const { return {bytes.data(), dtype, rows, columns}; }
  double value(int64_t row, int64_t column) const;
};

uint16_t random_half(Random& random);
Weights random_weights(Random& random, DType dtype, int64_t rows, int64_t columns);

// A matrix of one tile that holds `num_rows` rows from `row` on, packed into memory of exactly its size.
struct PackedTile {
  PackedMatrix matrix;
  Exact<uint8_t> bytes;
};
PackedTile pack_tile(const Weights& weights, PackedType type, int32_t row, int32_t num_rows,
                     const KernelTable& kernels);

// What the packed bytes of a tile say, by the drawing in layout.h.
struct PackedValue {
  double scale = 1.0, minimum = 0.0;
  int code = 0;  // minus the zero point
  double value = 0.0;
};
PackedValue packed_value(PackedType type, const uint8_t* tile, int64_t columns, int channel, int64_t k);

}  // namespace llmserve::test
