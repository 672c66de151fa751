// Turns of several engines on the same cores: whoever computes a step holds the lease, so that the thread pools of two
// processes never spin against each other.
//
// A file of shared memory has one place for each core of the machine. An engine takes the places of all cores it may
// run on, in ascending order, so engines on disjoint cores never meet. Each place is two robust mutexes: the one who
// waits for `turn` stands in `queue`, and whoever has just had a turn must get in line there: two engines alternate.
// The death of a process frees what it held. A process that is frozen is waited for once, then passed by until the
// place changes hands again: sharing cores is slow, standing still is worse.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/progress.h"

namespace llmserve {

class StepLease {
 public:
  // Opens the file at `path`, creating it when absent. `cores` empty: those this process may run on. While it waits it
  // bumps `watched` and gives up when that says abort. Throws std::runtime_error, std::invalid_argument.
  StepLease(const std::string& path, std::vector<int> cores, std::shared_ptr<ProgressCell> watched, double patience_s);
  ~StepLease();
  StepLease(const StepLease&) = delete;
  StepLease& operator=(const StepLease&) = delete;

  // Waits for the lease. False when it was not to be had: a holder is frozen, or the step is to be aborted anyway.
  // The thread that acquired must release.
  bool acquire();
  void release();
  bool held() const { return held_; }

 private:
  struct File;
  struct Place;

  bool take(size_t index);
  bool lock(size_t index, bool queue);
  void give_back(size_t num_places);

  File* file_ = nullptr;
  std::vector<Place*> places_;
  std::vector<uint64_t> frozen_turns_;  // per place: the turn whose holder was waited for in vain
  std::shared_ptr<ProgressCell> watched_;
  double patience_s_;
  bool held_ = false;
};

}  // namespace llmserve
