#include "tests/gemm_case.h"

#include "cpu/value.h"
#include "tests/numbers.h"

namespace llmserve::test {

namespace {

void fill_tables(Random& random, PackedType type, Exact<uint8_t>& bytes) {
  const PackedFormat format = packed_format(type);
  const size_t block = packed_block_bytes(format), tables = tables_bytes(format);
  for (size_t end = block; end <= bytes.size(); end += block)
    for (size_t at = end - tables; at < end; at += 2) {
      const uint16_t half = random_half(random);
      std::memcpy(bytes.data() + at, &half, 2);
    }
}

void fill_floats(Random& random, uint8_t* bytes, size_t count, float scale) {
  for (size_t i = 0; i < count; ++i) {
    const float value = random.chance(0.02) ? 0.0f : scale * random.normal();
    std::memcpy(bytes + 4 * i, &value, 4);
  }
}

void fill_bf16(Random& random, Exact<uint8_t>& bytes, int64_t columns) {
  for (int64_t k = 0; k < columns; ++k)  // past an odd K stands zero
    for (int64_t channel = 0; channel < kTile; ++channel) {
      const uint16_t rounded = nearest_bf16(random.normal() * (random.chance(0.01) ? 1e4f : 1.0f));
      std::memcpy(bytes.data() + ((k / 2 * kTile + channel) * 2 + k % 2) * 2, &rounded, 2);
    }
}

// Groups [first, first + count) as this path reads them, in memory of exactly their size.
Exact<uint8_t> slab_of(const GemmTile& tile, const KernelTable& kernels, int64_t first, int64_t count) {
  const PackedType type = tile.kernel.type;
  const PackedFormat format = packed_format(type);
  if (!is_grouped(type)) {  // only the float32 kernel goes by slabs
    const size_t group = type == PackedType::kF32 ? size_t{kGroup} * kTile * sizeof(float) : 0;
    const size_t start = static_cast<size_t>(first) * group, rest = tile.packed.size() - start;
    Exact<uint8_t> slab(group == 0 ? rest : std::min(rest, static_cast<size_t>(count) * group));
    std::memcpy(slab.data(), tile.packed.data() + start, slab.size());
    return slab;
  }
  const size_t block = packed_block_bytes(format), blocks = static_cast<size_t>(count / block_groups(format));
  Exact<uint8_t> packed(blocks * block);
  std::memcpy(packed.data(), tile.packed.data() + static_cast<size_t>(first / block_groups(format)) * block,
              packed.size());
  if (tile.kernel.path == Path::kPacked || (tile.kernel.path == Path::kUnpacked && format.bits == 8)) return packed;
  const bool exact = tile.kernel.path == Path::kExact;
  const size_t bytes = exact ? static_cast<size_t>(count) * kGroup * kTile * sizeof(float)
                             : blocks * packed_block_bytes(unpacked(format));
  Exact<uint8_t> slab(bytes);
  if (exact)
    kernels.dequantize_tile(type, packed.data(), count, reinterpret_cast<float*>(slab.data()));
  else
    kernels.unpack(type, packed.data(), count, slab.data());
  return slab;
}

TileFunction function_of(const GemmKernel& kernel, const KernelTable& kernels) {
  if (kernel.path == Path::kExact) return kernels.gemm_unpacked[static_cast<size_t>(PackedType::kF32)];
  const auto type = static_cast<size_t>(kernel.type);
  return kernel.path == Path::kPacked ? kernels.gemm_packed[type] : kernels.gemm_unpacked[type];
}

// A weight as a kernel with this mistake would see it.
PackedValue weight_of(const GemmTile& tile, int channel, int64_t k, Mistake mistake) {
  const int64_t scaled_k = mistake == Mistake::kHalf ? k ^ 16 : k;
  const int scaled_channel = mistake == Mistake::kNeighbour ? channel ^ 1 : channel;
  PackedValue value = tile.values[static_cast<size_t>(scaled_k * kTile + scaled_channel)];
  value.code = tile.values[static_cast<size_t>(k * kTile + channel)].code;
  if (mistake == Mistake::kZeroPoint) ++value.code;
  if (mistake == Mistake::kMinimum) value.minimum = 0.0;
  return value;
}

// The code of an activation, with what is kept apart of the step with the high parts.
int q8_code(const Activations& x, int64_t k, Mistake mistake) {
  const GroupMeta& meta = x.q8_meta[k / kGroup];
  const int high_step = mistake == Mistake::kHighStep ? meta.high_step ^ 1 : meta.high_step;
  if (mistake == Mistake::kHighDropped || k % kGroup / 4 != high_step) return x.q8[k];
  const auto high = static_cast<int8_t>(static_cast<uint32_t>(meta.high) >> (8 * (k % 4)));
  return x.q8[k] + high / 8 * 128;
}

// Integer sums are exact in int32 and in float32. So what rounds is, for each part of a group: the product of the
// scales, the scaled sum of activations, and two fused multiply-adds; and per larger block two more.
Expected expected_q8(const GemmTile& tile, const Activations& x, int channel, Mistake mistake) {
  double value = 0.0, magnitude = 0.0;
  for (int64_t first = 0; first < tile.columns; first += kGroup / 2) {
    const double scale = static_cast<double>(x.q8_meta[first / kGroup].scale);
    int64_t sum = 0, plain_sum = 0;
    PackedValue weight;
    for (int64_t k = first; k < first + kGroup / 2; ++k) {
      weight = weight_of(tile, channel, k, mistake);
      const int code = q8_code(x, k, mistake);
      sum += int64_t{weight.code} * code;
      plain_sum += code;
    }
    const double product = weight.scale * scale * static_cast<double>(sum);
    const double minimum = weight.minimum * scale * static_cast<double>(plain_sum);
    value += product + minimum;
    magnitude += std::fabs(product) + std::fabs(minimum);
  }
  const double groups = static_cast<double>(tile.columns) / kGroup;
  return {value, kEpsilon * (4 * groups + 8) * magnitude + groups * kSmallest};
}

// One exact sum; the product of the scales, the sum as a float and their product round.
Expected expected_i8(const GemmTile& tile, const Activations& x, int channel, Mistake mistake) {
  int64_t sum = 0;
  for (int64_t k = 0; k < tile.columns; ++k) sum += int64_t{weight_of(tile, channel, k, mistake).code} * x.i8[k];
  const double scale = weight_of(tile, channel, 0, mistake).scale * static_cast<double>(x.i8_meta->scale);
  const double value = scale * static_cast<double>(sum);
  return {value, 4 * kEpsilon * std::fabs(value) + kSmallest * (1.0 + std::fabs(static_cast<double>(sum)) * kEpsilon)};
}

// Each term passes fewer than `columns` + 4 roundings. Instructions for bf16 may take denormals for zero.
Expected expected_float(const GemmTile& tile, const Activations& x, int channel, Mistake mistake) {
  double value = 0.0, magnitude = 0.0, flushed = 0.0;
  const bool bf16 = tile.kernel.type == PackedType::kBF16;
  for (int64_t k = 0; k < tile.columns; ++k) {
    const PackedValue weight = weight_of(tile, channel, k, mistake);
    const bool quantized = is_quantized(tile.kernel.type);
    const double w = quantized ? weight.scale * weight.code + weight.minimum : weight.value;
    const double a = bf16 ? bf16_value(x.bf16[k]) : x.f32[k];
    value += w * a;
    magnitude += std::fabs(w * a);
    if (bf16 && (std::fabs(a) < kSmallest || std::fabs(w) < kSmallest)) flushed += std::fabs(w * a);
  }
  const auto columns = static_cast<double>(tile.columns);
  return {value, kEpsilon * (columns + 8) * magnitude + flushed + 2 * columns * kSmallest};
}

}  // namespace

std::string GemmKernel::name() const {
  constexpr const char* kPaths[] = {"", " unpacked", " exact"};
  return std::string(packed_name(type)) + kPaths[static_cast<size_t>(path)];
}

const std::vector<GemmKernel>& gemm_kernels() {
  static const std::vector<GemmKernel> made = [] {
    std::vector<GemmKernel> kernels;
    for (int i = 0; i < kNumPackedTypes; ++i) {
      const auto type = static_cast<PackedType>(i);
      kernels.push_back({type, Path::kPacked});
      kernels.push_back({type, Path::kUnpacked});
      if (is_grouped(type)) kernels.push_back({type, Path::kExact});
    }
    return kernels;
  }();
  return made;
}

Activations ActivationRows::at(int64_t row) const {
  Activations x;
  x.columns = columns;
  x.f32 = f32.data() + row * columns;
  x.q8 = q8.data() + row * padded;
  x.q8_meta = q8_meta.data() + row * (padded / kGroup);
  if (row % kPanelRows == 0) {
    x.panels = panels.data() + row / kPanelRows * (padded / kGroup) * kPanelBytes;
    x.panel_meta = panel_meta.data() + row / kPanelRows * (padded / kGroup);
  }
  x.i8 = i8.data() + row * padded;
  x.i8_meta = i8_meta.data() + row;
  x.bf16 = bf16.data() + row * padded;
  return x;
}

void ActivationRows::fill_forms() {
  const KernelTable& kernels = tables().front().kernels;  // all tables must read the same activations
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* x = f32.data() + row * columns;
    kernels.quantize_q8(x, q8.data() + row * padded, q8_meta.data() + row * (padded / kGroup),
                        columns / kGroup * kGroup);
    write_panels(q8.data() + row * padded, q8_meta.data() + row * (padded / kGroup), row, padded / kGroup, 0,
                 columns / kGroup, panels.data(), panel_meta.data());
    i8_meta[static_cast<size_t>(row)] = kernels.quantize_i8(x, i8.data() + row * padded, columns);
    kernels.round_bf16(x, bf16.data() + row * padded, columns);
    if (columns % 2 != 0) bf16[static_cast<size_t>(row * padded + columns)] = 0;
  }
}

