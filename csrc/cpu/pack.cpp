#include "cpu/pack.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace llmserve {

namespace {

// Types without a packed form of their own are packed as their float values.
bool has_own_form(DType type) { return type == DType::kQ4_0 || type == DType::kQ4_1 || type == DType::kQ8_0; }

bool can_pack(DType from, PackedType to) {
  switch (to) {
    case PackedType::kQ4_0: return from == DType::kQ4_0;
    case PackedType::kQ4_1: return from == DType::kQ4_1;
    case PackedType::kQ8_0: return from == DType::kQ8_0;
    default: return !has_own_form(from);
  }
}

// One row of blocks: header, then 16 bytes whose low nibbles are k 0..15 and high nibbles k 16..31. That is the order
// of the packed line too (low = steps 0..3, high = steps 4..7), so four bytes move at a time.
void pack_nibble_row(const uint8_t* row, size_t header, int channel, int64_t groups, uint8_t* tile, size_t stride) {
  for (int64_t g = 0; g < groups; ++g, row += header + 16, tile += stride) {
    for (int step = 0; step < 4; ++step)
      std::memcpy(tile + step * 256 + channel * 4, row + header + static_cast<size_t>(step) * 4, 4);
    std::memcpy(tile + kNibbleBytes + channel * 2, row, 2);
    if (header == 4) std::memcpy(tile + kNibbleBytes + kTableBytes + channel * 2, row + 2, 2);
  }
}

void pack_byte_row(const uint8_t* row, int channel, int64_t groups, uint8_t* tile, size_t stride) {
  for (int64_t g = 0; g < groups; ++g, row += 34, tile += stride) {
    for (int step = 0; step < 8; ++step) {
      uint32_t four;
      std::memcpy(&four, row + 2 + step * 4, 4);
      four ^= 0x80808080u;  // signed to offset-128
      std::memcpy(tile + step * 256 + channel * 4, &four, 4);
    }
    std::memcpy(tile + kByteBytes + channel * 2, row, 2);
  }
}

}  // namespace

void PackedMatrix::check() const {
  if (tensors.empty() || sources.empty()) throw std::invalid_argument("matrix: nothing to pack");
  for (const TensorView& tensor : tensors) {
    if (tensor.columns != columns) throw std::invalid_argument("matrix: its tensors differ in columns");
    if (!can_pack(tensor.dtype, type))
      throw std::invalid_argument(std::string("matrix: cannot pack ") + dtype_name(tensor.dtype) + " into this type");
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
  const int64_t groups = columns / kGroup;
  std::vector<float> values;
  std::vector<uint16_t> rounded;
  if (!is_quantized(type)) values.resize(static_cast<size_t>(columns) + 1);
  if (type == PackedType::kBF16) rounded.resize(values.size());
  for (int channel = 0; channel < source.num_rows; ++channel) {
    const uint8_t* row = tensor.row(source.row + channel);
    switch (type) {
      case PackedType::kQ4_0: pack_nibble_row(row, 2, channel, groups, out, group_bytes(type)); break;
      case PackedType::kQ4_1: pack_nibble_row(row, 4, channel, groups, out, group_bytes(type)); break;
      case PackedType::kQ8_0: pack_byte_row(row, channel, groups, out, group_bytes(type)); break;
      case PackedType::kBF16: {
        kernels.dequantize(tensor.dtype, row, values.data(), columns);
        kernels.round_bf16(values.data(), rounded.data(), columns);
        auto* pairs = reinterpret_cast<uint16_t*>(out);
        for (int64_t k = 0; k < columns; ++k)
          pairs[(k / 2) * 2 * kTile + 2 * channel + k % 2] = rounded[static_cast<size_t>(k)];
        break;
      }
      case PackedType::kF32: {
        kernels.dequantize(tensor.dtype, row, values.data(), columns);
        auto* floats = reinterpret_cast<float*>(out);
        for (int64_t k = 0; k < columns; ++k) floats[k * kTile + channel] = values[static_cast<size_t>(k)];
        break;
      }
    }
  }
}

}  // namespace llmserve
