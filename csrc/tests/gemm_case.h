// One GEMM tile of random packed bytes, rows of activations in all forms, and their products in double.
#pragma once

#include <string>
#include <vector>

#include "tests/tables.h"
#include "tests/weights.h"

namespace llmserve::test {

// How a tile is read: packed, unpacked to bytes, or (kExact) dequantized and multiplied in float32.
enum class Path { kPacked, kUnpacked, kExact };

struct GemmKernel {
  PackedType type;
  Path path;

  std::string name() const;
  bool reads_q8() const { return is_grouped(type) && path != Path::kExact; }
  bool reads_i8() const { return type == PackedType::kI8; }
  // Whether every table must give the same bits: integer sums and fused multiply-adds in one order.
  bool is_bit_identical() const { return type != PackedType::kBF16; }
  int64_t block() const { return is_grouped(type) ? block_columns(packed_format(type)) : 1; }
};
const std::vector<GemmKernel>& gemm_kernels();

// Activation rows in all forms, strided as in the arena; what stands past the columns is poison.
struct ActivationRows {
  int64_t columns = 0, padded = 0;
  int num_rows = 0;
  Exact<float> f32;
  Exact<int8_t> q8, i8;
  Exact<uint16_t> bf16;
  Exact<GroupMeta> q8_meta;
  Exact<RowMeta> i8_meta;
  Exact<int8_t> panels;
  Exact<PanelMeta> panel_meta;

  Activations at(int64_t row) const;
  void fill_forms();  // from f32
};
using Draw = float (*)(Random& random, int64_t row, int64_t k);
ActivationRows random_rows(Random& random, int num_rows, int64_t columns, Draw draw);
float ordinary(Random& random, int64_t row, int64_t k);

// A tile ready for one kernel: any codes, scales and minimums.
struct GemmTile {
  GemmKernel kernel;
  int64_t columns = 0;
  Exact<uint8_t> packed;
  std::vector<PackedValue> values;  // [k][channel]
};
GemmTile random_tile(Random& random, const GemmKernel& kernel, int64_t columns);

// Rows [row, row + num_rows) times the tile, out[i * out_stride + channel], in slabs of `slab_groups` code groups
// (0: all at once), each of exactly its bytes.
void multiply(const GemmTile& tile, const KernelTable& kernels, const ActivationRows& rows, int64_t row, int num_rows,
              float* out, int64_t out_stride, int64_t slab_groups = 0);

// What a kernel could get wrong.
enum class Mistake { kNone, kZeroPoint, kHighDropped, kHighStep, kMinimum, kHalf, kNeighbour };

// A dot product in double, and how far the kernel's may stray.
struct Expected {
  double value, bound;
};
// Of all channels of a row.
std::vector<Expected> expected_dots(const GemmTile& tile, const Activations& x, Mistake mistake = Mistake::kNone);

}  // namespace llmserve::test
