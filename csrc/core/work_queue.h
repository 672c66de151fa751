// Hands out the items of one phase to the workers of a pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace llmserve {

// kRuns: each worker takes consecutive items from a run of its own, so that it streams through memory and knows what it
// will read next; who has none left takes half of what the slowest worker has. kShared: all take the next item in turn,
// for items whose order says which should start first.
enum class HandOut : uint8_t { kRuns, kShared };

// `deal` is called by every worker before a phase, with the same arguments, and `take` within it; between the two lies
// a barrier. Two queues that take turns let workers deal the next phase while others are in this one.
class WorkQueue {
 public:
  static constexpr int64_t kNone = -1;

  explicit WorkQueue(int num_workers)
      : num_workers_(num_workers), runs_(std::make_unique<Run[]>(static_cast<size_t>(num_workers))) {}

  // At most 2**31 items.
  void deal(int worker, int64_t num_items, HandOut how) {
    if (how == HandOut::kShared) return set(worker, {0, worker == 0 ? static_cast<uint32_t>(num_items) : 0});
    const int64_t first = num_items * worker / num_workers_, end = num_items * (worker + 1) / num_workers_;
    set(worker, {static_cast<uint32_t>(first), static_cast<uint32_t>(end)});
  }

  // An item that no other call gets, or kNone.
  int64_t take(int worker, HandOut how) {
    const int64_t item = take_first(how == HandOut::kShared ? 0 : worker);
    return item != kNone || how == HandOut::kShared ? item : take_half(worker);
  }

 private:
  struct Range {
    uint32_t first, end;
  };
  struct alignas(64) Run {
    std::atomic<Range> range{Range{0, 0}};
  };
  static_assert(std::atomic<Range>::is_always_lock_free);

  std::atomic<Range>& at(int worker) { return runs_[static_cast<size_t>(worker)].range; }
  void set(int worker, Range range) { at(worker).store(range, std::memory_order_relaxed); }

  int64_t take_first(int worker) {
    Range range = at(worker).load(std::memory_order_relaxed);
    while (range.first < range.end)
      if (at(worker).compare_exchange_weak(range, {range.first + 1, range.end}, std::memory_order_relaxed))
        return range.first;
    return kNone;
  }

  // Items are handed out once, so a range never becomes what it was: the exchange cannot mistake a later one for it.
  int64_t take_half(int worker) {
    for (;;) {
      int slowest = -1;
      Range most{0, 0};
      for (int other = 0; other < num_workers_; ++other) {
        const Range range = at(other).load(std::memory_order_relaxed);
        if (range.first >= range.end || range.end - range.first <= most.end - most.first) continue;
        slowest = other;
        most = range;
      }
      if (slowest < 0) return kNone;
      const uint32_t middle = most.first + (most.end - most.first) / 2;
      if (!at(slowest).compare_exchange_strong(most, {most.first, middle}, std::memory_order_relaxed)) continue;
      set(worker, {middle + 1, most.end});
      return middle;
    }
  }

  int num_workers_;
  std::unique_ptr<Run[]> runs_;
};

}  // namespace llmserve
