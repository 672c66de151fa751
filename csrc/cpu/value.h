// Activations in the arena: a value is [rows, columns] in one or more forms, each made when the value is produced.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"

namespace llmserve {

enum class Rows : uint8_t { kTokens, kLogits };  // one row per token of the step, or per row that needs logits

constexpr unsigned kFormF32 = 1, kFormQ8 = 2, kFormBF16 = 4, kFormI8 = 8;

struct Value {
  Rows rows = Rows::kTokens;
  int64_t columns = 0;
  unsigned forms = 0;
  float* f32 = nullptr;
  int8_t* q8 = nullptr;
  GroupMeta* q8_meta = nullptr;
  int8_t* panels = nullptr;  // of q8, where the kernels read them
  PanelMeta* panel_meta = nullptr;
  uint16_t* bf16 = nullptr;
  int8_t* i8 = nullptr;
  RowMeta* i8_meta = nullptr;

  Activations at(int64_t row) const {
    const int64_t padded = padded_columns(columns);
    Activations x;
    x.columns = columns;
    if (f32 != nullptr) x.f32 = f32 + row * columns;
    if (q8 != nullptr) x.q8 = q8 + row * padded, x.q8_meta = q8_meta + row * (padded / kGroup);
    if (panels != nullptr && row % kPanelRows == 0) {
      x.panels = panels + row / kPanelRows * (padded / kGroup) * kPanelBytes;
      x.panel_meta = panel_meta + row / kPanelRows * (padded / kGroup);
    }
    if (bf16 != nullptr) x.bf16 = bf16 + row * padded;
    if (i8 != nullptr) x.i8 = i8 + row * padded, x.i8_meta = i8_meta + row;
    return x;
  }
};

// Bytes of the arena that `num_rows` rows take; `panels`: whether the q8 form has them.
size_t value_bytes(int64_t num_rows, int64_t columns, unsigned forms, bool panels);

// Lays the forms out from `base` on (64-byte aligned).
Value place_value(uint8_t* base, Rows rows, int64_t num_rows, int64_t columns, unsigned forms, bool panels);

// Copies groups [first, first + count) of a row of codes into its place in the panels; `groups` in a whole row.
void write_panels(const int8_t* codes, const GroupMeta* meta, int64_t row, int64_t groups, int64_t first, int64_t count,
                  int8_t* panels, PanelMeta* panel_meta);

// Writes `n` columns from `column` on in every form of the value. The q8 form needs both to be multiples
// of 32, the i8 form whole rows.
void write_forms(const KernelTable& kernels, const Value& value, int64_t row, int64_t column, const float* x,
                 int64_t n);

}  // namespace llmserve
