// Rows as codes, scales and minimums, against the formats' definition and the row dequantizer.
#include "cpu/grid.h"
#include "tests/tables.h"
#include "tests/weights.h"

namespace llmserve::test {

namespace {

struct Grid {
  explicit Grid(const Weights& weights, int64_t row)
      : spec(grid_spec(weights.dtype)),
        codes(static_cast<size_t>(weights.columns)),
        scales(static_cast<size_t>(weights.columns / spec.group)),
        minimums(scales.size()) {
    read_grid(weights.dtype, weights.view().row(row), weights.columns, codes.data(), scales.data(), minimums.data());
    codes.check_zones("codes");
    scales.check_zones("scales");
    minimums.check_zones("minimums");
  }

  GridSpec spec;
  Guarded<uint8_t> codes;
  Guarded<float> scales, minimums;
};

}  // namespace

TEST(grid_is_exact_and_rounds_once_to_what_every_table_dequantizes) {
  for (const DType dtype : kDTypes) {
    if (grid_spec(dtype).group == 0) continue;
    const int64_t columns = block_values(dtype) * random.integer(1, 4);
    const Weights weights = random_weights(random, dtype, 3, columns);
    for (int64_t row = 0; row < 3; ++row) {
      const Grid grid(weights, row);
      for (int64_t k = 0; k < columns; ++k) {
        const auto g = static_cast<size_t>(k / grid.spec.group);
        const double code = grid.codes[static_cast<size_t>(k)] - grid.spec.zero_point;
        const double value = static_cast<double>(grid.scales[g]) * code + static_cast<double>(grid.minimums[g]);
        const double expected = weights.value(row, k);
        CHECK(value == expected, dtype_name(dtype), " k ", k, ": ", value, " for ", expected);
        CHECK(grid.codes[static_cast<size_t>(k)] < 1 << grid.spec.bits, dtype_name(dtype), " k ", k);
        CHECK(grid.spec.minimum || grid.minimums[g] == 0.0f, dtype_name(dtype), " k ", k);
      }
      for (const auto& [name, kernels] : tables()) {
        Guarded<float> out(static_cast<size_t>(columns));
        kernels.dequantize(dtype, weights.view().row(row), out.data(), columns);
        for (size_t k = 0; k < out.size(); ++k) {
          const size_t g = k / static_cast<size_t>(grid.spec.group);
          const float product = grid.scales[g] * static_cast<float>(grid.codes[k] - grid.spec.zero_point);
          CHECK(out[k] == product + grid.minimums[g], name, " ", dtype_name(dtype), " k ", k);
        }
      }
    }
  }
}

// Every code that a type can have occurs, so `bits` and `zero_point` are not larger than they need be.
TEST(grid_uses_the_whole_range_of_its_codes) {
  for (const DType dtype : kDTypes) {
    const GridSpec spec = grid_spec(dtype);
    if (spec.group == 0) continue;
    const Weights weights = random_weights(random, dtype, 1, 256 * 40);
    const Grid grid(weights, 0);
    int smallest = 255, largest = 0;
    for (size_t k = 0; k < grid.codes.size(); ++k) {
      smallest = grid.codes[k] < smallest ? grid.codes[k] : smallest;
      largest = grid.codes[k] > largest ? grid.codes[k] : largest;
    }
    const bool codebook = dtype == DType::kIQ4_NL || dtype == DType::kIQ4_XS;
    CHECK(smallest == (codebook ? 1 : 0), dtype_name(dtype));
    CHECK(largest == (codebook ? 241 : (1 << spec.bits) - 1), dtype_name(dtype));
  }
}

TEST(grid_plain_types_have_none) {
  for (const DType dtype : kDTypes) CHECK((grid_spec(dtype).group == 0) == (block_values(dtype) == 1));
}

}  // namespace llmserve::test
