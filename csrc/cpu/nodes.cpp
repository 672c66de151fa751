// Nodes other than GEMM.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/node.h"
#include "cpu/sampler.h"

namespace llmserve {

namespace {
constexpr int64_t kNormRows = 8;  // rows of one work item: a few microseconds
}

int64_t ZeroBlocksNode::num_items(const Step& step) const {
  return static_cast<int64_t>(step.blank_blocks.size()) * step.kv->num_layers;
}

void ZeroBlocksNode::run(const Step& step, int64_t item, const Worker&) const {
  const int64_t num_blocks = static_cast<int64_t>(step.blank_blocks.size());
  const int64_t block = step.blank_blocks[static_cast<size_t>(item % num_blocks)];
  uint16_t* place = step.kv->at(static_cast<int>(item / num_blocks), block, 0);
  std::memset(place, 0, static_cast<size_t>(step.kv->block_stride()) * sizeof(uint16_t));
}

int64_t CopyBlocksNode::num_items(const Step& step) const {
  return static_cast<int64_t>(step.copies.size()) * step.kv->num_layers;
}

void CopyBlocksNode::run(const Step& step, int64_t item, const Worker&) const {
  const auto num_copies = static_cast<int64_t>(step.copies.size());
  const BlockCopy copy = step.copies[static_cast<size_t>(item % num_copies)];
  const int layer = static_cast<int>(item / num_copies);
  std::memcpy(step.kv->at(layer, copy.target, 0), step.kv->at(layer, copy.source, 0),
              static_cast<size_t>(step.kv->block_stride()) * sizeof(uint16_t));
}

void EmbedNode::check(const StepArrays& arrays) const {
  for (int i = 0; i < arrays.num_tokens; ++i)
    if (arrays.token_ids[i] < 0 || arrays.token_ids[i] >= table.rows)
      throw std::invalid_argument("token_ids: " + std::to_string(arrays.token_ids[i]) + " is outside the vocabulary");
}

void EmbedNode::run(const Step& step, int64_t item, const Worker& worker) const {
  const KernelTable& kernels = *worker.kernels;
  auto* row = reinterpret_cast<float*>(worker.scratch);
  kernels.dequantize(table.dtype, table.row(step.token_ids[item]), row, out.columns);
  if (factor != 1.0f) kernels.scale(row, factor, row, out.columns);
  if (positions.data != nullptr) {
    float* position = row + out.columns;
    kernels.dequantize(positions.dtype, positions.row(step.positions[item]), position, out.columns);
    kernels.add(row, position, row, out.columns);
  }
  write_forms(kernels, out, item, 0, row, out.columns);
}

int64_t NormNode::num_items(const Step& step) const { return (num_rows(step, in.rows) + kNormRows - 1) / kNormRows; }

void NormNode::run(const Step& step, int64_t item, const Worker& worker) const {
  const KernelTable& kernels = *worker.kernels;
  const int64_t end = std::min((item + 1) * kNormRows, num_rows(step, in.rows));
  for (int64_t row = item * kNormRows; row < end; ++row) {
    auto* y = reinterpret_cast<float*>(worker.scratch);
    const float* x = in.at(row).f32;
    if (norm == NormKind::kRms)
      kernels.rms_norm(x, weight.data(), y, in.columns, eps);
    else
      kernels.layer_norm(x, weight.data(), bias.empty() ? nullptr : bias.data(), y, in.columns, eps);
    write_forms(kernels, out, row, 0, y, in.columns);
  }
}

void GatherNode::run(const Step& step, int64_t item, const Worker& worker) const {
  write_forms(*worker.kernels, out, item, 0, in.at(step.logit_rows[item]).f32, in.columns);
}

void ElementwiseNode::run(const Step&, int64_t item, const Worker& worker) const {
  const KernelTable& kernels = *worker.kernels;
  auto* row = reinterpret_cast<float*>(worker.scratch);
  const float* a = x.at(item).f32;
  switch (op) {
    case Elementwise::kAdd: kernels.add(a, y.at(item).f32, row, out.columns); break;
    case Elementwise::kScale: kernels.scale(a, by, row, out.columns); break;
    case Elementwise::kActivate: kernels.activate(activation, a, row, out.columns); break;
    case Elementwise::kGated: kernels.gated(activation, y.at(item).f32, a, row, out.columns); break;
    case Elementwise::kPermute:
      for (size_t i = 0; i < order.size(); ++i) row[i] = a[order[i]];
      break;
    case Elementwise::kForms: write_forms(kernels, out, item, 0, a, out.columns); return;
  }
  write_forms(kernels, out, item, 0, row, out.columns);
}

size_t AttentionNode::scratch_bytes() const {
  const size_t rows = static_cast<size_t>(kMaxQueryRows) * static_cast<size_t>(head_dim) * sizeof(float);
  return attention_scratch_bytes(head_dim) + rows;
}

void AttentionNode::check(const StepArrays& arrays) const {
  for (int seq = 0; bidirectional && seq < arrays.num_seqs; ++seq)
    if (arrays.query_start[seq + 1] - arrays.query_start[seq] != arrays.seq_lens[seq])
      throw std::invalid_argument("query_start: sequence " + std::to_string(seq) +
                                  " is not whole in the step, as bidirectional attention needs it");
}

void AttentionNode::run(const Step& step, int64_t item, const Worker& worker) const {
  const QueryChunk& chunk = step.chunks[static_cast<size_t>(item / kv_heads)];
  const int kv_head = static_cast<int>(item % kv_heads);
  const int group = heads / kv_heads;
  const int64_t columns = int64_t{group} * head_dim;
  AttentionArgs args;
  args.q = q.at(chunk.first_row).f32 + kv_head * columns;
  args.q_stride = q.columns;
  args.num_tokens = chunk.num_tokens;
  args.heads = group;
  args.head_dim = head_dim;
  args.first_position = step.positions[chunk.first_row];
  args.window = window;
  args.num_keys = bidirectional ? step.seq_lens[chunk.seq] : 0;
  args.scale = scale;
  args.softcap = softcap;
  args.sinks = sinks.empty() ? nullptr : sinks.data() + int64_t{kv_head} * group;
  args.table = step.tables[static_cast<size_t>(chunk.seq)];
  args.kv = step.kv->at(layer, 0, kv_head);
  args.block_stride = step.kv->block_stride();
  args.int8 = step.kv->int8;
  args.scratch = worker.scratch;
  args.out = reinterpret_cast<float*>(worker.scratch + attention_scratch_bytes(head_dim) / 64 * 64);
  args.out_stride = columns;
  worker.kernels->attention(args);
  for (int token = 0; token < chunk.num_tokens; ++token)
    write_forms(*worker.kernels, out, chunk.first_row + token, kv_head * columns, args.out + token * columns, columns);
}

size_t SampleNode::scratch_bytes() const { return sampler_scratch_bytes(logits.columns); }

void SampleNode::check(const StepArrays& arrays) const {
  for (int row = 0; row < arrays.num_rows; ++row)
    if (arrays.targets[row] >= logits.columns)
      throw std::invalid_argument("targets: row " + std::to_string(row) + " is past the vocabulary");
  if (arrays.mask_rows != nullptr && arrays.mask_words != mask_words(logits.columns))
    throw std::invalid_argument("masks: " + std::to_string(mask_words(logits.columns)) + " words a row expected");
  for (int row = 0; arrays.states != nullptr && row < arrays.num_rows; ++row)
    if (arrays.states[row] != nullptr && arrays.states[row]->vocab_size() != logits.columns)
      throw std::invalid_argument("states: row " + std::to_string(row) + " has another vocabulary");
}

void SampleNode::run(const Step& step, int64_t item, const Worker& worker) const {
  const float* tiles = maxima == nullptr ? nullptr : maxima->at(item).f32;
  sample_row(*worker.kernels, step, static_cast<int>(item), {logits.at(item).f32, logits.columns, tiles},
             worker.scratch);
}

}  // namespace llmserve
