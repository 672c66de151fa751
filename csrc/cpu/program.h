// A compiled network: values in one arena, packed weights, a KV cache, and nodes in the order they run.
//
// Built once from Python (ops/compiler.py), then `run` is one call per step: every worker walks the same list of nodes,
// takes work items from a queue, and meets the others at a barrier after each node that is worth sharing.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/memory.h"
#include "core/progress.h"
#include "core/thread_pool.h"
#include "cpu/node.h"

namespace llmserve {

struct ProgramLimits {
  int max_num_tokens = 0;
  int max_num_seqs = 0;
  int max_logit_rows = 0;
  int max_position = 0;
};

struct NodeTime {
  std::string kind;
  double seconds;
  int64_t count;
};

class Program {
 public:
  // `isa` as for choose_kernels. Throws std::invalid_argument.
  Program(const std::string& isa, int num_threads, const ProgramLimits& limits);

  const KernelTable& kernels() const { return kernels_; }
  const ProgramLimits& limits() const { return limits_; }
  int num_threads() const { return pool_.num_threads(); }

  // Arena and values.
  void reserve_arena(size_t num_bytes);
  size_t value_bytes(Rows rows, int64_t columns, unsigned forms) const;
  const Value* add_value(Rows rows, int64_t columns, unsigned forms, size_t offset);
  int64_t max_rows(Rows rows) const { return rows == Rows::kTokens ? limits_.max_num_tokens : limits_.max_logit_rows; }

  // Weights: reserve all bytes, add matrices, then pack each where it lies; or have them lie in a file (weights.cpp).
  // All of these work in parallel. Throws std::bad_alloc, std::system_error.
  void reserve_weights(size_t num_bytes);
  const PackedMatrix* add_matrix(PackedMatrix matrix);
  void pack(const PackedMatrix& matrix);
  // Packs aside and writes at `offset` of a file; the checksum of what was written.
  uint64_t write(const PackedMatrix& matrix, int descriptor, size_t offset);
  // From now on the matrices lie in a file, one after the other from `offset` on.
  void map_weights(int descriptor, size_t offset);
  uint64_t checksum_of(const PackedMatrix& matrix);
  // Has the system read, in the background, what packing a matrix or its sample is going to read from a mapped file.
  void prefetch(const PackedMatrix& matrix, bool sample) const;
  // The checksum of the first and the last tile, packed aside: what the whole would be like.
  uint64_t checksum_of_sample(const PackedMatrix& matrix);

  const RopeTable* add_rope(RopeTable table);
  void add_node(std::unique_ptr<Node> node);

  // Throws std::bad_alloc, std::invalid_argument.
  void allocate_kv(int num_layers, int num_blocks, int kv_heads, int head_dim, bool int8 = false);
  void set_query_heads_per_kv_head(int heads);
  void attach_progress(std::shared_ptr<ProgressCell> cell) { progress_ = std::move(cell); }

  // Runs one step, after what `blocks` has pending. Returns false when it was aborted half-way, throws
  // std::invalid_argument before anything ran; either leaves `blocks` as it was, so that the step can be run again.
  bool run(const StepArrays& arrays, BlockPool& blocks);

  std::vector<NodeTime> take_times();
  // When the last run began, after any wait for its turn; seconds of the monotonic clock.
  double last_start_s() const { return last_start_s_; }

 private:
  static void worker_entry(void* context, int worker);
  void walk(int index);
  Worker worker(int index);
  // The first node from `node` on whose items are shared out. Those between are run by whoever comes last to the
  // barrier before them, while the others wait for it anyway.
  size_t next_shared(size_t node) const;
  void run_small(size_t first, size_t end, const Worker& self);
  void deal(size_t node, int index, int turn);
  // Whether the work of a node is in vain. Who brings `progress` shows that it moves, and decides: worker 0 alone, or
  // whoever runs small nodes while the others wait.
  bool leaves(size_t node, ProgressCell* progress);
  void check(const StepArrays& arrays) const;
  uint64_t checksum_of(const uint8_t* data, size_t num_bytes);
  void place_matrices();
  PackedMatrix pack_aside(PackedMatrix matrix);

  KernelTable kernels_;
  ProgramLimits limits_;
  ThreadPool pool_;
  WorkQueue queues_[2];  // they take turns
  Mapping arena_, weights_, scratch_, aside_;
  size_t weights_used_ = 0;
  size_t scratch_per_worker_ = 0;
  std::vector<std::unique_ptr<Value>> values_;
  std::vector<std::unique_ptr<PackedMatrix>> matrices_;
  std::vector<std::unique_ptr<RopeTable>> ropes_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<double> node_seconds_;
  double small_seconds_ = 0.0;  // since the last barrier
  int64_t num_runs_ = 0;
  double last_start_s_ = 0.0;
  KvCache kv_;
  int heads_per_group_ = 1;
  std::shared_ptr<ProgressCell> progress_;

  Step step_;
  // The node after which all workers leave. An index, not a flag: a worker that is late at node i must not act on
  // what worker 0 has already found at node i + 1, or it would miss that node's barrier.
  std::atomic<size_t> abort_after_{kNever};
  static constexpr size_t kNever = ~size_t{0};
};

}  // namespace llmserve
