// Packing, unpacking and the row dequantizer, for every stored type.
#include <vector>

#include "cpu/grid.h"
#include "tests/numbers.h"
#include "tests/tables.h"
#include "tests/weights.h"

namespace llmserve::test {

namespace {

struct Pairing {
  DType from;
  PackedType to;
};
std::vector<Pairing> pairings() {
  std::vector<Pairing> found;
  for (const DType from : kDTypes) {
    const PackedType own = packed_type_of(from);
    if (own != PackedType::kBF16) found.push_back({from, own});
    if (block_values(from) == 1) found.insert(found.end(), {{from, PackedType::kBF16}, {from, PackedType::kF32}});
  }
  return found;
}

// A random number of columns that rows of this type can have.
int64_t some_columns(Random& random, DType dtype, int64_t max) {
  return block_values(dtype) * random.integer(1, max / block_values(dtype) + 1);
}

// Types whose scales are products: they are rounded to halves, those of the others are halves.
bool has_products(DType dtype) { return block_values(dtype) == 256; }

// Of a half that stands for `value`.
double half_error(double value) { return std::max(0x1p-11 * std::fabs(value), 0x1p-25); }

// A row's scales and minimums (grid.h) and what packing should have made of them.
class ExpectedRow {
 public:
  ExpectedRow(const Weights& weights, int64_t row)
      : weights_(weights),
        row_(row),
        spec_(grid_spec(weights.dtype)),
        codes_(static_cast<size_t>(weights.columns)),
        scales_(static_cast<size_t>(weights.columns / spec_.group)),
        minimums_(scales_.size()) {
    read_grid(weights.dtype, weights.view().row(row), weights.columns, codes_.data(), scales_.data(), minimums_.data());
  }

  void check(const PackedValue& packed, int64_t k, const std::string& what) const {
    const auto group = static_cast<size_t>(k / spec_.group);
    const double scale = scales_[group], minimum = minimums_[group];
    CHECK(packed.code == codes_[static_cast<size_t>(k)] - spec_.zero_point, what);
    CHECK(packed.scale == nearest_half(scale), what, " scale ", packed.scale, " for ", scale);
    CHECK(packed.minimum == nearest_half(minimum), what, " minimum ", packed.minimum, " for ", minimum);
    const double expected = weights_.value(row_, k);
    if (!has_products(weights_.dtype)) CHECK(packed.value == expected, what, ": ", packed.value, " for ", expected);
    if (std::fabs(scale) >= 65504.0 || std::fabs(minimum) >= 65504.0) return;
    const double bound = std::abs(packed.code) * half_error(scale) + (spec_.minimum ? half_error(minimum) : 0.0);
    CHECK(std::fabs(packed.value - expected) <= bound, what, ": ", packed.value, " for ", expected);
  }

