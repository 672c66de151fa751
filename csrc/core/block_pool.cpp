#include "core/block_pool.h"

#include <stdexcept>
#include <string>

namespace llmserve {

BlockPool::BlockPool(int32_t num_blocks, int32_t block_size) : block_size_(block_size) {
  if (num_blocks <= 0) throw std::invalid_argument("num_blocks: must be positive");
  if (block_size <= 0) throw std::invalid_argument("block_size: must be positive");
  references_.assign(static_cast<size_t>(num_blocks), 0);
  free_.reserve(static_cast<size_t>(num_blocks));
  for (int32_t block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

int64_t BlockPool::create() {
  tables_.emplace(next_handle_, std::vector<int32_t>{});
  return next_handle_++;
}

size_t BlockPool::reserve(const std::vector<int64_t>& handles, const std::vector<int64_t>& num_tokens) {
  if (handles.size() != num_tokens.size()) throw std::invalid_argument("num_tokens: one entry per handle expected");
  for (size_t i = 0; i < handles.size(); ++i) {
    std::vector<int32_t>& blocks = find(handles[i]);
    const size_t needed = static_cast<size_t>((num_tokens[i] + block_size_ - 1) / block_size_);
    if (needed > blocks.size() && needed - blocks.size() > free_.size()) return i;
    while (blocks.size() < needed) {
      const int32_t block = free_.back();
      free_.pop_back();
      references_[static_cast<size_t>(block)] = 1;
      new_blocks_.push_back(block);
      blocks.push_back(block);
    }
  }
  return handles.size();
}

void BlockPool::truncate(int64_t handle, int64_t num_tokens) {
  std::vector<int32_t>& blocks = find(handle);
  const size_t kept = static_cast<size_t>((num_tokens + block_size_ - 1) / block_size_);
  while (blocks.size() > kept) {
    drop(blocks.back());
    blocks.pop_back();
  }
}

void BlockPool::release(int64_t handle) {
  truncate(handle, 0);
  tables_.erase(handle);
}

const std::vector<int32_t>& BlockPool::table(int64_t handle) const {
  const auto found = tables_.find(handle);
  if (found == tables_.end()) throw std::invalid_argument("handle: unknown sequence " + std::to_string(handle));
  return found->second;
}

std::vector<int32_t> BlockPool::take_new_blocks() {
  std::vector<int32_t> blocks;
  blocks.swap(new_blocks_);
  return blocks;
}

void BlockPool::check_integrity() const {
  std::vector<int32_t> counted(references_.size(), 0);
  for (const auto& [handle, blocks] : tables_)
    for (const int32_t block : blocks) ++counted[static_cast<size_t>(block)];
  if (counted != references_) throw std::runtime_error("block pool: reference counts disagree with the tables");
  std::vector<bool> is_free(references_.size(), false);
  for (const int32_t block : free_) {
    const size_t index = static_cast<size_t>(block);
    if (is_free[index]) throw std::runtime_error("block pool: block " + std::to_string(block) + " is free twice");
    if (references_[index] != 0) throw std::runtime_error("block pool: a used block is on the free list");
    is_free[index] = true;
  }
  for (size_t block = 0; block < references_.size(); ++block)
    if (references_[block] == 0 && !is_free[block]) throw std::runtime_error("block pool: a block leaked");
}

std::vector<int32_t>& BlockPool::find(int64_t handle) { return const_cast<std::vector<int32_t>&>(table(handle)); }

void BlockPool::drop(int32_t block) {
  int32_t& references = references_[static_cast<size_t>(block)];
  if (--references == 0) free_.push_back(block);
}

}  // namespace llmserve
