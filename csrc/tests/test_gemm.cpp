// GEMM tiles of every table against double, and their rows against themselves: alone, in any number, by either path.
#include <array>
#include <vector>

#include "tests/numbers.h"
#include "tests/tables.h"
#include "tests/weights.h"

namespace llmserve::test {

namespace {

enum class Path { kPacked, kUnpacked, kExact };

struct Kernel {
  const char* name;
  DType dtype;
  PackedType packed;
  Path path;
};

constexpr Kernel kKernels[] = {
    {"gemm_q4 of q4_0", DType::kQ4_0, PackedType::kQ4_0, Path::kPacked},
    {"gemm_q4 of q4_1", DType::kQ4_1, PackedType::kQ4_1, Path::kPacked},
    {"gemm_u8 of q4_0", DType::kQ4_0, PackedType::kQ4_0, Path::kUnpacked},
    {"gemm_u8 of q4_1", DType::kQ4_1, PackedType::kQ4_1, Path::kUnpacked},
    {"gemm_u8 of q8_0", DType::kQ8_0, PackedType::kQ8_0, Path::kPacked},
    {"gemm_u8_f32 of q4_0", DType::kQ4_0, PackedType::kQ4_0, Path::kExact},
    {"gemm_u8_f32 of q4_1", DType::kQ4_1, PackedType::kQ4_1, Path::kExact},
    {"gemm_u8_f32 of q8_0", DType::kQ8_0, PackedType::kQ8_0, Path::kExact},
    {"gemm_bf16", DType::kBF16, PackedType::kBF16, Path::kPacked},
    {"gemm_f32", DType::kF32, PackedType::kF32, Path::kPacked},
};

TileFunction function_of(const Kernel& kernel, const KernelTable& kernels) {
  if (kernel.path == Path::kExact) return kernels.gemm_u8_f32;
  if (kernel.packed == PackedType::kBF16) return kernels.gemm_bf16;
  if (kernel.packed == PackedType::kF32) return kernels.gemm_f32;
  return kernel.path == Path::kUnpacked || kernel.packed == PackedType::kQ8_0 ? kernels.gemm_u8 : kernels.gemm_q4;
}

// Activation rows in all forms, strided as in the arena; what stands past the columns is poison.
struct Rows {
  int64_t columns = 0, padded = 0;
  Exact<float> f32;
  Exact<int8_t> q8;
  Exact<uint16_t> bf16;
  Exact<GroupMeta> q8_meta;