 private:
  const Weights& weights_;
  int64_t row_;
  GridSpec spec_;
  std::vector<uint8_t> codes_;
  std::vector<float> scales_, minimums_;
};

void check_grouped(const Weights& weights, PackedType type, const PackedTile& tile, int row, int num_rows) {
  for (int channel = 0; channel < num_rows; ++channel) {
    const ExpectedRow expected(weights, row + channel);
    for (int64_t k = 0; k < weights.columns; ++k)
      expected.check(packed_value(type, tile.bytes.data(), weights.columns, channel, k), k,
                     join(dtype_name(weights.dtype), " channel ", channel, " k ", k));
  }
}

void check_plain(const Weights& weights, PackedType type, const PackedTile& tile, int row, int num_rows) {
  for (int channel = 0; channel < num_rows; ++channel)
    for (int64_t k = 0; k < weights.columns; ++k) {
      double expected = weights.value(row + channel, k);
      if (type == PackedType::kF32) expected = static_cast<float>(expected);
      if (type == PackedType::kBF16) expected = bf16_value(nearest_bf16(static_cast<float>(expected)));
      const double got = packed_value(type, tile.bytes.data(), weights.columns, channel, k).value;
      CHECK(got == expected, dtype_name(weights.dtype), " as ", packed_name(type), " channel ", channel, " k ", k, ": ",
            got, " for ", expected);
    }
}

// Codes without a scale and a minimum are zeros whatever they are.
void check_zeros(const Weights& weights, PackedType type, const PackedTile& tile, int num_rows) {
  for (int channel = num_rows; channel < kTile; ++channel)
    for (int64_t k = 0; k < weights.columns; ++k)
      CHECK(packed_value(type, tile.bytes.data(), weights.columns, channel, k).value == 0.0, dtype_name(weights.dtype),
            " channel ", channel, " past the rows, k ", k);
}

PackedTile pack_random(Random& random, DType from, PackedType to, int64_t columns) {
  const Weights weights = random_weights(random, from, kTile, columns);
  return pack_tile(weights, to, 0, kTile, tables().front().kernels);
}

}  // namespace

TEST(pack_holds_the_rows_of_every_type_and_zeros_past_them) {
  for (const auto& [from, to] : pairings())
    for (const int num_rows : {64, 17, 1}) {
      const int64_t columns = some_columns(random, from, 195);
      const int32_t row = static_cast<int32_t>(random.integer(0, 3));
      const Weights weights = random_weights(random, from, row + num_rows + 1, columns);
      const PackedTile tile = pack_tile(weights, to, row, num_rows, tables().front().kernels);
      is_grouped(to) ? check_grouped(weights, to, tile, row, num_rows) : check_plain(weights, to, tile, row, num_rows);
      check_zeros(weights, to, tile, num_rows);
      if (to == PackedType::kBF16 && columns % 2 == 1)
        for (int channel = 0; channel < kTile; ++channel)
          CHECK(packed_value(to, tile.bytes.data(), columns, channel, columns).value == 0.0, "past an odd K");
      if (to == PackedType::kI8)
        for (int64_t k = columns; k % 4 != 0; ++k)
          CHECK(packed_value(to, tile.bytes.data(), columns, 0, k).code == -128, "past K stand zero bytes");
    }
}

// Plain types go through the kernels of the table.
TEST(pack_makes_the_same_bytes_by_every_table) {
  for (const auto& [from, to] : pairings()) {
    const Weights weights = random_weights(random, from, 64, some_columns(random, from, 195));
    const PackedTile first = pack_tile(weights, to, 0, 64, tables().front().kernels);
    for (const auto& [name, kernels] : tables()) {
      const PackedTile tile = pack_tile(weights, to, 0, 64, kernels);
      CHECK(std::memcmp(first.bytes.data(), tile.bytes.data(), first.bytes.size()) == 0, name, " ", dtype_name(from));
    }
  }
}

// A super-block's scales multiply past the halves, or below them; what is not finite stays so.
TEST(pack_keeps_scales_past_the_range_of_halves) {
  for (const uint16_t half : {0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x0001}) {
    Weights weights = random_weights(random, DType::kQ6_K, 1, 256);
    std::memcpy(weights.bytes.data() + 208, &half, 2);
    const PackedTile tile = pack_tile(weights, PackedType::kQ6_K, 0, 1, tables().front().kernels);
    for (int64_t k = 0; k < 256; k += 16) {
      const double product = half_value(half) * static_cast<int8_t>(weights.bytes[192 + static_cast<size_t>(k) / 16]);
      const double got = packed_value(PackedType::kQ6_K, tile.bytes.data(), 256, 0, k).scale;
      if (std::isfinite(product))
        CHECK(got == nearest_half(product), got, " for ", product);
      else
        CHECK(!std::isfinite(got) && std::isnan(got) == std::isnan(product), got, " for ", product);
    }
  }
}

TEST(pack_unpack_gives_the_codes_as_bytes_in_every_table) {
  for (const auto& [from, to] : pairings()) {
    const PackedFormat format = packed_format(to);
    if (!is_grouped(to) || format.bits == 8) continue;  // bytes are what they are
    const int64_t columns = some_columns(random, from, 300), groups = columns / kGroup;
    const PackedTile tile = pack_random(random, from, to, columns);
    const size_t width = static_cast<size_t>(block_columns(format)) / kGroup, tables_size = tables_bytes(format);
    const size_t bytes = width * 2048 + tables_size;
    for (const auto& [name, kernels] : tables()) {
      Guarded<uint8_t> out(static_cast<size_t>(groups) / width * bytes);
      kernels.unpack(to, tile.bytes.data(), groups, out.data());
      const std::string what = join(name, " ", packed_name(to));
      out.check_zones(what);
      for (int64_t k = 0; k < columns; ++k)
        for (int channel = 0; channel < kTile; ++channel) {
          const auto group = static_cast<size_t>(k / kGroup);
          const size_t codes = group / width * bytes + group % width * 2048;
          const int code = out[codes + static_cast<size_t>(k % 32 / 4 * 256 + channel * 4 + k % 4)];
          const PackedValue packed = packed_value(to, tile.bytes.data(), columns, channel, k);
          const int zero = format.codebook ? 128 : zero_point(format);
          CHECK(code - zero == packed.code, what, " channel ", channel, " k ", k);
        }
      for (size_t block = 0; block < static_cast<size_t>(groups) / width; ++block)
        CHECK(std::memcmp(out.data() + (block + 1) * bytes - tables_size,
                          tile.bytes.data() + (block + 1) * packed_block_bytes(format) - tables_size, tables_size) == 0,
              what, " tables of block ", block);
    }
  }
}

TEST(pack_dequantize_tile_rounds_once_and_is_the_same_in_every_table) {
  for (const auto& [from, to] : pairings()) {
    if (!is_grouped(to)) continue;
    const int64_t columns = some_columns(random, from, 300);
    const PackedTile tile = pack_random(random, from, to, columns);
    std::vector<float> first;
    for (const auto& [name, kernels] : tables()) {
      Guarded<float> out(static_cast<size_t>(columns) * kTile);
      kernels.dequantize_tile(to, tile.bytes.data(), columns / kGroup, out.data());
      const std::string what = join(name, " ", packed_name(to));
      out.check_zones(what);
      if (first.empty()) first.assign(out.data(), out.data() + out.size());
      CHECK(std::memcmp(first.data(), out.data(), first.size() * sizeof(float)) == 0, what);
    }
    for (int64_t k = 0; k < columns; ++k)
      for (int channel = 0; channel < kTile; ++channel) {
        const double expected = packed_value(to, tile.bytes.data(), columns, channel, k).value;
        const float got = first[static_cast<size_t>(k * kTile + channel)];
        CHECK(got == static_cast<float>(expected), packed_name(to), " channel ", channel, " k ", k, ": ", got);
      }
  }
}

TEST(pack_dequantize_rows_of_every_type) {
  for (const auto& [name, kernels] : tables())
    for (const DType dtype : kDTypes) {
      const int64_t columns = some_columns(random, dtype, 131);
      const Weights weights = random_weights(random, dtype, 3, columns);
      for (int64_t row = 0; row < 3; ++row) {
        Guarded<float> out(static_cast<size_t>(columns));
        kernels.dequantize(dtype, weights.view().row(row), out.data(), columns);
        out.check_zones(name);
        for (int64_t k = 0; k < columns; ++k) {
          // One rounding for d * code + m; the products of a half and a small integer are exact.
          const double expected = weights.value(row, k);
          const double error = std::fabs(static_cast<double>(out[static_cast<size_t>(k)]) - expected);
          CHECK(error <= kEpsilon * std::fabs(expected), name, " ", dtype_name(dtype), " k ", k, ": ", expected);
        }
      }
    }
}

TEST(pack_refuses_what_does_not_fit) {
  const Weights weights = random_weights(random, DType::kQ4_0, 8, 64);
  const KernelTable& kernels = tables().front().kernels;
  CHECK_THROWS(std::invalid_argument, pack_tile(weights, PackedType::kQ4_0, 1, 8, kernels));
  CHECK_THROWS(std::invalid_argument, pack_tile(weights, PackedType::kQ4_0, -1, 4, kernels));
  CHECK_THROWS(std::invalid_argument, pack_tile(weights, PackedType::kQ4_0, 0, 65, kernels));
}

// Every type goes into its own packed type, plain ones into the two float types, and nothing else does.
TEST(pack_refuses_types_that_do_not_fit) {
  for (const DType from : kDTypes)
    for (int i = 0; i < kNumPackedTypes; ++i) {
      const auto to = static_cast<PackedType>(i);
      const Weights weights = random_weights(random, from, 2, 256);
      PackedMatrix matrix{to, 256, {weights.view()}, {{0, 0, 2}}, nullptr};
      const bool is_float = to == PackedType::kBF16 || to == PackedType::kF32;
      const bool fits = packed_type_of(from) == to || (is_float && block_values(from) == 1);
      bool refused = false;
      try {
        matrix.check();
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      CHECK(refused == !fits, dtype_name(from), " into ", packed_name(to));
    }
}

// A tile is whole blocks: the rest of a row would not be packed, and GEMM would read past the tile.
TEST(pack_refuses_rows_that_end_inside_a_block) {
  for (const DType from : kDTypes) {
    const PackedType to = packed_type_of(from);
    const int64_t block = is_grouped(to) ? block_columns(packed_format(to)) : 1;
    const Exact<uint8_t> bytes(4096);
    for (const int64_t columns : {block, block + 1, block + block / 2, 2 * block - 1, 2 * block}) {
      PackedMatrix matrix{to, columns, {{bytes.data(), from, 1, columns}}, {{0, 0, 1}}, nullptr};
      if (columns % block == 0)
        matrix.check();
      else
        CHECK_THROWS(std::invalid_argument, matrix.check());
    }
    PackedMatrix empty{to, 0, {{bytes.data(), from, 1, 0}}, {{0, 0, 1}}, nullptr};
    CHECK_THROWS(std::invalid_argument, empty.check());
  }
}

}  // namespace llmserve::test
