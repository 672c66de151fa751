// One step's work as the nodes see it: the caller's arrays, and what is derived from them once per step.
#pragma once

#include <cstdint>
#include <vector>

#include "core/block_pool.h"
#include "core/memory.h"
#include "core/sampling_state.h"
#include "cpu/kernel_table.h"

namespace llmserve {

// The paged KV cache: per (layer, block, KV head) K [D/2][16][2] then V [8][D][2], in bf16; or in int8, followed by
// 16 float32 scales of the keys and 16 of the values, one for each token.
struct KvCache {
  Mapping memory;
  int num_layers = 0;
  int num_blocks = 0;
  int kv_heads = 0;
  int head_dim = 0;
  bool int8 = false;

  // In units of two bytes.
  static int64_t head_elements(int dim, bool int8) {
    return int8 ? int64_t{kKvBlock} * dim + int64_t{4} * kKvBlock : int64_t{2} * kKvBlock * dim;
  }
  int64_t head_elements() const { return head_elements(head_dim, int8); }
  int64_t block_stride() const { return head_elements() * kv_heads; }
  static size_t bytes_per_block(int layers, int heads, int dim, bool int8) {
    return static_cast<size_t>(layers) * static_cast<size_t>(heads) * static_cast<size_t>(head_elements(dim, int8)) * 2;
  }
  uint16_t* at(int layer, int64_t block, int head) const {
    return reinterpret_cast<uint16_t*>(memory.data()) +
           (static_cast<int64_t>(layer) * num_blocks + block) * block_stride() + head * head_elements();
  }
};

// The caller's arrays; lengths as in the Python `StepInput`.
struct StepArrays {
  int num_tokens = 0, num_seqs = 0, num_rows = 0, max_top = 0;
  const int32_t* token_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* query_start = nullptr;
  const int32_t* seq_lens = nullptr;
  const int64_t* block_tables = nullptr;
  const int32_t* logit_rows = nullptr;
  const int32_t* targets = nullptr;
  const float* temperature = nullptr;
  const int32_t* top_k = nullptr;
  const float* top_p = nullptr;
  const float* min_p = nullptr;
  const uint64_t* seed = nullptr;
  const int64_t* sample_position = nullptr;
  const int32_t* num_logprobs = nullptr;
  SamplingState* const* states = nullptr;  // [num_rows], an entry or all may be null
  const int32_t* mask_rows = nullptr;      // [num_rows] row of `masks`, -1: none; null: no row has one
  const uint32_t* masks = nullptr;         // [num_masks, mask_words]
  int64_t mask_words = 0;
  int32_t* out_token_ids = nullptr;
  float* out_logprobs = nullptr;
  int32_t* out_ranks = nullptr;
  int32_t* out_top_ids = nullptr;  // [num_rows, max_top]
  float* out_top_logprobs = nullptr;
};

struct Slot {
  int32_t block;
  int32_t offset;
};

// Consecutive tokens of one sequence whose query rows fit one attention task.
struct QueryChunk {
  int32_t seq;
  int32_t first_row;
  int32_t num_tokens;
  int64_t cost;
};

struct Step : StepArrays {
  std::vector<const int32_t*> tables;  // [num_seqs]
  std::vector<Slot> slots;             // [num_tokens]
  std::vector<QueryChunk> chunks;      // longest first
  std::vector<int32_t> new_blocks;     // since the last step, as far as this one reaches
  std::vector<int32_t> blank_blocks;   // those of them that it does not fill: to be zeroed first
  std::vector<BlockCopy> copies;       // to be done next
  const KvCache* kv = nullptr;
  int num_threads = 1;  // that share the work

  // What the pool has pending stays there, so that a step that is not finished loses nothing. new_blocks are those that
  // this step reaches.
  // Throws std::invalid_argument where the arrays contradict each other or the block tables.
  void prepare(const StepArrays& arrays, const BlockPool& pool, int max_position, int tokens_per_chunk);

  // The state that samples a row; null for a row that has none, or scores a target.
  SamplingState* state(int row) const { return states == nullptr || targets[row] >= 0 ? nullptr : states[row]; }
  const uint32_t* mask(int row) const {
    return mask_rows == nullptr || mask_rows[row] < 0 ? nullptr : masks + mask_rows[row] * mask_words;
  }
  // Tells the states what was sampled. Only after the whole step: what an aborted step sampled never was.
  void record() const;

 private:
  void prepare_sequence(int seq, const BlockPool& pool, int max_position, int tokens_per_chunk);
};

}  // namespace llmserve