  Activations at(int64_t row) const {
    Activations x;
    x.columns = columns;
    x.f32 = f32.data() + row * columns;
    x.q8 = q8.data() + row * padded;
    x.bf16 = bf16.data() + row * padded;
    x.q8_meta = q8_meta.data() + row * (padded / kGroup);
    return x;
  }
};

void fill_forms(Rows& rows, int64_t num_rows) {
  const KernelTable& kernels = tables().front().kernels;  // all tables must read the same activations
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* x = rows.f32.data() + row * rows.columns;
    kernels.quantize_q8(x, rows.q8.data() + row * rows.padded, rows.q8_meta.data() + row * (rows.padded / kGroup),
                        rows.columns / kGroup * kGroup);
    kernels.round_bf16(x, rows.bf16.data() + row * rows.padded, rows.columns);
    if (rows.columns % 2 != 0) rows.bf16[static_cast<size_t>(row * rows.padded + rows.columns)] = 0;
  }
}

using Draw = float (*)(Random& random, int64_t row, int64_t k);

Rows random_rows(Random& random, int64_t num_rows, int64_t columns, Draw draw) {
  Rows rows;
  rows.columns = columns;
  rows.padded = padded_columns(columns);
  const auto padded = static_cast<size_t>(num_rows * rows.padded);
  rows.f32 = Exact<float>(static_cast<size_t>(num_rows * columns));
  rows.q8 = Exact<int8_t>(padded);
  rows.bf16 = Exact<uint16_t>(padded);
  rows.q8_meta = Exact<GroupMeta>(padded / kGroup);
  std::memset(rows.q8.data(), 0x55, rows.q8.num_bytes());
  std::memset(rows.q8_meta.data(), 0xFF, rows.q8_meta.num_bytes());  // NaN
  std::memset(rows.bf16.data(), 0xFF, rows.bf16.num_bytes());
  for (int64_t i = 0; i < num_rows * columns; ++i)
    rows.f32[static_cast<size_t>(i)] = draw(random, i / columns, i % columns);
  fill_forms(rows, num_rows);
  return rows;
}

float ordinary(Random& random, int64_t row, int64_t k) {
  if (row % 5 == 3 && (k / 32) % 2 == 0) return 0.0f;               // groups without any value
  if (row % 4 == 1 && k % 32 == 7) return 40.0f * random.normal();  // a value that towers over its group
  return random.normal() * (row % 7 == 2 ? 300.0f : 1.0f);
}
float huge(Random& random, int64_t, int64_t) { return random.uniform(-1e28f, 1e28f); }
float tiny(Random& random, int64_t, int64_t) { return random.uniform(-1e-38f, 1e-38f); }
float infinite(Random& random, int64_t row, int64_t k) {
  const float sign = random.chance(0.5) ? 1.0f : -1.0f;
  return row == 1 && k % 13 == 5 ? sign * INFINITY : random.normal();
}

// A tile ready for one kernel.
struct Prepared {
  const Kernel* kernel;
  PackedTile tile;
  Exact<uint8_t> unpacked;
  TileArgs args;
};

Prepared prepare(const Kernel& kernel, const Weights& weights, const KernelTable& kernels) {
  Prepared made;
  made.kernel = &kernel;
  made.tile = pack_tile(weights, kernel.packed, 0, static_cast<int32_t>(weights.rows), kernels);
  const bool minimum = has_minimum(kernel.packed);
  const int64_t groups = weights.columns / kGroup;
  made.args.weights = made.tile.bytes.data();
  if (kernel.path != Path::kPacked && kernel.packed != PackedType::kQ8_0) {
    made.unpacked = Exact<uint8_t>(static_cast<size_t>(groups) * unpacked_group_bytes(minimum));
    kernels.unpack_q4(made.args.weights, made.unpacked.data(), groups, minimum);
  }
  if (made.unpacked.size() > 0) made.args.weights = made.unpacked.data();
  made.args.zero_point = zero_point(kernel.packed);
  made.args.minimum = minimum;
  return made;
}

struct Expected {
  double value, bound;
};

bool reads_int8(const Kernel& kernel) { return is_quantized(kernel.packed) && kernel.path != Path::kExact; }

double activation(const Kernel& kernel, const Activations& x, int64_t k) {
  if (reads_int8(kernel)) {
    const GroupMeta& meta = x.q8_meta[k / kGroup];
    const bool apart = meta.value != 0.0f && meta.outlier == k % kGroup;
    return static_cast<double>(meta.scale) * x.q8[k] + (apart ? static_cast<double>(meta.value) : 0.0);
  }
  return kernel.packed == PackedType::kBF16 ? bf16_value(x.bf16[k]) : x.f32[k];
}

// The dot product in double, and how far float sums of its terms may stray: each term passes fewer than `columns` + 4
// roundings (integer sums have none). Instructions for bf16 may take denormals for zero.
Expected expected_dot(const Prepared& made, const Activations& x, int channel) {
  const Kernel& kernel = *made.kernel;
  double value = 0.0, magnitude = 0.0, flushed = 0.0;
  for (int64_t k = 0; k < x.columns; ++k) {
    const PackedValue weight = packed_value(kernel.packed, made.tile.bytes.data(), channel, k);
    const double a = activation(kernel, x, k);
    value += weight.value * a;
    magnitude += is_quantized(kernel.packed) ? std::fabs(weight.scale * weight.code * a) + std::fabs(weight.minimum * a)
                                             : std::fabs(weight.value * a);
    if (kernel.packed == PackedType::kBF16 && (std::fabs(a) < kSmallest || std::fabs(weight.value) < kSmallest))
      flushed += std::fabs(weight.code * weight.scale * a) + std::fabs(weight.value * a);
  }
  const auto columns = static_cast<double>(x.columns);
  const double roundings = reads_int8(kernel) ? 4 * columns / kGroup + 8 : columns + 8;
  return {value, kEpsilon * roundings * magnitude + flushed + 2 * columns * kSmallest * 65504};
}

void call(const Prepared& made, const KernelTable& kernels, const Activations& x, int rows, float* out,
          int64_t out_stride) {
  TileArgs args = made.args;
  args.x = x;
  args.rows = rows;
  args.out = out;
  args.out_stride = out_stride;
  function_of(*made.kernel, kernels)(args);
}

// Each row computed alone.
std::vector<float> rows_alone(const Prepared& made, const KernelTable& kernels, const Rows& rows, int num_rows) {
  std::vector<float> alone(static_cast<size_t>(num_rows) * kTile);
  for (int row = 0; row < num_rows; ++row) call(made, kernels, rows.at(row), 1, alone.data() + row * kTile, kTile);
  return alone;
}

void check_values(const Prepared& made, const Rows& rows, const std::vector<float>& alone, int num_rows,
                  const std::string& what) {
  for (int row = 0; row < num_rows; ++row)
    for (int channel = 0; channel < kTile; ++channel) {
      const Expected expected = expected_dot(made, rows.at(row), channel);
      const double got = alone[static_cast<size_t>(row * kTile + channel)];
      CHECK(std::fabs(got - expected.value) <= expected.bound, what, " row ", row, " channel ", channel, ": ", got,
            " for ", expected.value, " +- ", expected.bound);
    }
}

void check_together(const Prepared& made, const KernelTable& kernels, const Rows& rows, const std::vector<float>& alone,
                    int num_rows, int64_t stride, const std::string& what) {
  Guarded<float> out(static_cast<size_t>((num_rows - 1) * stride + kTile));
  call(made, kernels, rows.at(0), num_rows, out.data(), stride);
  out.check_zones(what);
  for (int row = 0; row < num_rows; ++row) {
    CHECK(std::memcmp(out.data() + row * stride, alone.data() + row * kTile, kTile * sizeof(float)) == 0, what,
          ": row ", row, " of ", num_rows, " differs from the row alone");
    for (int64_t gap = kTile; gap < stride && row + 1 < num_rows; ++gap)
      CHECK(out.is_untouched(static_cast<size_t>(row * stride + gap)), what, " wrote between rows");
  }
}

int64_t some_columns(Random& random, const Kernel& kernel) {
  if (is_quantized(kernel.packed)) return 32 * random.integer(1, 12);
  return random.chance(0.5) ? random.integer(1, 300) : 64 * random.integer(1, 5);
}

void check_kernel(Random& random, const Kernel& kernel, const NamedTable& table, int64_t columns,
                  const std::vector<int>& row_counts) {
  const std::string what = join(table.name, " ", kernel.name, " K=", columns);
  const int num_rows = row_counts.back();
  const Weights weights = random_weights(random, kernel.dtype, random.integer(1, 64), columns);
  const Prepared made = prepare(kernel, weights, table.kernels);
  const Rows rows = random_rows(random, num_rows, columns, ordinary);
  const std::vector<float> alone = rows_alone(made, table.kernels, rows, num_rows);
  check_values(made, rows, alone, std::min(num_rows, 18), what);
  for (const int count : row_counts) {
    const int64_t stride = kTile * random.integer(1, 3);
    check_together(made, table.kernels, rows, alone, count, stride, what);
  }
}

}  // namespace

