#include "cpu/pack.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/grid.h"

namespace llmserve {

namespace {

// A row on its way into a tile.
struct RowBuffer {
  std::vector<uint8_t> codes;
  std::vector<float> scales, minimums, values;
  std::vector<uint16_t> rounded;
};

// Round to nearest even; what is too large becomes the largest half.
uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | (magnitude == 0x7F800000u ? 0x7C00u : 0x7BFFu));
  if (magnitude < 0x38800000u) {  // a denormal half counts 2^-24
    float scaled;
    std::memcpy(&scaled, &magnitude, 4);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(scaled * 0x1p24f)));
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13));
}

uint8_t codebook_index(uint8_t value) {
  uint8_t index = 0;
  while (index < 15 && kCodebook[index] != value) ++index;
  return index;
}

uint32_t four_codes(const uint8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, 4);
  return four;
}

// The 32 codes of one channel and group; nibble lines hold steps s and s + 4.
void pack_codes(const PackedFormat& format, const uint8_t* codes, int channel, uint8_t* out) {
  constexpr int kSteps = kGroup / 4;
  uint8_t* place = out + channel * 4;
  if (format.bits == 8) {
    for (int step = 0; step < kSteps; ++step) std::memcpy(place + step * kTile * 4, codes + step * 4, 4);
    return;
  }
  for (int step = 0; step < kSteps / 2; ++step) {
    const uint32_t low = four_codes(codes + step * 4), high = four_codes(codes + (step + kSteps / 2) * 4);
    const uint32_t line = (low & 0x0F0F0F0Fu) | (high & 0x0F0F0F0Fu) << 4;
    std::memcpy(place + step * kTile * 4, &line, 4);
  }
  for (int plane = 0; plane < format.bits - 4; ++plane) {
    uint8_t* bits = out + kNibbleBytes + static_cast<size_t>(plane) * kPlaneBytes;
    for (int k = 0; k < kGroup; ++k) {
      const int at = k / 4 * kTile * 4 + channel * 4 + k % 4;
      bits[at / 8] = static_cast<uint8_t>(bits[at / 8] | ((codes[k] >> (4 + plane)) & 1) << (at % 8));
    }
  }
}

void pack_table(const float* values, int count, int channel, uint8_t* out) {
  for (int part = 0; part < count; ++part) {
    const uint16_t half = to_f16(values[part]);
    std::memcpy(out + static_cast<size_t>(part) * kTableBytes + channel * 2, &half, 2);
  }
}

void pack_grouped_row(const PackedFormat& format, const TensorView& tensor, const uint8_t* row, int channel,
                      RowBuffer& buffer, uint8_t* block) {
  const int64_t columns = tensor.columns, width = block_columns(format);
  const int parts = block_parts(format), groups = block_groups(format);
  buffer.codes.resize(static_cast<size_t>(columns));
  buffer.scales.resize(static_cast<size_t>(columns / grid_spec(tensor.dtype).group));
  buffer.minimums.resize(buffer.scales.size());
  read_grid(tensor.dtype, row, columns, buffer.codes.data(), buffer.scales.data(), buffer.minimums.data());
  if (format.codebook)
    for (uint8_t& code : buffer.codes) code = codebook_index(code);
  const uint8_t* codes = buffer.codes.data();
  for (int64_t b = 0; b < columns / width; ++b, block += packed_block_bytes(format)) {
    uint8_t* place = block;
    for (int i = 0; i < groups; ++i, codes += kGroup, place += codes_bytes(format.bits))
      pack_codes(format, codes, channel, place);
    pack_table(buffer.scales.data() + b * parts, parts, channel, place);
    if (format.minimum)
      pack_table(buffer.minimums.data() + b * parts, parts, channel, place + static_cast<size_t>(parts) * kTableBytes);
  }
}

// Signed bytes become offset-128; the scale stands behind them in the checkpoint and behind the tile here.
void pack_i8_row(const uint8_t* row, int64_t columns, int channel, uint8_t* tile) {
  for (int64_t k = 0; k < columns; ++k)
    tile[k / 4 * kTile * 4 + channel * 4 + k % 4] = static_cast<uint8_t>(row[k] ^ 0x80);
  std::memcpy(tile + (columns + 3) / 4 * kTile * 4 + channel * 4, row + columns, 4);
}

}  // namespace

