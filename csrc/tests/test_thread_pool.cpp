// The thread pool: every worker runs once per run, the barrier holds, uneven work and many runs end. The work queue:
// every item of every phase is handed out once, in runs or in order.
#include <algorithm>
#include <atomic>
#include <vector>

#include "core/thread_pool.h"
#include "core/work_queue.h"
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

void burn(int amount) {
  for (int i = 0; i < amount; ++i) std::atomic_signal_fence(std::memory_order_seq_cst);
}

// Phases as a program has them: queues take turns, and each worker deals the next phase before the barrier.
struct Phased {
  ThreadPool* pool;
  WorkQueue queues[2];
  std::vector<HandOut> how;
  std::vector<std::vector<int>> done;  // [phase][item]: how often; plain ints
  std::atomic<int> mistakes{0};

  explicit Phased(ThreadPool& threads)
      : pool(&threads), queues{WorkQueue(threads.num_threads()), WorkQueue(threads.num_threads())} {}
  void deal(size_t phase, int worker) {
    if (phase < done.size()) queues[phase % 2].deal(worker, static_cast<int64_t>(done[phase].size()), how[phase]);
  }
};

void work_through(void* context, int worker) {
  auto& phased = *static_cast<Phased*>(context);
  for (size_t phase = 0; phase < phased.done.size(); ++phase) {
    WorkQueue& queue = phased.queues[phase % 2];
    int64_t before = -1;
    for (int64_t item = queue.take(worker, phased.how[phase]); item != WorkQueue::kNone;
         item = queue.take(worker, phased.how[phase])) {
      burn(item % 7 == 0 ? 20000 : 10 * worker);
      ++phased.done[phase][static_cast<size_t>(item)];
      phased.mistakes += phased.how[phase] == HandOut::kShared && item <= before;
      before = item;
    }
    phased.deal(phase + 1, worker);
    phased.pool->barrier();
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

TEST(work_queue_hands_out_each_item_once) {
  for (int num_threads = 1; num_threads <= 4; ++num_threads) {
    ThreadPool pool(num_threads);
    for (int run = 0; run < 20; ++run) {
      Phased phased(pool);
      for (int phase = 0; phase < 6; ++phase) {
        phased.how.push_back(random.chance(0.3) ? HandOut::kShared : HandOut::kRuns);
        phased.done.emplace_back(static_cast<size_t>(random.integer(0, 60)), 0);
      }
      for (int worker = 0; worker < num_threads; ++worker) phased.deal(0, worker);
      pool.run(work_through, &phased);
      for (const auto& items : phased.done)
        CHECK(std::all_of(items.begin(), items.end(), [](int times) { return times == 1; }), num_threads, " threads");
      CHECK(phased.mistakes == 0, num_threads, " threads");
    }
  }
}

TEST(work_queue_gives_runs_and_takes_half_of_what_is_left) {
  WorkQueue queue(2);
  for (int worker = 0; worker < 2; ++worker) queue.deal(worker, 11, HandOut::kRuns);
  const auto taken = [&](int worker, int count) {
    std::vector<int64_t> items;
    for (int i = 0; i < count; ++i) items.push_back(queue.take(worker, HandOut::kRuns));
    return items;
  };
  CHECK(taken(1, 6) == (std::vector<int64_t>{5, 6, 7, 8, 9, 10}));
  CHECK(taken(0, 1) == std::vector<int64_t>{0});
  CHECK(taken(1, 3) == (std::vector<int64_t>{3, 4, 2}));  // of 1..4, then of 1..2
  CHECK(taken(0, 2) == (std::vector<int64_t>{1, WorkQueue::kNone}));
  CHECK(taken(1, 1) == std::vector<int64_t>{WorkQueue::kNone});
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
