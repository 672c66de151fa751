// Which contents of evicted KV blocks lie in host memory, and in which slot: the bookkeeping behind `BlockPool`.
//
// A slot is
//
//   unused   on a stack
//   known    a content's hash leads to it; in the order of use; overwritten, coldest first, when no slot is unused
//   pinned   known, and about to be read: not overwritten until then
//
// Contents are moved by the transfers that the pool records, in the order of its decisions. A slot may therefore be
// given away while it still waits to be read: the read stands earlier in that order.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "core/block_list.h"
#include "core/siphash.h"

namespace llmserve {

class HostIndex {
 public:
  static constexpr int32_t kNoSlot = -1;

  explicit HostIndex(int32_t num_slots);

  // The slot of a content; kNoSlot when it is unknown.
  int32_t find(const Hash128& hash) const;
  // A slot for a content that is unknown; kNoSlot when all are pinned or there are none.
  int32_t insert(const Hash128& hash);
  // The slot is overwritten last of all from now on.
  void touch(int32_t slot);
  void pin(int32_t slot);
  // What was read stays known, but is the first to be overwritten: it is on the device as well now.
  void unpin_as_coldest(int32_t slot);
  void forget(const Hash128& hash);
  void clear();

  // Throws std::runtime_error when the index and the slots disagree, or one is still pinned.
  void check_integrity() const;

  int32_t num_slots() const { return static_cast<int32_t>(hashes_.size()); }
  int32_t num_known() const { return static_cast<int32_t>(index_.size()); }

 private:
  size_t at(int32_t slot) const { return static_cast<size_t>(slot); }
  void fill_unused();

  std::vector<Hash128> hashes_;  // of known slots
  std::vector<int32_t> unused_;
  BlockList known_;  // coldest first, without pinned ones
  std::unordered_map<Hash128, int32_t, LowBits> index_;
};

}  // namespace llmserve
