#include "tests/weights.h"

#include "tests/blocks.h"
#include "tests/numbers.h"

namespace llmserve::test {

namespace {

uint16_t read16(const uint8_t* place) { return static_cast<uint16_t>(place[0] | (place[1] << 8)); }

// Mostly ordinary, now and then zero, denormal or large.
uint16_t random_half(Random& random) {
  const auto fraction = static_cast<uint16_t>(random.integer(0, 1023));
  const auto sign = static_cast<uint16_t>(random.chance(0.3) ? 0x8000 : 0);
  if (random.chance(0.02)) return sign;
  if (random.chance(0.02)) return static_cast<uint16_t>(sign | fraction);
  const int64_t exponent = random.chance(0.01) ? 30 : random.integer(8, 14);
  return static_cast<uint16_t>(sign | exponent << 10 | fraction);
}

void fill_blocks(Random& random, DType dtype, Exact<uint8_t>& bytes) {
  for (size_t at = 0; at < bytes.size(); at += block_bytes(dtype)) {
    for (size_t i = 0; i < block_bytes(dtype); ++i) bytes[at + i] = static_cast<uint8_t>(random.bits());
    for (const size_t offset : half_offsets(dtype)) {
      const uint16_t half = random_half(random);
      std::memcpy(bytes.data() + at + offset, &half, 2);
    }
  }
}

}  // namespace

double Weights::value(int64_t row, int64_t column) const {
  const uint8_t* start = view().row(row);
  switch (dtype) {
    case DType::kF32: {
      float value;
      std::memcpy(&value, start + column * 4, 4);
      return value;
    }
    case DType::kF16: return half_value(read16(start + column * 2));
    case DType::kBF16: return bf16_value(read16(start + column * 2));
    default: break;
  }
  const int values = block_values(dtype);
  const uint8_t* block = start + static_cast<size_t>(column / values) * block_bytes(dtype);
  return block_value(dtype, block, static_cast<int>(column % values));
}

Weights random_weights(Random& random, DType dtype, int64_t rows, int64_t columns) {
  Weights weights{dtype, rows, columns, Exact<uint8_t>(static_cast<size_t>(rows) * row_bytes(dtype, columns))};
  if (block_values(dtype) != 1) {
    fill_blocks(random, dtype, weights.bytes);
    return weights;
  }
  const size_t size = block_bytes(dtype);
  for (size_t at = 0; at < weights.bytes.size(); at += size) {
    const float value = random.chance(0.02) ? 0.0f : random.normal() * (random.chance(0.01) ? 1e4f : 1.0f);
    const uint16_t half = dtype == DType::kF16 ? random_half(random) : nearest_bf16(value);
    std::memcpy(weights.bytes.data() + at, dtype == DType::kF32 ? static_cast<const void*>(&value) : &half, size);
  }
  return weights;
}

PackedTile pack_tile(const Weights& weights, PackedType type, int32_t row, int32_t num_rows,
                     const KernelTable& kernels) {
  PackedTile tile;
  tile.matrix.type = type;
  tile.matrix.columns = weights.columns;
  tile.matrix.tensors.push_back(weights.view());
  tile.matrix.sources.push_back({0, row, num_rows});
  tile.matrix.check();
  tile.bytes = Exact<uint8_t>(tile.matrix.bytes_per_tile());
  tile.matrix.data = tile.bytes.data();
  tile.matrix.pack_tile(0, kernels);
  return tile;
}

PackedValue packed_value(PackedType type, const uint8_t* tile, int channel, int64_t k) {
  PackedValue found;
  if (type == PackedType::kF32) {
    float value;
    std::memcpy(&value, tile + (k * 64 + channel) * 4, 4);
    found.value = value;
    return found;
  }
  if (type == PackedType::kBF16) {
    found.value = bf16_value(read16(tile + ((k / 2) * 64 + channel) * 4 + (k % 2) * 2));
    return found;
  }
  const uint8_t* group = tile + static_cast<size_t>(k / 32) * group_bytes(type);
  const int step = static_cast<int>(k % 32) / 4, offset = channel * 4 + static_cast<int>(k % 4);
  if (type == PackedType::kQ8_0)
    found.code = group[step * 256 + offset] - 128;
  else
    found.code = (step < 4 ? group[step * 256 + offset] & 15 : group[(step - 4) * 256 + offset] >> 4) -
                 (type == PackedType::kQ4_0 ? 8 : 0);
  const uint8_t* table = group + codes_bytes(type) + 2 * channel;
  found.scale = half_value(read16(table));
  found.minimum = type == PackedType::kQ4_1 ? half_value(read16(table + 128)) : 0.0;
  found.value = found.scale * found.code + found.minimum;
  return found;
}

}  // namespace llmserve::test
