// The paged KV cache's bookkeeping: which block belongs to which sequence.
//
// A sequence is known by a handle; its table lists blocks in the order of positions. Blocks carry reference counts.
// All growth of a step happens in one ordered transaction, `reserve`. Single-threaded: only the engine thread calls it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace llmserve {

class BlockPool {
 public:
  BlockPool(int32_t num_blocks, int32_t block_size);

  int64_t create();
  // Grows each table to cover its number of tokens, in order; stops at the first that does not fit and leaves it and
  // all after it unchanged. Returns how many succeeded. Throws std::invalid_argument on an unknown handle.
  size_t reserve(const std::vector<int64_t>& handles, const std::vector<int64_t>& num_tokens);
  void truncate(int64_t handle, int64_t num_tokens);
  void release(int64_t handle);
  const std::vector<int32_t>& table(int64_t handle) const;

  // Blocks handed out since the last call; their contents must be zeroed before use (0 · NaN is NaN).
  std::vector<int32_t> take_new_blocks();

  // Throws std::runtime_error when the free list, tables and reference counts disagree.
  void check_integrity() const;

  int32_t num_blocks() const { return static_cast<int32_t>(references_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t block_size() const { return block_size_; }

 private:
  std::vector<int32_t>& find(int64_t handle);
  void drop(int32_t block);

  int32_t block_size_;
  std::vector<int32_t> references_;
  std::vector<int32_t> free_;  // a stack: blocks touched last are reused first
  std::vector<int32_t> new_blocks_;
  std::unordered_map<int64_t, std::vector<int32_t>> tables_;
  int64_t next_handle_ = 1;
};

}  // namespace llmserve
