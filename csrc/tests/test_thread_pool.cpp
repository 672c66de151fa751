// The thread pool: every worker runs once per run, the barrier holds, uneven work and many runs end.
#include <atomic>
#include <vector>

#include "core/thread_pool.h"
#include "tests/check.h"

namespace llmserve::test {

namespace {

struct Counters {
  ThreadPool* pool = nullptr;
  std::vector<int64_t> calls;  // one per worker: its own, unsynchronized on purpose
};

void count_call(void* context, int worker) { ++static_cast<Counters*>(context)->calls[static_cast<size_t>(worker)]; }

struct Phases {
  ThreadPool* pool = nullptr;
  int num_phases = 0;
  std::vector<int> written;  // plain ints: only the barrier orders them
  std::atomic<int> mistakes{0};
};

// Every worker writes its phase and, past the barrier, must find that of all others.
void walk_phases(void* context, int worker) {
  auto& phases = *static_cast<Phases*>(context);
  for (int phase = 1; phase <= phases.num_phases; ++phase) {
    phases.written[static_cast<size_t>(worker)] = phase;
    phases.pool->barrier();
    for (const int seen : phases.written) phases.mistakes += seen != phase;
    phases.pool->barrier();
  }
}

struct Items {
  std::atomic<int> next{0};
  std::vector<int> done;
};

void burn(int amount) {
  for (int i = 0; i < amount; ++i) std::atomic_signal_fence(std::memory_order_seq_cst);
}

void claim_items(void* context, int worker) {
  auto& items = *static_cast<Items*>(context);
  const int count = static_cast<int>(items.done.size());
  for (int item = items.next.fetch_add(1); item < count; item = items.next.fetch_add(1)) {
    burn(item % 7 == 0 ? 20000 : 10 * worker);
    ++items.done[static_cast<size_t>(item)];
  }
}

}  // namespace

TEST(thread_pool_runs_every_worker_once_per_run) {
  for (int num_threads = 1; num_threads <= 4; ++num_threads) {
    ThreadPool pool(num_threads);
    CHECK(pool.num_threads() == num_threads);
    Counters counters{&pool, std::vector<int64_t>(static_cast<size_t>(num_threads))};
    for (int64_t run = 1; run <= 1000; ++run) {
      pool.run(count_call, &counters);
      for (const int64_t calls : counters.calls) CHECK(calls == run, num_threads, " threads");
    }
  }
}

TEST(thread_pool_barrier_separates_phases) {
  for (int num_threads = 1; num_threads <= 4; ++num_threads) {
    ThreadPool pool(num_threads);
    Phases phases;
    phases.pool = &pool;
    phases.num_phases = 50;
    phases.written.assign(static_cast<size_t>(num_threads), 0);
    for (int run = 0; run < 10; ++run) pool.run(walk_phases, &phases);
    CHECK(phases.mistakes == 0, num_threads, " threads");
  }
}

TEST(thread_pool_does_uneven_work_exactly_once) {
  for (int num_threads = 1; num_threads <= 4; ++num_threads) {
    ThreadPool pool(num_threads);
    for (int run = 0; run < 20; ++run) {
      Items items;
      items.done.assign(static_cast<size_t>(random.integer(0, 60)), 0);
      pool.run(claim_items, &items);
      for (const int done : items.done) CHECK(done == 1, num_threads, " threads");
    }
  }
}

TEST(thread_pool_starts_and_stops_at_once) {
  for (int round = 0; round < 50; ++round) {
    ThreadPool pool(static_cast<int>(random.integer(1, 4)));
    Counters counters{&pool, std::vector<int64_t>(static_cast<size_t>(pool.num_threads()))};
    if (random.chance(0.5)) pool.run(count_call, &counters);
  }
}

TEST(thread_pool_takes_nonsense_as_one_thread) {
  CHECK(ThreadPool(0).num_threads() == 1);
  CHECK(ThreadPool(-3).num_threads() == 1);
  CHECK(num_available_cores() >= 1);
}

}  // namespace llmserve::test