TEST(gemm_small_shapes_agree_with_double_and_with_rows_alone) {
  std::vector<int> counts;
  for (int count = 1; count <= 17; ++count) counts.push_back(count);
  for (const NamedTable& table : tables())
    for (const Kernel& kernel : kKernels)
      for (const int64_t columns : {int64_t{32}, int64_t{96}, some_columns(random, kernel)})
        check_kernel(random, kernel, table, columns, counts);
}

TEST(gemm_full_slabs_agree_with_rows_alone) {
  for (const NamedTable& table : tables())
    for (const Kernel& kernel : kKernels) check_kernel(random, kernel, table, 64, {33, 62, 63, 64});
}

TEST(gemm_long_rows_agree_with_double_and_with_rows_alone) {
  for (const NamedTable& table : tables())
    for (const Kernel& kernel : kKernels) {
      check_kernel(random, kernel, table, 1536, {1, 2, 4, 7, 9});
      if (!is_quantized(kernel.packed)) check_kernel(random, kernel, table, 577, {1, 3, 6, 8});
    }
}

// Decoding takes one path, prefill the other: they must not differ in a single bit.
TEST(gemm_of_packed_and_unpacked_tiles_is_the_same) {
  constexpr int kRows = 21;
  for (const NamedTable& table : tables())
    for (const int which : {0, 1}) {
      const int64_t columns = 32 * random.integer(1, 20);
      const Weights weights = random_weights(random, kKernels[which].dtype, 64, columns);
      const Rows rows = random_rows(random, kRows, columns, ordinary);
      const Prepared packed = prepare(kKernels[which], weights, table.kernels);
      const Prepared unpacked = prepare(kKernels[which + 2], weights, table.kernels);
      const std::vector<float> one = rows_alone(packed, table.kernels, rows, kRows);
      std::vector<float> other(one.size());
      call(unpacked, table.kernels, rows.at(0), kRows, other.data(), kTile);
      CHECK(std::memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0, table.name, " ",
            kKernels[which].name, " K=", columns);
    }
}

