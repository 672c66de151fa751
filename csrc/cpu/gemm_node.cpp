// The GEMM node: tiles of packed weights times rows of activations, and what follows each output row at once
// (bias, residual, gate, or head norm + rotation + KV write), while it is still in cache.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/node.h"

namespace llmserve {

namespace {

constexpr int64_t kPassRows = 6;     // that a kernel takes at a time, at best
constexpr int64_t kLeastHalved = 8;  // rows
constexpr size_t kManyItems = 16;    // for each worker: what one has more than another is little

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

int64_t GemmNode::num_ranges(const Step& step) const { return (num_rows(step, in.rows) + kRangeRows - 1) / kRangeRows; }

// Few items that cannot be shared out evenly: of nine, one of two workers would do five. As halves of their rows they
// come to four and a half each. Both halves read the same weights, the second time from the cache.
bool GemmNode::halves_ranges(const Step& step) const {
  const auto num_threads = static_cast<size_t>(step.num_threads);
  return num_ranges(step) == 1 && num_rows(step, in.rows) >= kLeastHalved && items.size() % num_threads != 0 &&
         items.size() < kManyItems * num_threads;
}

int64_t GemmNode::num_items(const Step& step) const {
  return static_cast<int64_t>(items.size()) * num_ranges(step) * (halves_ranges(step) ? 2 : 1);
}

// Of the groups of a tile that are unpacked at a time: to float32 for the exact GEMM, to bytes otherwise.
size_t GemmNode::slab_bytes() const {
  if (!is_grouped(matrix->type)) return 0;
  if (exact) return size_t{kExactGroups} * kGroup * kTile * sizeof(float);
  const PackedFormat format = packed_format(matrix->type);
  return static_cast<size_t>(kSlabGroups / block_groups(format)) * packed_block_bytes(unpacked(format));
}

size_t GemmNode::scratch_bytes() const {
  return slab_bytes() + static_cast<size_t>(max_item_tiles()) * kRangeRows * kTile * sizeof(float) + 64;
}

// One tile times the rows of `args`, the codes unpacked slab by slab.
void GemmNode::multiply_unpacked(const uint8_t* tile, TileArgs args, const Worker& worker) const {
  const KernelTable& kernels = *worker.kernels;
  const PackedFormat format = packed_format(matrix->type);
  const int64_t groups = args.num_groups, width = exact ? kExactGroups : kSlabGroups;
  const auto type = static_cast<size_t>(exact ? PackedType::kF32 : matrix->type);
  args.weights = worker.scratch;
  for (int64_t group = 0; group < groups; group += width) {
    const auto blocks_at = [&](int64_t at) {
      return tile + static_cast<size_t>(at / block_groups(format)) * packed_block_bytes(format);
    };
    const uint8_t* blocks = blocks_at(group);
    args.first_group = group;
    args.num_groups = std::min(width, groups - group);
    args.next = blocks_at(group + args.num_groups);  // past the last slab lies the next tile
    if (exact)
      kernels.dequantize_tile(matrix->type, blocks, args.num_groups, reinterpret_cast<float*>(worker.scratch));
    else
      kernels.unpack(matrix->type, blocks, args.num_groups, worker.scratch);
    kernels.gemm_unpacked[type](args);
  }
}

void GemmNode::multiply(const uint8_t* tile, TileArgs args, const Worker& worker) const {
  const PackedFormat format = packed_format(matrix->type);
  const auto type = static_cast<size_t>(matrix->type);
  const bool is_direct = args.rows <= worker.kernels->direct_rows[type];
  if (format.group != 0 && (exact || (format.bits < 8 && !is_direct))) return multiply_unpacked(tile, args, worker);
  args.weights = tile;
  (is_direct ? worker.kernels->gemm_packed : worker.kernels->gemm_unpacked)[type](args);
}

void GemmNode::run(const Step& step, int64_t index, const Worker& worker) const {
  // All items of a range of rows follow each other: its activations stay in L2.
  const auto num_tiled = static_cast<int64_t>(items.size());
  const int64_t all_rows = num_rows(step, in.rows);
  int64_t first_row = 0, end_row = 0;
  if (halves_ranges(step)) {
    const bool panels = worker.kernels->reads_panels && all_rows >= 2 * kPanelRows;
    const int64_t pass = panels ? kPanelRows : kPassRows;
    const int64_t middle = (all_rows + pass) / (2 * pass) * pass;
    first_row = index % 2 == 0 ? 0 : middle;
    end_row = index % 2 == 0 ? middle : all_rows;
    index /= 2;
  } else {
    first_row = index / num_tiled * kRangeRows;
    end_row = std::min(first_row + kRangeRows, all_rows);
  }
  const GemmItem& item = items[static_cast<size_t>(index % num_tiled)];
  auto* out_rows = reinterpret_cast<float*>(worker.scratch + slab_bytes());
  TileArgs args;
  args.x = in.at(first_row);
  args.rows = static_cast<int>(end_row - first_row);
  args.num_groups = (matrix->columns + kGroup - 1) / kGroup;
  args.out_stride = int64_t{item.num_tiles} * kTile;
  for (int t = 0; t < item.num_tiles; ++t) {
    args.out = out_rows + t * kTile;
    multiply(matrix->tile(item.first_tile + t), args, worker);
  }
  for (int r = 0; r < args.rows; ++r) finish_row(step, item, first_row + r, out_rows + r * args.out_stride, worker);
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
  if (maxima != nullptr) maxima->f32[row * maxima->columns + item.first_tile] = kernels.maximum(x, item.num_columns);
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
