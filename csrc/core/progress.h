// A cell of shared memory through which one process watches another compute, and can tell it that nobody waits for
// the result any more. The computing side polls `abort` between nodes.
//
// Who writes what, so that nothing needs to be cleared and no message can be overtaken: both sides number the requests
// in the order in which they were sent. The engine counts those it has taken (`take`); the watcher says up to which
// number all requests have ended for their clients (`abandon`). Every request of a step has a number up to the count
// of taken ones, so the step is in vain exactly while abandoned >= taken. Both only grow, and a request taken later
// ends the condition by itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace llmserve {

class ProgressCell {
 public:
  // Maps the file at `path`, creating it when `create`; an empty path: memory of this process alone.
  // Throws std::runtime_error.
  ProgressCell(const std::string& path, bool create);
  ~ProgressCell();
  ProgressCell(const ProgressCell&) = delete;
  ProgressCell& operator=(const ProgressCell&) = delete;

  // Engine: it moved. Notes when, so that a watcher who looks once, and late, still learns the truth.
  void bump() {
    touch();
    words_->progress.fetch_add(1, std::memory_order_relaxed);
  }
  // Engine: it moved, without a step forward that counts.
  void touch() { words_->moved_ns.store(now_ns(), std::memory_order_relaxed); }
  uint64_t value() const { return words_->progress.load(std::memory_order_relaxed); }
  // Monotonic clock of the machine, seconds; 0 before the first bump.
  double moved_s() const { return static_cast<double>(words_->moved_ns.load(std::memory_order_relaxed)) * 1e-9; }

  // Engine: one more request was taken, before any step that computes it.
  void take() { words_->taken.fetch_add(1, std::memory_order_relaxed); }
  // Watcher: nobody waits for the first `num_requests` requests. Numbers below an earlier one change nothing.
  void abandon(uint64_t num_requests) {
    if (num_requests > words_->abandoned.load(std::memory_order_relaxed))
      words_->abandoned.store(num_requests, std::memory_order_relaxed);
  }

  // Whether the running step should end. `set_abort` forces it, until the same caller takes it back.
  bool abort() const {
    if (words_->forced.load(std::memory_order_relaxed) != 0) return true;
    const uint64_t abandoned = words_->abandoned.load(std::memory_order_relaxed);
    return abandoned != 0 && abandoned >= words_->taken.load(std::memory_order_relaxed);
  }
  void set_abort(bool on) { words_->forced.store(on ? 1 : 0, std::memory_order_relaxed); }

 private:
  struct Words {
    std::atomic<uint64_t> progress;
    std::atomic<int64_t> moved_ns;
    std::atomic<uint64_t> taken;
    std::atomic<uint64_t> abandoned;
    std::atomic<uint32_t> forced;
  };
  static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(Words) <= 64);

  static int64_t now_ns();

  Words* words_ = nullptr;
};

}  // namespace llmserve