ActivationRows random_rows(Random& random, int num_rows, int64_t columns, Draw draw) {
  ActivationRows rows;
  rows.columns = columns;
  rows.padded = padded_columns(columns);
  rows.num_rows = num_rows;
  const auto padded = static_cast<size_t>(num_rows * rows.padded);
  rows.f32 = Exact<float>(static_cast<size_t>(num_rows * columns));
  rows.q8 = Exact<int8_t>(padded);
  rows.i8 = Exact<int8_t>(padded);
  rows.bf16 = Exact<uint16_t>(padded);
  rows.q8_meta = Exact<GroupMeta>(padded / kGroup);
  rows.i8_meta = Exact<RowMeta>(static_cast<size_t>(num_rows));
  const size_t num_panels = static_cast<size_t>((num_rows + kPanelRows - 1) / kPanelRows * (rows.padded / kGroup));
  rows.panels = Exact<int8_t>(num_panels * kPanelBytes);
  rows.panel_meta = Exact<PanelMeta>(num_panels);
  std::memset(rows.panels.data(), 0x55, rows.panels.num_bytes());
  std::memset(rows.panel_meta.data(), 0xFF, rows.panel_meta.num_bytes());
  std::memset(rows.q8.data(), 0x55, rows.q8.num_bytes());
  std::memset(rows.q8_meta.data(), 0xFF, rows.q8_meta.num_bytes());  // NaN
  std::memset(rows.bf16.data(), 0xFF, rows.bf16.num_bytes());
  for (int64_t i = 0; i < num_rows * columns; ++i)
    rows.f32[static_cast<size_t>(i)] = draw(random, i / columns, i % columns);
  rows.fill_forms();
  return rows;
}

