// The GEMM node: tiles of packed weights times rows of activations, and what follows each output row at once
// (bias, residual, gate, or head norm + rotation + KV write), while it is still in cache.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/node.h"

namespace llmserve {

namespace {

// One head of one token into its slot, K [D/2][16][2] or V [8][D][2].
void write_key(uint16_t* block, int offset, const uint16_t* head, int head_dim) {
  for (int d = 0; d < head_dim; d += 2) std::memcpy(block + d * kKvBlock + offset * 2, head + d, 4);
}

void write_value(uint16_t* block, int offset, const uint16_t* head, int head_dim) {
  uint16_t* pairs = block + (kKvBlock + offset / 2 * 2) * head_dim + offset % 2;
  for (int d = 0; d < head_dim; ++d) pairs[2 * d] = head[d];
}

// The same as int8 codes with the token's scale behind them.
void write_codes(uint16_t* block, int offset, const int8_t* codes, float scale, int head_dim, bool value) {
  auto* bytes = reinterpret_cast<int8_t*>(block);
  float* scales = reinterpret_cast<float*>(bytes + int64_t{2} * kKvBlock * head_dim) + (value ? kKvBlock : 0);
  scales[offset] = scale;
  if (value) {
    int8_t* pairs = bytes + (kKvBlock + offset / 2 * 2) * head_dim + offset % 2;
    for (int d = 0; d < head_dim; ++d) pairs[2 * d] = codes[d];
    return;
  }
  for (int d = 0; d < head_dim; d += 2) std::memcpy(bytes + d * kKvBlock + offset * 2, codes + d, 2);
}

}  // namespace

int GemmNode::max_item_tiles() const {
  int most = 0;
  for (const GemmItem& item : items) most = std::max(most, item.num_tiles);
  return most;
}

bool GemmNode::unpacks(int64_t rows) const {
  const bool nibbles = matrix->type == PackedType::kQ4_0 || matrix->type == PackedType::kQ4_1;
  return nibbles && (exact || rows > kDirectRows);
}

// Of one tile unpacked to bytes.
size_t GemmNode::slab_bytes() const {
  if (!is_quantized(matrix->type)) return 0;
  return static_cast<size_t>(matrix->columns / kGroup) * unpacked_group_bytes(has_minimum(matrix->type));
}

size_t GemmNode::scratch_bytes() const {
  return static_cast<size_t>(max_item_tiles()) * (slab_bytes() + kSlabRows * kTile * sizeof(float)) + 64;
}

TileFunction GemmNode::kernel(const KernelTable& kernels, bool unpacked) const {
  switch (matrix->type) {
    case PackedType::kBF16: return kernels.gemm_bf16;
    case PackedType::kF32: return kernels.gemm_f32;
    default: break;
  }
  if (exact) return kernels.gemm_u8_f32;
  return unpacked || matrix->type == PackedType::kQ8_0 ? kernels.gemm_u8 : kernels.gemm_q4;
}

void GemmNode::run(const Step& step, int64_t index, const Worker& worker) const {
  const GemmItem& item = items[static_cast<size_t>(index)];
  const int64_t rows = num_rows(step, in.rows);
  auto* tile_out = reinterpret_cast<float*>(worker.scratch);
  uint8_t* slab = worker.scratch + static_cast<size_t>(max_item_tiles()) * kSlabRows * kTile * sizeof(float);
  const bool unpacked = unpacks(rows);
  for (int t = 0; unpacked && t < item.num_tiles; ++t)
    worker.kernels->unpack_q4(matrix->tile(item.first_tile + t), slab + static_cast<size_t>(t) * slab_bytes(),
                              matrix->columns / kGroup, has_minimum(matrix->type));
  TileArgs args;
  args.zero_point = zero_point(matrix->type);
  args.minimum = has_minimum(matrix->type);
  args.out_stride = int64_t{item.num_tiles} * kTile;
  const TileFunction gemm = kernel(*worker.kernels, unpacked);
  for (int64_t row = 0; row < rows; row += kSlabRows) {
    args.rows = static_cast<int>(std::min<int64_t>(kSlabRows, rows - row));
    args.x = in.at(row);
    for (int t = 0; t < item.num_tiles; ++t) {
      args.weights = unpacked ? slab + static_cast<size_t>(t) * slab_bytes() : matrix->tile(item.first_tile + t);
      args.out = tile_out + t * kTile;
      gemm(args);
    }
    for (int r = 0; r < args.rows; ++r) finish_row(step, item, row + r, tile_out + r * args.out_stride, worker);
  }
}

void GemmNode::finish_row(const Step& step, const GemmItem& item, int64_t row, float* x, const Worker& worker) const {
  switch (item.kind) {
    case ItemKind::kPlain: return finish_plain(item, row, x, worker);
    case ItemKind::kGated: {
      if (!bias.empty())
        worker.kernels->add(x, bias.data() + int64_t{item.first_tile} * kTile, x, int64_t{item.num_tiles} * kTile);
      worker.kernels->gated(activation, x, x + kTile, x, item.num_columns);
      return write_forms(*worker.kernels, out, row, item.out_column, x, item.num_columns);
    }
    default: return finish_head(step, item, row, x, worker);
  }
}

void GemmNode::finish_plain(const GemmItem& item, int64_t row, float* x, const Worker& worker) const {
  const KernelTable& kernels = *worker.kernels;
  if (!bias.empty()) kernels.add(x, bias.data() + int64_t{item.first_tile} * kTile, x, item.num_columns);
  if (residual != nullptr) kernels.add(x, residual->at(row).f32 + item.out_column, x, item.num_columns);
  if (factor != 1.0f) kernels.scale(x, factor, x, item.num_columns);
  if (softcap > 0.0f)
    for (int i = 0; i < item.num_columns; ++i) x[i] = softcap * std::tanh(x[i] / softcap);
  write_forms(kernels, out, row, item.out_column, x, item.num_columns);
}

void GemmNode::finish_head(const Step& step, const GemmItem& item, int64_t row, float* x, const Worker& worker) const {
  const std::vector<float>& norm = item.kind == ItemKind::kQuery ? query_norm : key_norm;
  const bool rotated = rope != nullptr && item.kind != ItemKind::kValue;
  const bool normed = item.kind != ItemKind::kValue && !norm.empty();
  HeadRow head{};
  head.x = x;
  head.bias = bias.empty() ? nullptr : bias.data() + int64_t{item.first_tile} * kTile;
  head.norm = normed ? norm.data() : nullptr;
  head.head_dim = head_dim;
  head.eps = norm_eps;
  if (rotated) {
    const int64_t at = int64_t{step.positions[row]} * (rope->rotary_dim / 2);
    head.cosine = rope->cosine.data() + at;
    head.sine = rope->sine.data() + at;
    head.rotary_dim = rope->rotary_dim;
    head.interleaved = rope->interleaved;
  }
  worker.kernels->head(head);
  if (item.kind == ItemKind::kQuery) return write_forms(*worker.kernels, out, row, item.out_column, x, head_dim);
  write_cache(step, item, row, x, worker);
}

void GemmNode::write_cache(const Step& step, const GemmItem& item, int64_t row, const float* x,
                           const Worker& worker) const {
  const Slot slot = step.slots[static_cast<size_t>(row)];
  uint16_t* block = step.kv->at(layer, slot.block, item.head);
  const bool value = item.kind == ItemKind::kValue;
  if (step.kv->int8) {
    int8_t codes[kMaxHeadDim];
    const float scale = worker.kernels->quantize_head(x, codes, head_dim);
    return write_codes(block, slot.offset, codes, scale, head_dim, value);
  }
  uint16_t rounded[kMaxHeadDim];
  worker.kernels->round_bf16(x, rounded, head_dim);
  value ? write_value(block, slot.offset, rounded, head_dim) : write_key(block, slot.offset, rounded, head_dim);
}

}  // namespace llmserve
