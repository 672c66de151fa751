#include "cpu/step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace llmserve {

void Step::prepare(const StepArrays& arrays, const BlockPool& pool, int max_position, int tokens_per_chunk) {
  static_cast<StepArrays&>(*this) = arrays;
  tables.resize(static_cast<size_t>(num_seqs));
  slots.resize(static_cast<size_t>(num_tokens));
  chunks.clear();
  new_blocks.clear();
  blank_blocks.clear();
  if (query_start[0] != 0 || query_start[num_seqs] != num_tokens)
    throw std::invalid_argument("query_start: does not span the tokens of the step");
  for (int seq = 0; seq < num_seqs; ++seq) prepare_sequence(seq, pool, max_position, tokens_per_chunk);
  for (int row = 0; row < num_rows; ++row)
    if (logit_rows[row] < 0 || logit_rows[row] >= num_tokens)
      throw std::invalid_argument("logit_rows: a row is out of range");
  for (int row = 0; row < num_rows; ++row)
    if (SamplingState* own = state(row)) own->rewind(sample_position[row]);
  std::stable_sort(chunks.begin(), chunks.end(),
                   [](const QueryChunk& a, const QueryChunk& b) { return a.cost > b.cost; });
  // A block can come twice only when sequences share it.
  for (std::vector<int32_t>* blocks : {&new_blocks, &blank_blocks}) {
    std::sort(blocks->begin(), blocks->end());
    blocks->erase(std::unique(blocks->begin(), blocks->end()), blocks->end());
  }
  copies = pool.copies();
}

void Step::record() const {
  for (int row = 0; row < num_rows; ++row)
    if (SamplingState* own = state(row); own != nullptr && out_token_ids[row] >= 0) own->record(out_token_ids[row]);
}

void Step::prepare_sequence(int seq, const BlockPool& pool, int max_position, int tokens_per_chunk) {
  const int first = query_start[seq], end = query_start[seq + 1];
  if (end <= first || end > num_tokens)
    throw std::invalid_argument("query_start: every sequence needs at least one token, within the step");
  const std::vector<int32_t>& table = pool.table(block_tables[seq]);
  tables[static_cast<size_t>(seq)] = table.data();
  const int start = seq_lens[seq] - (end - first);
  if (start < 0 || seq_lens[seq] > max_position)
    throw std::invalid_argument("seq_lens: sequence " + std::to_string(seq) + " is out of range");
  if (static_cast<int64_t>(table.size()) * kKvBlock < seq_lens[seq])
    throw std::invalid_argument("block_tables: sequence " + std::to_string(seq) + " has too few blocks");
  for (int row = first; row < end; ++row) {
    const int position = start + row - first;
    if (positions[row] != position) throw std::invalid_argument("positions: not consecutive up to seq_lens");
    slots[static_cast<size_t>(row)] = {table[static_cast<size_t>(position / kKvBlock)], position % kKvBlock};
  }
  // Only what the step reaches: a long prompt has all its blocks from the start, and zeroing them at once would hold up
  // everybody's tokens.
  const int reached = (seq_lens[seq] + kKvBlock - 1) / kKvBlock;
  for (int i = 0; i < reached; ++i) {
    const int32_t block = table[static_cast<size_t>(i)];
    if (!pool.is_new(block)) continue;
    new_blocks.push_back(block);
    if (i * kKvBlock < start || (i + 1) * kKvBlock > seq_lens[seq]) blank_blocks.push_back(block);
  }
  for (int row = first; row < end; row += tokens_per_chunk) {
    const int count = std::min(tokens_per_chunk, end - row);
    const int64_t last = start + row - first + count;
    chunks.push_back({seq, row, count, last * count});
  }
}

}  // namespace llmserve