TEST(gemm_large_and_denormal_activations_agree_with_double) {
  for (const NamedTable& table : tables())
    for (const Kernel& kernel : kKernels)
      for (const Draw draw : {huge, tiny}) {
        const int64_t columns = is_quantized(kernel.packed) ? 96 : 75;
        const Weights weights = random_weights(random, kernel.dtype, 64, columns);
        const Prepared made = prepare(kernel, weights, table.kernels);
        const Rows rows = random_rows(random, 5, columns, draw);
        const std::vector<float> alone = rows_alone(made, table.kernels, rows, 5);
        check_values(made, rows, alone, 5, join(table.name, " ", kernel.name, draw == huge ? " huge" : " tiny"));
      }
}

TEST(gemm_infinite_activations_stay_in_their_row) {
  for (const NamedTable& table : tables())
    for (const Kernel& kernel : kKernels) {
      const Weights weights = random_weights(random, kernel.dtype, 64, 64);
      const Prepared made = prepare(kernel, weights, table.kernels);
      const Rows rows = random_rows(random, 6, 64, infinite);
      std::vector<float> out(6 * kTile);
      call(made, table.kernels, rows.at(0), 6, out.data(), kTile);
      for (size_t i = 0; i < out.size(); ++i)
        CHECK(i / kTile == 1 || std::isfinite(out[i]), table.name, " ", kernel.name, " row ", i / kTile);
    }
}

// What the bounds above are worth: each of these mistakes must be outside of them.
TEST(gemm_bounds_reject_planted_mistakes) {
  for (const Kernel& kernel : kKernels) {
    const KernelTable& kernels = tables().back().kernels;
    const Weights weights = random_weights(random, kernel.dtype, 64, 160);
    const Rows rows = random_rows(random, 1, 160, [](Random& r, int64_t, int64_t) { return r.normal(); });
    const auto accepts = [&](const Prepared& made, const Rows& x) {
      try {
        const Prepared right = prepare(kernel, weights, kernels);
        check_values(right, rows, rows_alone(made, kernels, x, 1), 1, "");
      } catch (const Failure&) {
        return false;
      }
      return true;
    };
    CHECK(accepts(prepare(kernel, weights, kernels), rows), kernel.name);
    if (reads_int8(kernel) && zero_point(kernel.packed) != 0) {
      Prepared made = prepare(kernel, weights, kernels);
      made.args.zero_point += 1;
      // AVX2 has the zero point of bytes in its instructions.
      if (kernel.packed != PackedType::kQ8_0) CHECK(!accepts(made, rows), kernel.name, ": zero point");
    }
    Rows shifted = random_rows(random, 1, 160, [](Random& r, int64_t, int64_t) { return r.normal(); });
    std::memcpy(shifted.f32.data(), rows.f32.data(), rows.f32.num_bytes());
    shifted.f32[159] += 0.05f;
    fill_forms(shifted, 1);
    CHECK(!accepts(prepare(kernel, weights, kernels), shifted), kernel.name, ": one activation");
  }
}

}  // namespace llmserve::test
