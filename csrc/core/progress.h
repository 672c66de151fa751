// A cell of shared memory through which one process watches another compute: a progress counter that only grows, and
// an abort flag that the computing side polls between nodes.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace llmserve {

class ProgressCell {
 public:
  // Maps the 64-byte file at `path`, creating it when `create`. Throws std::runtime_error.
  ProgressCell(const std::string& path, bool create);
  ~ProgressCell();
  ProgressCell(const ProgressCell&) = delete;
  ProgressCell& operator=(const ProgressCell&) = delete;

  void bump() { words_->progress.fetch_add(1, std::memory_order_relaxed); }
  uint64_t value() const { return words_->progress.load(std::memory_order_relaxed); }
  bool abort() const { return words_->abort.load(std::memory_order_relaxed) != 0; }
  void set_abort(bool on) { words_->abort.store(on ? 1 : 0, std::memory_order_relaxed); }

 private:
  struct Words {
    std::atomic<uint64_t> progress;
    std::atomic<uint32_t> abort;
  };
  static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(Words) <= 64);
  Words* words_ = nullptr;
};

}  // namespace llmserve