PackedType packed_type_of(DType dtype) {
  switch (dtype) {
    case DType::kQ4_0:
    case DType::kI4_G32: return PackedType::kQ4_0;
    case DType::kQ4_1:
    case DType::kQ4_K:
    case DType::kU4_G32: return PackedType::kQ4_1;
    case DType::kI4_G64: return PackedType::kQ4_G64;
    case DType::kU4_G64: return PackedType::kQ4_G64M;
    case DType::kI4_G128: return PackedType::kQ4_G128;
    case DType::kU4_G128: return PackedType::kQ4_G128M;
    case DType::kIQ4_NL:
    case DType::kIQ4_XS: return PackedType::kQ4_NL;
    case DType::kQ5_0: return PackedType::kQ5_0;
    case DType::kQ5_1:
    case DType::kQ5_K: return PackedType::kQ5_1;
    case DType::kQ2_K: return PackedType::kQ2_K;
    case DType::kQ3_K: return PackedType::kQ3_K;
    case DType::kQ6_K: return PackedType::kQ6_K;
    case DType::kQ8_0: return PackedType::kQ8_0;
    case DType::kI8: return PackedType::kI8;
    default: return PackedType::kBF16;
  }
}

void PackedMatrix::check() const {
  if (tensors.empty() || sources.empty()) throw std::invalid_argument("matrix: nothing to pack");
  if (columns <= 0) throw std::invalid_argument("matrix: it has no columns");
  if (is_grouped(type) && columns % block_columns(packed_format(type)) != 0)
    throw std::invalid_argument(
        std::string("matrix: ") + std::to_string(columns) + " columns are not whole blocks of " +
        std::to_string(block_columns(packed_format(type))) + ", as " + packed_name(type) + " has them");
  for (const TensorView& tensor : tensors) {
    if (tensor.columns != columns) throw std::invalid_argument("matrix: its tensors differ in columns");
    if (packed_type_of(tensor.dtype) != type && (is_quantized(type) || block_values(tensor.dtype) != 1))
      throw std::invalid_argument(std::string("matrix: cannot pack ") + dtype_name(tensor.dtype) + " into " +
                                  packed_name(type));
  }
  for (const TileSource& source : sources) {
    if (source.tensor < 0 || source.tensor >= static_cast<int>(tensors.size()))
      throw std::invalid_argument("matrix: a tile names an unknown tensor");
    const TensorView& tensor = tensors[static_cast<size_t>(source.tensor)];
    if (source.row < 0 || source.num_rows < 0 || source.num_rows > kTile || source.row + source.num_rows > tensor.rows)
      throw std::invalid_argument("matrix: a tile's rows are out of range");
  }
}

void PackedMatrix::pack_tile(int index, const KernelTable& kernels) const {
  const TileSource& source = sources[static_cast<size_t>(index)];
  const TensorView& tensor = tensors[static_cast<size_t>(source.tensor)];
  uint8_t* out = data + static_cast<size_t>(index) * bytes_per_tile();
  RowBuffer buffer;
  for (int channel = 0; channel < source.num_rows; ++channel) {
    const uint8_t* row = tensor.row(source.row + channel);
    if (is_grouped(type)) {
      pack_grouped_row(packed_format(type), tensor, row, channel, buffer, out);
      continue;
    }
    if (type == PackedType::kI8) {
      pack_i8_row(row, columns, channel, out);
      continue;
    }
    buffer.values.resize(static_cast<size_t>(columns));
    kernels.dequantize(tensor.dtype, row, buffer.values.data(), columns);
    if (type == PackedType::kF32) {
      auto* floats = reinterpret_cast<float*>(out);
      for (int64_t k = 0; k < columns; ++k) floats[k * kTile + channel] = buffer.values[static_cast<size_t>(k)];
      continue;
    }
    buffer.rounded.resize(buffer.values.size());
    kernels.round_bf16(buffer.values.data(), buffer.rounded.data(), columns);
    auto* pairs = reinterpret_cast<uint16_t*>(out);
    for (int64_t k = 0; k < columns; ++k)
      pairs[(k / 2) * 2 * kTile + 2 * channel + k % 2] = buffer.rounded[static_cast<size_t>(k)];
  }
}

}  // namespace llmserve
