// The step lease: never two holders on one core, two engines alternate, a frozen holder is passed by.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <memory>
#include <thread>
#include <vector>

#include "core/step_lease.h"
#include "tests/check.h"

namespace llmserve::test {

namespace {

// A lease file that is gone when the test ends.
struct LeaseFile {
  std::string path = join(std::filesystem::temp_directory_path().string(), "/llmserve_tests_lease_", getpid());
  ~LeaseFile() { unlink(path.c_str()); }
  std::unique_ptr<StepLease> open(std::vector<int> cores, double patience_s = 30.0) const {
    return std::make_unique<StepLease>(path, std::move(cores), nullptr, patience_s);
  }
};

}  // namespace

TEST(step_lease_has_one_holder_and_alternates) {
  const LeaseFile file;
  constexpr int kTurns = 300;
  std::atomic<int> inside{0}, ready{0};
  std::vector<int> order;  // guarded by the lease itself
  const auto engine = [&](int name) {
    const auto lease = file.open({0, 1});
    ++ready;
    while (ready < 2) std::this_thread::yield();
    for (int turn = 0; turn < kTurns; ++turn) {
      CHECK(lease->acquire());
      CHECK(inside.fetch_add(1) == 0, "two holders");
      order.push_back(name);
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      --inside;
      lease->release();
    }
  };
  std::thread first(engine, 0), second(engine, 1);
  first.join();
  second.join();
  int changes = 0;
  for (size_t i = 1; i < order.size(); ++i) changes += order[i] != order[i - 1];
  CHECK(changes > kTurns, changes, " changes of ", 2 * kTurns, " turns");
}

TEST(step_lease_keeps_disjoint_cores_apart) {
  const LeaseFile file;
  const auto left = file.open({0, 1}), right = file.open({2, 3}), both = file.open({1, 2}, 0.05);
  CHECK(left->acquire());
  CHECK(right->acquire());
  CHECK(!both->acquire(), "both its cores are taken");
  left->release();
  right->release();
  CHECK(both->acquire());
  CHECK(both->held());
}

TEST(step_lease_outlives_its_holder) {
  const LeaseFile file;
  const auto lease = file.open({0, 1});
  for (int round = 0; round < 3; ++round) {
    const pid_t child = fork();
    if (child == 0) _exit(file.open({1, 0})->acquire() ? 0 : 1);
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    CHECK(lease->acquire(), "the dead hold nothing");
    lease->release();
  }
}

TEST(step_lease_waits_once_for_a_frozen_holder) {
  const LeaseFile file;
  const auto frozen = file.open({0}), other = file.open({0}, 0.1);
  CHECK(frozen->acquire());
  CHECK(!other->acquire());
  const auto before = std::chrono::steady_clock::now();
  for (int step = 0; step < 100; ++step) CHECK(!other->acquire());
  CHECK(std::chrono::steady_clock::now() - before < std::chrono::milliseconds(90));
  frozen->release();
  CHECK(other->acquire());
}

TEST(step_lease_wait_ends_with_an_abort_and_counts_as_progress) {
  const LeaseFile file;
  const auto cell = std::make_shared<ProgressCell>("", true);
  const auto holder = file.open({0});
  StepLease waiting(file.path, {0}, cell, 30.0);
  CHECK(holder->acquire());
  cell->take();
  std::thread watcher([&] {
    while (cell->value() < 2) std::this_thread::yield();
    cell->abandon(1);
  });
  CHECK(!waiting.acquire());
  watcher.join();
  CHECK(cell->value() >= 2);
}

TEST(progress_cell_aborts_only_while_all_that_was_taken_is_abandoned) {
  ProgressCell cell("", true);
  CHECK(!cell.abort(), "nothing was abandoned");
  CHECK(cell.moved_s() == 0);
  cell.take();
  cell.take();
  cell.abandon(1);
  CHECK(!cell.abort(), "the second is wanted");
  cell.abandon(2);
  cell.abandon(1);
  CHECK(cell.abort());
  cell.take();
  CHECK(!cell.abort(), "a third came in");
  cell.bump();
  CHECK(cell.moved_s() > 0 && cell.value() == 1);
}

}  // namespace llmserve::test
