#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <csignal>

namespace llmserve {

namespace {

// About 50 µs of pausing; a peer that takes longer is not computing but descheduled, so the core is given to it.
constexpr int kSpins = 2000;

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

int num_available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

ThreadPool::ThreadPool(int num_threads) : num_threads_(std::max(1, num_threads)) {
  // Signals belong to the Python thread.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int worker = 1; worker < num_threads_; ++worker) threads_.emplace_back([this, worker] { worker_main(worker); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(StepFunction function, void* context) {
  function_ = function;
  context_ = context;
  if (num_threads_ > 1) {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }
  function(context, 0);
  barrier();
}

void ThreadPool::release() {
  arrived_.store(0, std::memory_order_relaxed);
  phase_.fetch_add(1, std::memory_order_release);
  if (num_threads_ > 1) phase_.notify_all();
}

void ThreadPool::wait_past(uint32_t phase) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    pause_core();
  }
  phase_.wait(phase, std::memory_order_acquire);
}

void ThreadPool::worker_main(int worker) {
  uint32_t seen = 0;
  for (;;) {
    generation_.wait(seen, std::memory_order_acquire);
    seen = generation_.load(std::memory_order_acquire);
    if (stopping_.load()) return;
    function_(context_, worker);
    barrier();
  }
}

}  // namespace llmserve
