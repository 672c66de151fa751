// Packing, unpacking and the row dequantizer, for every stored type.
#include <vector>

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
    if (from == DType::kQ4_0)
      found.push_back({from, PackedType::kQ4_0});
    else if (from == DType::kQ4_1)
      found.push_back({from, PackedType::kQ4_1});
    else if (from == DType::kQ8_0)
      found.push_back({from, PackedType::kQ8_0});
    else
      found.insert(found.end(), {{from, PackedType::kBF16}, {from, PackedType::kF32}});
  }
  return found;
}

// A random number of columns that rows of this type can have.
int64_t some_columns(Random& random, DType dtype, int64_t max) {
  return block_values(dtype) * random.integer(1, max / block_values(dtype) + 1);
}

void check_tile(const Weights& weights, PackedType type, const PackedTile& tile, int row, int num_rows) {
  const std::string what = join(dtype_name(weights.dtype), " K=", weights.columns, " rows=", num_rows);
  for (int channel = 0; channel < 64; ++channel)
    for (int64_t k = 0; k < weights.columns; ++k) {
      const PackedValue packed = packed_value(type, tile.bytes.data(), channel, k);
      double expected = channel < num_rows ? weights.value(row + channel, k) : 0.0;
      if (type == PackedType::kF32) expected = static_cast<float>(expected);  // the sum with a minimum rounds
      if (type == PackedType::kBF16) expected = bf16_value(nearest_bf16(static_cast<float>(expected)));
      const double got = channel < num_rows ? packed.value : packed.scale * packed.code + packed.minimum;
      CHECK(got == expected, what, " channel ", channel, " k ", k, ": ", got, " for ", expected);
    }
}

}  // namespace

TEST(pack_holds_the_rows_of_every_type_and_zeros_past_them) {
  for (const auto& [table, kernels] : tables())
    for (const auto& [from, to] : pairings())
      for (const int num_rows : {64, 63, 17, 1}) {
        const int64_t columns = some_columns(random, from, 195);
        const int32_t row = static_cast<int32_t>(random.integer(0, 3));
        const Weights weights = random_weights(random, from, row + num_rows + 1, columns);
        const PackedTile tile = pack_tile(weights, to, row, num_rows, kernels);
        check_tile(weights, to, tile, row, num_rows);
        if (to == PackedType::kBF16 && columns % 2 == 1)
          for (int channel = 0; channel < 64; ++channel)
            CHECK(packed_value(to, tile.bytes.data(), channel, columns).value == 0.0, table, " past an odd K");
      }
}

TEST(pack_unpack_q4_is_the_same_in_every_table) {
  for (const bool minimum : {false, true}) {
    const int64_t groups = random.integer(1, 6);
    const auto type = minimum ? PackedType::kQ4_1 : PackedType::kQ4_0;
    const Weights weights = random_weights(random, minimum ? DType::kQ4_1 : DType::kQ4_0, 64, groups * 32);
    const PackedTile tile = pack_tile(weights, type, 0, 64, tables().front().kernels);
    for (const auto& [name, kernels] : tables()) {
      Guarded<uint8_t> out(static_cast<size_t>(groups) * unpacked_group_bytes(minimum));
      kernels.unpack_q4(tile.bytes.data(), out.data(), groups, minimum);
      out.check_zones(name);
      for (int64_t k = 0; k < groups * 32; ++k)
        for (int channel = 0; channel < 64; ++channel) {
          const size_t group = static_cast<size_t>(k / 32) * unpacked_group_bytes(minimum);
          const int code =
              out[group + static_cast<size_t>(k % 32 / 4) * 256 + static_cast<size_t>(channel * 4 + k % 4)];
          const int expected = packed_value(type, tile.bytes.data(), channel, k).code + (minimum ? 0 : 8);
          CHECK(code == expected, name, " channel ", channel, " k ", k);
        }
      for (int64_t g = 0; g < groups; ++g)
        CHECK(std::memcmp(out.data() + static_cast<size_t>(g) * unpacked_group_bytes(minimum) + kByteBytes,
                          tile.bytes.data() + static_cast<size_t>(g) * group_bytes(type) + kNibbleBytes,
                          kTableBytes * (minimum ? 2 : 1)) == 0,
              name, " tables of group ", g);
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
  CHECK_THROWS(std::invalid_argument, pack_tile(weights, PackedType::kQ4_1, 0, 8, kernels));
  CHECK_THROWS(std::invalid_argument, pack_tile(weights, PackedType::kBF16, 0, 8, kernels));
  CHECK_THROWS(std::invalid_argument, pack_tile(weights, PackedType::kQ4_0, 1, 8, kernels));
  CHECK_THROWS(std::invalid_argument, pack_tile(weights, PackedType::kQ4_0, -1, 4, kernels));
  CHECK_THROWS(std::invalid_argument, pack_tile(weights, PackedType::kQ4_0, 0, 65, kernels));
}

}  // namespace llmserve::test
