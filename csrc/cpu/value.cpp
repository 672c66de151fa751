#include "cpu/value.h"

#include <cstring>

namespace llmserve {

namespace {

constexpr size_t align64(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct FormBytes {
  size_t f32, codes8, codes16, meta, row_meta, panels, panel_meta;
};

FormBytes form_bytes(int64_t num_rows, int64_t columns) {
  const auto rows = static_cast<size_t>(num_rows);
  const auto padded = static_cast<size_t>(padded_columns(columns));
  const size_t num_panels = (rows + kPanelRows - 1) / kPanelRows * (padded / kGroup);
  return {align64(rows * static_cast<size_t>(columns) * 4),
          align64(rows * padded),
          align64(rows * padded * 2),
          align64(rows * (padded / kGroup) * sizeof(GroupMeta)),
          align64(rows * sizeof(RowMeta)),
          num_panels * kPanelBytes,
          num_panels * sizeof(PanelMeta)};
}

}  // namespace

size_t value_bytes(int64_t num_rows, int64_t columns, unsigned forms, bool panels) {
  const FormBytes bytes = form_bytes(num_rows, columns);
  size_t total = 0;
  if ((forms & kFormF32) != 0) total += bytes.f32;
  if ((forms & kFormQ8) != 0) total += bytes.codes8 + bytes.meta;
  if ((forms & kFormQ8) != 0 && panels) total += bytes.panels + bytes.panel_meta;
  if ((forms & kFormBF16) != 0) total += bytes.codes16;
  if ((forms & kFormI8) != 0) total += bytes.codes8 + bytes.row_meta;
  return total;
}

Value place_value(uint8_t* base, Rows rows, int64_t num_rows, int64_t columns, unsigned forms, bool panels) {
  const FormBytes bytes = form_bytes(num_rows, columns);
  Value value;
  value.rows = rows;
  value.columns = columns;
  value.forms = forms;
  const auto take = [&base](size_t count) {
    uint8_t* place = base;
    base += count;
    return place;
  };
  if ((forms & kFormF32) != 0) value.f32 = reinterpret_cast<float*>(take(bytes.f32));
  if ((forms & kFormQ8) != 0) {
    value.q8 = reinterpret_cast<int8_t*>(take(bytes.codes8));
    value.q8_meta = reinterpret_cast<GroupMeta*>(take(bytes.meta));
  }
  if ((forms & kFormQ8) != 0 && panels) {
    value.panels = reinterpret_cast<int8_t*>(take(bytes.panels));
    value.panel_meta = reinterpret_cast<PanelMeta*>(take(bytes.panel_meta));
  }
  if ((forms & kFormBF16) != 0) value.bf16 = reinterpret_cast<uint16_t*>(take(bytes.codes16));
  if ((forms & kFormI8) != 0) {
    value.i8 = reinterpret_cast<int8_t*>(take(bytes.codes8));
    value.i8_meta = reinterpret_cast<RowMeta*>(take(bytes.row_meta));
  }
  return value;
}

void write_panels(const int8_t* codes, const GroupMeta* meta, int64_t row, int64_t groups, int64_t first, int64_t count,
                  int8_t* panels, PanelMeta* panel_meta) {
  const int64_t r = row % kPanelRows, begin = row / kPanelRows * groups + first;
  for (int64_t group = begin; group < begin + count; ++group, codes += kGroup, ++meta) {
    int8_t* place = panels + group * kPanelBytes + r * kPanelRowBytes;
    std::memcpy(place, codes, kGroup);
    std::memset(place + kGroup, 0, kGroup);
    std::memcpy(place + kGroup + meta->high_step * 4, &meta->high, 4);
    PanelMeta& lane = panel_meta[group];
    lane.scales[r] = meta->scale;
    lane.scaled_sums[r] = meta->scaled_sum;
    lane.scaled_first_sums[r] = meta->scaled_first_sum;
    lane.scaled_second_sums[r] = meta->scaled_second_sum;
  }
}

void write_forms(const KernelTable& kernels, const Value& value, int64_t row, int64_t column, const float* x,
                 int64_t n) {
  const int64_t padded = padded_columns(value.columns);
  const int64_t groups = padded / kGroup;
  if (value.f32 != nullptr && value.f32 + row * value.columns + column != x)
    std::memcpy(value.f32 + row * value.columns + column, x, static_cast<size_t>(n) * sizeof(float));
  if (value.q8 != nullptr) {
    int8_t* codes = value.q8 + row * padded + column;
    GroupMeta* meta = value.q8_meta + row * groups + column / kGroup;
    kernels.quantize_q8(x, codes, meta, n);
    if (value.panels != nullptr)
      write_panels(codes, meta, row, groups, column / kGroup, n / kGroup, value.panels, value.panel_meta);
  }
  if (value.i8 != nullptr) value.i8_meta[row] = kernels.quantize_i8(x, value.i8 + row * padded, n);
  if (value.bf16 != nullptr) {
    kernels.round_bf16(x, value.bf16 + row * padded + column, n);
    // The kernels read pairs: what stands after an odd last column meets a zero weight and must not be a NaN.
    if (column + n == value.columns && value.columns % 2 != 0) value.bf16[row * padded + value.columns] = 0;
  }
}

}  // namespace llmserve
