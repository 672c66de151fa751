// GEMM tiles of every table against double, and their rows against themselves: alone, in any number, by either path, in
// one piece or in slabs.
#include <numeric>
#include <vector>

#include "tests/gemm_case.h"
#include "tests/numbers.h"

namespace llmserve::test {

namespace {

float normal(Random& random, int64_t, int64_t) { return random.normal(); }
float huge(Random& random, int64_t, int64_t) { return random.uniform(-1e28f, 1e28f); }
// Around the smallest groups that have codes.
float tiny(Random& random, int64_t, int64_t k) {
  return random.uniform(-4e-28f, 4e-28f) * (k / 32 % 2 == 0 ? 1 : 0.1f);
}
float denormal(Random& random, int64_t, int64_t) { return random.uniform(-1e-38f, 1e-38f); }

// Each row computed alone, [row][channel].
std::vector<float> rows_alone(const GemmTile& tile, const KernelTable& kernels, const ActivationRows& rows,
                              int64_t slab_groups = 0) {
  std::vector<float> alone(static_cast<size_t>(rows.num_rows) * kTile);
  for (int row = 0; row < rows.num_rows; ++row)
    multiply(tile, kernels, rows, row, 1, alone.data() + row * kTile, kTile, slab_groups);
  return alone;
}

std::vector<float> rows_together(const GemmTile& tile, const KernelTable& kernels, const ActivationRows& rows,
                                 int64_t slab_groups = 0) {
  std::vector<float> out(static_cast<size_t>(rows.num_rows) * kTile);
  multiply(tile, kernels, rows, 0, rows.num_rows, out.data(), kTile, slab_groups);
  return out;
}

bool same_bits(const std::vector<float>& x, const std::vector<float>& y) {
  return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

void check_values(const GemmTile& tile, const ActivationRows& rows, const std::vector<float>& got, int num_rows,
                  const std::string& what, Mistake mistake = Mistake::kNone) {
  for (int row = 0; row < num_rows; ++row) {
    const std::vector<Expected> expected = expected_dots(tile, rows.at(row), mistake);
    for (size_t channel = 0; channel < kTile; ++channel) {
      const auto [value, bound] = expected[channel];
      const double is = got[static_cast<size_t>(row) * kTile + channel];
      CHECK(std::fabs(is - value) <= bound, what, " row ", row, " channel ", channel, ": ", is, " for ", value, " +- ",
            bound);
    }
  }
}

void check_together(const GemmTile& tile, const KernelTable& kernels, const ActivationRows& rows,
                    const std::vector<float>& alone, int num_rows, int64_t stride, const std::string& what) {
  Guarded<float> out(static_cast<size_t>((num_rows - 1) * stride + kTile));
  multiply(tile, kernels, rows, 0, num_rows, out.data(), stride);
  out.check_zones(what);
  for (int row = 0; row < num_rows; ++row) {
    CHECK(std::memcmp(out.data() + row * stride, alone.data() + row * kTile, kTile * sizeof(float)) == 0, what,
          ": row ", row, " of ", num_rows, " differs from the row alone");
    for (int64_t gap = kTile; gap < stride && row + 1 < num_rows; ++gap)
      CHECK(out.is_untouched(static_cast<size_t>(row * stride + gap)), what, " wrote between rows");
  }
}

// Values of the first `num_checked` rows, and every row in company of each size.
void check_kernel(Random& random, const GemmKernel& kernel, const NamedTable& table, int64_t columns,
                  const std::vector<int>& row_counts, int num_checked) {
  const std::string what = join(table.name, " ", kernel.name(), " K=", columns);
  const GemmTile tile = random_tile(random, kernel, columns);
  const ActivationRows rows = random_rows(random, row_counts.back(), columns, ordinary);
  const std::vector<float> alone = rows_alone(tile, table.kernels, rows);
  check_values(tile, rows, alone, num_checked, what);
  for (const int count : row_counts)
    check_together(tile, table.kernels, rows, alone, count, kTile * random.integer(1, 3), what);
}

// All of these; the scalar kernels, slow under sanitizers, take row after row, whatever their number.
std::vector<int> counts_for(const NamedTable& table, int first, int last) {
  if (table.name == "scalar") return {first, last};
  std::vector<int> counts(static_cast<size_t>(last - first + 1));
  std::iota(counts.begin(), counts.end(), first);
  return counts;
}

// Whole blocks, up to about `max`; anything where there are none.
int64_t some_columns(Random& random, const GemmKernel& kernel, int64_t max) {
  return kernel.block() * random.integer(1, std::max<int64_t>(1, max / kernel.block()));
}

// The same tile for the kernel of another path.
GemmTile with_path(const GemmTile& tile, Path path) {
  GemmTile made{{tile.kernel.type, path}, tile.columns, Exact<uint8_t>(tile.packed.size()), tile.values};
  std::memcpy(made.packed.data(), tile.packed.data(), tile.packed.size());
  return made;
}

}  // namespace

TEST(gemm_small_shapes_agree_with_double_and_with_rows_alone) {
  for (const NamedTable& table : tables())
    for (const GemmKernel& kernel : gemm_kernels())
      for (const int64_t columns : {std::max<int64_t>(kernel.block(), 32), std::max<int64_t>(3 * kernel.block(), 33),
                                    some_columns(random, kernel, 300)})
        check_kernel(random, kernel, table, columns, counts_for(table, 1, 17), 6);
}

TEST(gemm_full_ranges_agree_with_rows_alone) {
  for (const NamedTable& table : tables())
    for (const GemmKernel& kernel : gemm_kernels()) {
      std::vector<int> counts = counts_for(table, 33, 64);
      counts.insert(counts.end(), {127, 128});
      check_kernel(random, kernel, table, kernel.block(), counts, 1);
    }
}

TEST(gemm_long_rows_agree_with_double_and_with_rows_alone) {
  for (const NamedTable& table : tables())
    for (const GemmKernel& kernel : gemm_kernels())
      check_kernel(random, kernel, table, kernel.block() > 1 ? 2176 : 2177, {1, 2, 7}, 2);
}

// Decoding takes one path, prefill the other, and machines differ: they must not differ in a single bit.
TEST(gemm_is_the_same_packed_or_unpacked_and_in_every_table) {
  for (const GemmKernel& kernel : gemm_kernels()) {
    const int64_t columns = some_columns(random, kernel, 700);
    const GemmTile tile = random_tile(random, kernel, columns);
    const GemmTile packed = with_path(tile, kernel.path == Path::kUnpacked ? Path::kPacked : kernel.path);
    const ActivationRows rows = random_rows(random, 21, columns, ordinary);
    const std::vector<float> first = rows_together(packed, tables().front().kernels, rows);
    for (const auto& [name, kernels] : tables()) {
      const std::string what = join(name, " ", kernel.name(), " K=", columns);
      const std::vector<float> one = rows_alone(packed, kernels, rows);
      CHECK(same_bits(one, rows_together(tile, kernels, rows)), what, ": differs from packed");
      CHECK(!kernel.is_bit_identical() || same_bits(one, first), what, ": differs from the scalar table");
    }
  }
}

// Tiles are unpacked slab by slab, each continuing what the last one left in `out`.
TEST(gemm_in_slabs_is_the_same_as_in_one_piece) {
  for (const NamedTable& table : tables())
    for (const GemmKernel& kernel : gemm_kernels()) {
      if (!is_grouped(kernel.type) && kernel.type != PackedType::kF32) continue;
      const int64_t columns = kernel.block() > 1 ? 640 : 637;
      const int64_t unit = std::max<int64_t>(kernel.block() / kGroup, 1);
      const GemmTile tile = random_tile(random, kernel, columns);
      const ActivationRows rows = random_rows(random, 7, columns, ordinary);
      const std::vector<float> whole = rows_together(tile, table.kernels, rows);
      for (const int64_t slab : {unit, 3 * unit, int64_t{16}}) {
        const std::string what = join(table.name, " ", kernel.name(), " slabs of ", slab);
        CHECK(same_bits(whole, rows_together(tile, table.kernels, rows, slab)), what);
      }
      CHECK(same_bits(whole, rows_alone(tile, table.kernels, rows, 3 * unit)), table.name, " ", kernel.name());
    }
}

TEST(gemm_large_and_denormal_activations_agree_with_double) {
  for (const NamedTable& table : tables())
    for (const GemmKernel& kernel : gemm_kernels())
      for (const Draw draw : {huge, tiny, denormal}) {
        const int64_t columns = kernel.block() > 1 ? 128 : 75;
        const GemmTile tile = random_tile(random, kernel, columns);
        const ActivationRows rows = random_rows(random, 5, columns, draw);
        const std::vector<float> alone = rows_alone(tile, table.kernels, rows);
        const char* size = draw == huge ? " huge" : draw == tiny ? " tiny" : " denormal";
        check_values(tile, rows, alone, 5, join(table.name, " ", kernel.name(), size));
      }
}

// A value that is no number makes its whole row of an integer GEMM NaN, whatever the weights, and no other row.
TEST(gemm_poisoned_rows_are_nan_and_stay_alone) {
  for (const NamedTable& table : tables())
    for (const GemmKernel& kernel : gemm_kernels())
      for (const float odd : {INFINITY, -INFINITY, std::nanf(""), -3e38f}) {
        const int64_t columns = kernel.block() > 1 ? 256 : 77;
        const GemmTile tile = random_tile(random, kernel, columns);
        ActivationRows rows = random_rows(random, 9, columns, ordinary);
        const std::vector<float> before = rows_together(tile, table.kernels, rows);
        const int64_t poisoned = random.integer(0, 8);
        rows.f32[static_cast<size_t>(poisoned * columns + random.integer(0, columns - 1))] = odd;
        rows.fill_forms();
        const std::vector<float> after = rows_together(tile, table.kernels, rows);
        const std::string what = join(table.name, " ", kernel.name(), " ", odd, " in row ", poisoned);
        for (size_t i = 0; i < after.size(); ++i) {
          const bool here = static_cast<int64_t>(i / kTile) == poisoned;
          if (here && (kernel.reads_q8() || kernel.reads_i8())) CHECK(std::isnan(after[i]), what, " at ", i);
          if (!here) CHECK(std::memcmp(&before[i], &after[i], 4) == 0, what, " at ", i);
        }
      }
}

namespace {

bool has_mistake(const GemmKernel& kernel, Mistake mistake) {
  const PackedFormat format = packed_format(kernel.type);
  switch (mistake) {
    case Mistake::kZeroPoint:
    case Mistake::kNeighbour: return is_quantized(kernel.type);
    case Mistake::kHighDropped:
    case Mistake::kHighStep: return kernel.reads_q8();
    case Mistake::kMinimum: return format.minimum;
    case Mistake::kHalf: return format.group == 16;
    default: return true;
  }
}

bool accepts(const GemmTile& tile, const ActivationRows& rows, const std::vector<float>& got, Mistake mistake) {
  try {
    check_values(tile, rows, got, rows.num_rows, "", mistake);
  } catch (const Failure&) {
    return false;
  }
  return true;
}

}  // namespace

// What the bounds above are worth: the results of a kernel that made one of these mistakes are outside of them.
TEST(gemm_bounds_reject_planted_mistakes) {
  constexpr Mistake kMistakes[] = {Mistake::kZeroPoint, Mistake::kHighDropped, Mistake::kHighStep,
                                   Mistake::kMinimum,   Mistake::kHalf,        Mistake::kNeighbour};
  for (const GemmKernel& kernel : gemm_kernels()) {
    const KernelTable& kernels = tables().back().kernels;
    const int64_t columns = kernel.block() > 1 ? 512 : 160;
    const GemmTile tile = random_tile(random, kernel, columns);
    ActivationRows rows = random_rows(random, 1, columns, normal);
    const std::vector<float> got = rows_together(tile, kernels, rows);
    CHECK(accepts(tile, rows, got, Mistake::kNone), kernel.name());
    for (const Mistake mistake : kMistakes)
      CHECK(!has_mistake(kernel, mistake) || !accepts(tile, rows, got, mistake), kernel.name(), ": mistake ",
            static_cast<int>(mistake), " goes unnoticed");
    rows.f32[static_cast<size_t>(columns - 1)] += 0.05f;
    rows.fill_forms();
    CHECK(!accepts(tile, rows, got, Mistake::kNone), kernel.name(), ": one activation");
  }
}

}  // namespace llmserve::test