float ordinary(Random& random, int64_t row, int64_t k) {
  if (row % 5 == 3 && (k / 32) % 2 == 0) return 0.0f;                         // groups without any value
  if (row % 4 == 1 && k % 32 == k / 32 % 32) return 40.0f * random.normal();  // a value that towers over its group
  return random.normal() * (row % 7 == 2 ? 300.0f : 1.0f);
}

GemmTile random_tile(Random& random, const GemmKernel& kernel, int64_t columns) {
  GemmTile tile{kernel, columns, Exact<uint8_t>(tile_bytes(kernel.type, columns)), {}};
  Exact<uint8_t>& bytes = tile.packed;
  const size_t scales = kTile * sizeof(float);
  if (kernel.type == PackedType::kBF16) {
    fill_bf16(random, bytes, columns);
  } else if (kernel.type == PackedType::kF32) {
    fill_floats(random, bytes.data(), bytes.size() / 4, 1.0f);
  } else {
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(random.bits());
    if (is_grouped(kernel.type))
      fill_tables(random, kernel.type, bytes);
    else
      fill_floats(random, bytes.data() + bytes.size() - scales, kTile, 0.01f);
  }
  for (int64_t k = 0; k < columns; ++k)
    for (int channel = 0; channel < kTile; ++channel)
      tile.values.push_back(packed_value(kernel.type, bytes.data(), columns, channel, k));
  return tile;
}

void multiply(const GemmTile& tile, const KernelTable& kernels, const ActivationRows& rows, int64_t row, int num_rows,
              float* out, int64_t out_stride, int64_t slab_groups) {
  const int64_t groups = (tile.columns + kGroup - 1) / kGroup;
  TileArgs args;
  args.x = rows.at(row);
  args.rows = num_rows;
  args.out = out;
  args.out_stride = out_stride;
  for (int64_t group = 0; group < groups; group += args.num_groups) {
    args.first_group = group;
    args.num_groups = slab_groups == 0 ? groups : std::min(slab_groups, groups - group);
    const Exact<uint8_t> slab = slab_of(tile, kernels, group, args.num_groups);
    args.weights = slab.data();
    function_of(tile.kernel, kernels)(args);
  }
}

std::vector<Expected> expected_dots(const GemmTile& tile, const Activations& x, Mistake mistake) {
  std::vector<Expected> dots;
  for (int channel = 0; channel < kTile; ++channel)
    dots.push_back(tile.kernel.reads_q8()   ? expected_q8(tile, x, channel, mistake)
                   : tile.kernel.reads_i8() ? expected_i8(tile, x, channel, mistake)
                                            : expected_float(tile, x, channel, mistake));
  return dots;
}

}  // namespace llmserve::test
