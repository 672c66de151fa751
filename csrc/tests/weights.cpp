#include "tests/weights.h"

#include "tests/blocks.h"
#include "tests/numbers.h"

namespace llmserve::test {

namespace {

uint16_t read16(const uint8_t* place) { return static_cast<uint16_t>(place[0] | (place[1] << 8)); }

void fill_blocks(Random& random, DType dtype, Exact<uint8_t>& bytes) {
  for (size_t at = 0; at < bytes.size(); at += block_bytes(dtype)) {
    for (size_t i = 0; i < block_bytes(dtype); ++i) bytes[at + i] = static_cast<uint8_t>(random.bits());
    for (const size_t offset : half_offsets(dtype)) {
      const uint16_t half = random_half(random);
      std::memcpy(bytes.data() + at + offset, &half, 2);
    }
  }
}

// Bytes, then the channel's scale.
void fill_i8(Random& random, Weights& weights) {
  for (size_t i = 0; i < weights.bytes.size(); ++i) weights.bytes[i] = static_cast<uint8_t>(random.bits());
  const size_t stride = row_bytes(DType::kI8, weights.columns);
  for (size_t end = stride; end <= weights.bytes.size(); end += stride) {
    const float scale = random.uniform(0.001f, 0.02f);
    std::memcpy(weights.bytes.data() + end - 4, &scale, 4);
  }
}

float read_float(const uint8_t* place) {
  float value;
  std::memcpy(&value, place, 4);
  return value;
}

// Bit `i` of 64 bytes of codes, in planes that follow `bits`.
int plane_bits(const uint8_t* bits, int num_planes, int vector, int i) {
  int found = 0;
  for (int plane = 0; plane < num_planes; ++plane)
    found |= ((bits[plane * 256 + vector * 8 + i / 8] >> (i % 8)) & 1) << plane;
  return found;
}

// A code of one group of 32, before the codebook and without the zero point.
int packed_code(int bits, const uint8_t* codes, int channel, int k) {
  const int step = k / 4, at = channel * 4 + k % 4;
  if (bits == 8) return codes[step * 256 + at];
  const uint8_t line = codes[step % 4 * 256 + at];
  const int nibble = step < 4 ? line & 15 : line >> 4;
  return nibble + 16 * plane_bits(codes + 1024, bits - 4, step * 4 + at / 64, at % 64);
}

PackedValue packed_i8(const uint8_t* tile, int64_t columns, int channel, int64_t k) {
  PackedValue found;
  found.code = tile[k / 4 * 256 + channel * 4 + k % 4] - 128;
  found.scale = read_float(tile + (columns + 3) / 4 * 256 + channel * 4);
  found.value = found.scale * found.code;
  return found;
}

PackedValue packed_grouped(PackedFormat format, const uint8_t* tile, int channel, int64_t k) {
  const int width = std::max(format.group, 32), parts = format.group == 16 ? 2 : 1;
  const size_t code_bytes = format.bits == 8 ? 2048 : 1024 + 256 * static_cast<size_t>(format.bits - 4);
  const size_t all_codes = code_bytes * static_cast<size_t>(width / 32);
  const size_t table_bytes = 128 * static_cast<size_t>(parts);
  const uint8_t* block = tile + static_cast<size_t>(k / width) * (all_codes + table_bytes * (format.minimum ? 2 : 1));
  const uint8_t* codes = block + static_cast<size_t>(k % width / 32) * code_bytes;
  PackedValue found;
  found.code = packed_code(format.bits, codes, channel, static_cast<int>(k % 32));
  if (format.codebook)
    found.code = codebook_value(found.code);
  else if (!format.minimum)
    found.code -= 1 << format.zero_shift;
  const uint8_t* table = block + all_codes + (parts == 2 ? k % 32 / 16 * 128 : 0) + 2 * channel;
  found.scale = half_value(read16(table));
  found.minimum = format.minimum ? half_value(read16(table + table_bytes)) : 0.0;
  found.value = found.scale * found.code + found.minimum;
  return found;
}

}  // namespace

// Mostly ordinary, now and then zero, denormal or large.
uint16_t random_half(Random& random) {
  const auto fraction = static_cast<uint16_t>(random.integer(0, 1023));
  const auto sign = static_cast<uint16_t>(random.chance(0.3) ? 0x8000 : 0);
  if (random.chance(0.02)) return sign;
  if (random.chance(0.02)) return static_cast<uint16_t>(sign | fraction);
  const int64_t exponent = random.chance(0.01) ? 30 : random.integer(8, 14);
  return static_cast<uint16_t>(sign | exponent << 10 | fraction);
}

double Weights::value(int64_t row, int64_t column) const {
  const uint8_t* start = view().row(row);
  switch (dtype) {
    case DType::kF32: return read_float(start + column * 4);
    case DType::kF16: return half_value(read16(start + column * 2));
    case DType::kBF16: return bf16_value(read16(start + column * 2));
    case DType::kI8: return static_cast<double>(read_float(start + columns)) * static_cast<int8_t>(start[column]);
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
  if (dtype == DType::kI8) {
    fill_i8(random, weights);
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

PackedValue packed_value(PackedType type, const uint8_t* tile, int64_t columns, int channel, int64_t k) {
  PackedValue found;
  switch (type) {
    case PackedType::kF32: found.value = read_float(tile + (k * 64 + channel) * 4); return found;
    case PackedType::kBF16:
      found.value = bf16_value(read16(tile + ((k / 2) * 64 + channel) * 4 + (k % 2) * 2));
      return found;
    case PackedType::kI8: return packed_i8(tile, columns, channel, k);
    default: return packed_grouped(packed_format(type), tile, channel, k);
  }
}

}  // namespace llmserve::test
