#include "core/host_index.h"

#include <algorithm>
#include <stdexcept>

namespace llmserve {

HostIndex::HostIndex(int32_t num_slots)
    : hashes_(static_cast<size_t>(std::max(num_slots, 0))), known_(std::max(num_slots, 0)) {
  if (num_slots < 0) throw std::invalid_argument("num_host_blocks: must not be negative");
  fill_unused();
}

int32_t HostIndex::find(const Hash128& hash) const {
  if (index_.empty()) return kNoSlot;
  const auto found = index_.find(hash);
  return found == index_.end() ? kNoSlot : found->second;
}

int32_t HostIndex::insert(const Hash128& hash) {
  int32_t slot;
  if (!unused_.empty()) {
    slot = unused_.back();
    unused_.pop_back();
  } else if (known_.size() > 0) {
    slot = known_.pop_oldest();
    index_.erase(hashes_[at(slot)]);
  } else {
    return kNoSlot;
  }
  hashes_[at(slot)] = hash;
  index_.emplace(hash, slot);
  known_.append(slot);
  return slot;
}

void HostIndex::touch(int32_t slot) {
  known_.remove(slot);
  known_.append(slot);
}

void HostIndex::pin(int32_t slot) { known_.remove(slot); }

void HostIndex::unpin_as_coldest(int32_t slot) { known_.prepend(slot); }

void HostIndex::forget(const Hash128& hash) {
  const int32_t slot = find(hash);
  if (slot == kNoSlot) return;
  index_.erase(hash);
  known_.remove(slot);
  unused_.push_back(slot);
}

void HostIndex::clear() {
  index_.clear();
  while (known_.size() > 0) known_.pop_oldest();
  fill_unused();
}

void HostIndex::fill_unused() {
  unused_.clear();
  for (int32_t slot = num_slots() - 1; slot >= 0; --slot) unused_.push_back(slot);
}

void HostIndex::check_integrity() const {
  std::vector<bool> is_unused(hashes_.size(), false);
  for (const int32_t slot : unused_) {
    if (is_unused[at(slot)] || known_.contains(slot)) throw std::runtime_error("host index: a slot is free twice");
    is_unused[at(slot)] = true;
  }
  if (unused_.size() + static_cast<size_t>(known_.size()) != hashes_.size())
    throw std::runtime_error("host index: a slot leaked");
  if (num_known() != known_.size()) throw std::runtime_error("host index: a known slot is not in the index");
  for (const auto& [hash, slot] : index_)
    if (!known_.contains(slot) || hashes_[at(slot)] != hash)
      throw std::runtime_error("host index: the index leads to a slot of another content");
}

}  // namespace llmserve
