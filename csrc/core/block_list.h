// An ordered set of blocks with links of its own: append, remove from anywhere and pop the oldest in constant time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace llmserve {

class BlockList {
 public:
  explicit BlockList(int32_t num_blocks) : links_(static_cast<size_t>(num_blocks) + 1), end_(num_blocks) {
    at(end_) = {end_, end_};
  }

  bool contains(int32_t block) const { return links_[static_cast<size_t>(block)].next != kNone; }
  int32_t size() const { return size_; }
  // Oldest first: for (b = first(); b != end(); b = next(b)).
  int32_t first() const { return links_[static_cast<size_t>(end_)].next; }
  int32_t next(int32_t block) const { return links_[static_cast<size_t>(block)].next; }
  int32_t end() const { return end_; }

  void append(int32_t block) {
    const int32_t newest = at(end_).previous;
    at(block) = {newest, end_};
    at(newest).next = block;
    at(end_).previous = block;
    ++size_;
  }
  // Makes it the oldest.
  void prepend(int32_t block) {
    const int32_t oldest = first();
    at(block) = {end_, oldest};
    at(oldest).previous = block;
    at(end_).next = block;
    ++size_;
  }
  void remove(int32_t block) {
    const Link link = at(block);
    at(link.previous).next = link.next;
    at(link.next).previous = link.previous;
    at(block) = {};
    --size_;
  }
  int32_t pop_oldest() {
    const int32_t block = first();
    remove(block);
    return block;
  }

 private:
  static constexpr int32_t kNone = -1;
  struct Link {
    int32_t previous = kNone, next = kNone;
  };
  Link& at(int32_t block) { return links_[static_cast<size_t>(block)]; }

  std::vector<Link> links_;  // one per block, and the anchor of both ends
  int32_t end_;
  int32_t size_ = 0;
};

}  // namespace llmserve
