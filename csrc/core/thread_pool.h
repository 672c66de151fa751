// A persistent pool for steps: the caller is worker 0, the others park between steps and spin only inside one.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace llmserve {

// Called on every worker with its index. Must not throw.
using StepFunction = void (*)(void* context, int worker);

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Runs `function` on all workers and returns when all have ended.
  void run(StepFunction function, void* context);

  // To be called by every worker inside `run`; returns when all have arrived.
  void barrier() {
    barrier([] {});
  }

  // The same; the last to arrive calls `serial` before any returns.
  template <typename Serial>
  void barrier(const Serial& serial) {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < num_threads_) return wait_past(phase);
    serial();
    release();
  }

 private:
  void wait_past(uint32_t phase);
  void release();
  void worker_main(int worker);

  int num_threads_;
  std::vector<std::thread> threads_;
  StepFunction function_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> generation_{0};  // bumped to start a run
  alignas(64) std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};  // bumped by the last to arrive
};

// Cores this process may run on.
int num_available_cores();

}  // namespace llmserve
