#include "core/step_lease.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <ctime>
#include <stdexcept>

namespace llmserve {

namespace {

constexpr int kMaxCores = CPU_SETSIZE;
constexpr uint64_t kMagic = 0x31455341454c504c;  // of this layout
constexpr int64_t kSliceNs = 20'000'000;         // between two looks around while waiting
constexpr uint64_t kNoTurn = ~uint64_t{0};

using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw std::runtime_error("step lease " + path + ": " + what + ": " + std::strerror(errno));
}

void init_mutex(pthread_mutex_t& mutex) {
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(&mutex, &attributes);
  pthread_mutexattr_destroy(&attributes);
}

// Whether a lock call got the mutex; one whose owner died holds nothing that could be half-done.
bool got(int result, pthread_mutex_t& mutex) {
  if (result == EOWNERDEAD) return pthread_mutex_consistent(&mutex) == 0;
  return result == 0;
}

bool lock_within_slice(pthread_mutex_t& mutex) {
  timespec until{};
  clock_gettime(CLOCK_REALTIME, &until);  // what timedlock knows; a jump of the clock costs one slice
  const int64_t ns = until.tv_nsec + kSliceNs;
  until.tv_sec += ns / 1'000'000'000;
  until.tv_nsec = ns % 1'000'000'000;
  return got(pthread_mutex_timedlock(&mutex, &until), mutex);
}

std::vector<int> available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof(set), &set) == 0)
    for (int core = 0; core < kMaxCores; ++core)
      if (CPU_ISSET(core, &set)) cores.push_back(core);
  if (cores.empty()) cores.push_back(0);  // more cores than the set can name: they share one place
  return cores;
}

}  // namespace

struct StepLease::Place {
  pthread_mutex_t queue;
  pthread_mutex_t turn;
  std::atomic<uint64_t> num_turns;
};

struct StepLease::File {
  uint64_t magic;
  alignas(64) Place places[kMaxCores];
};

StepLease::StepLease(const std::string& path, std::vector<int> cores, std::shared_ptr<ProgressCell> watched,
                     double patience_s)
    : watched_(std::move(watched)), patience_s_(patience_s) {
  if (cores.empty()) cores = available_cores();
  std::sort(cores.begin(), cores.end());
  cores.erase(std::unique(cores.begin(), cores.end()), cores.end());
  if (cores.front() < 0 || cores.back() >= kMaxCores) throw std::invalid_argument("cores: out of range");
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) fail(path, "cannot open");
  // Under the file's lock, so that one process alone writes the mutexes. Whoever died before the magic was written
  // had them to itself.
  void* mapped = MAP_FAILED;
  if (flock(fd, LOCK_EX) == 0 && ftruncate(fd, sizeof(File)) == 0)
    mapped = mmap(nullptr, sizeof(File), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    close(fd);
    errno = error;
    fail(path, "cannot map");
  }
  file_ = static_cast<File*>(mapped);
  if (file_->magic != kMagic) {
    for (Place& place : file_->places) {
      init_mutex(place.queue);
      init_mutex(place.turn);
    }
    file_->magic = kMagic;
  }
  flock(fd, LOCK_UN);  // the mapping keeps the open file, and would keep its lock
  close(fd);
  for (const int core : cores) places_.push_back(&file_->places[core]);
  frozen_turns_.assign(places_.size(), kNoTurn);
}

StepLease::~StepLease() {
  release();
  munmap(file_, sizeof(File));
}

bool StepLease::acquire() {
  if (held_) throw std::runtime_error("step lease: acquired twice");
  for (size_t index = 0; index < places_.size(); ++index)
    if (!take(index)) {
      give_back(index);
      return false;
    }
  return held_ = true;
}

void StepLease::release() {
  if (held_) give_back(places_.size());
  held_ = false;
}

void StepLease::give_back(size_t num_places) {
  while (num_places > 0) pthread_mutex_unlock(&places_[--num_places]->turn);
}

bool StepLease::take(size_t index) {
  Place& place = *places_[index];
  if (!lock(index, true)) return false;
  const bool taken = lock(index, false);
  if (taken) place.num_turns.fetch_add(1, std::memory_order_relaxed);
  pthread_mutex_unlock(&place.queue);
  return taken;
}

bool StepLease::lock(size_t index, bool queue) {
  Place& place = *places_[index];
  pthread_mutex_t& mutex = queue ? place.queue : place.turn;
  if (got(pthread_mutex_trylock(&mutex), mutex)) return true;
  uint64_t turn = place.num_turns.load(std::memory_order_relaxed);
  if (turn == frozen_turns_[index]) return false;
  auto since = Clock::now();
  for (;;) {
    if (lock_within_slice(mutex)) return true;
    if (watched_ != nullptr) {
      watched_->bump();
      if (watched_->abort()) return false;
    }
    const uint64_t seen = place.num_turns.load(std::memory_order_relaxed);
    if (seen != turn) {
      turn = seen;
      since = Clock::now();
    } else if (std::chrono::duration<double>(Clock::now() - since).count() > patience_s_) {
      frozen_turns_[index] = turn;
      return false;
    }
  }
}

}  // namespace llmserve
