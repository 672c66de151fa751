#include "cpu/program.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <stdexcept>

namespace llmserve {

namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Program::Program(const std::string& isa, int num_threads, const ProgramLimits& limits)
    : kernels_(choose_kernels(isa.c_str())),
      limits_(limits),
      pool_(num_threads > 0 ? num_threads : num_available_cores()),
      queues_{WorkQueue(pool_.num_threads()), WorkQueue(pool_.num_threads())} {
  if (limits.max_num_tokens <= 0 || limits.max_num_seqs <= 0 || limits.max_logit_rows <= 0 || limits.max_position <= 0)
    throw std::invalid_argument("limits: all must be positive");
}

void Program::reserve_arena(size_t num_bytes) { arena_ = Mapping(num_bytes, false); }

size_t Program::value_bytes(Rows rows, int64_t columns, unsigned forms) const {
  return llmserve::value_bytes(max_rows(rows), columns, forms, kernels_.reads_panels);
}

const Value* Program::add_value(Rows rows, int64_t columns, unsigned forms, size_t offset) {
  if (columns <= 0) throw std::invalid_argument("columns: must be positive");
  if ((forms & (kFormQ8)) != 0 && columns % kGroup != 0)
    throw std::invalid_argument("columns: int8 activations need a multiple of 32");
  if (offset % 64 != 0 || offset + value_bytes(rows, columns, forms) > arena_.size())
    throw std::invalid_argument("offset: outside the arena");
  values_.push_back(std::make_unique<Value>(
      place_value(arena_.data() + offset, rows, max_rows(rows), columns, forms, kernels_.reads_panels)));
  return values_.back().get();
}

const RopeTable* Program::add_rope(RopeTable table) {
  const size_t expected = static_cast<size_t>(limits_.max_position) * static_cast<size_t>(table.rotary_dim / 2);
  if (table.cosine.size() != expected || table.sine.size() != expected)
    throw std::invalid_argument("rope: tables must have max_position x rotary_dim / 2 entries");
  ropes_.push_back(std::make_unique<RopeTable>(std::move(table)));
  return ropes_.back().get();
}

void Program::add_node(std::unique_ptr<Node> node) {
  scratch_per_worker_ = std::max(scratch_per_worker_, (node->scratch_bytes() + 4095) / 4096 * 4096);
  nodes_.push_back(std::move(node));
  node_seconds_.push_back(0.0);
  scratch_ = Mapping();
}

void Program::allocate_kv(int num_layers, int num_blocks, int kv_heads, int head_dim, bool int8) {
  if (head_dim % 16 != 0 || head_dim > kMaxHeadDim)
    throw std::invalid_argument("head_dim: " + std::to_string(head_dim) + " is not a multiple of 16 up to 512");
  KvCache kv;
  kv.num_layers = num_layers;
  kv.num_blocks = num_blocks;
  kv.kv_heads = kv_heads;
  kv.head_dim = head_dim;
  kv.int8 = int8;
  kv.memory =
      Mapping(KvCache::bytes_per_block(num_layers, kv_heads, head_dim, int8) * static_cast<size_t>(num_blocks), false);
  kv_ = std::move(kv);
}

void Program::set_query_heads_per_kv_head(int heads) {
  if (heads <= 0 || heads > kMaxQueryRows) throw std::invalid_argument("heads: more than 32 query heads per KV head");
  heads_per_group_ = heads;
}

void Program::check(const StepArrays& arrays) const {
  if (kv_.num_blocks == 0) throw std::invalid_argument("program: allocate_kv comes first");
  if (arrays.num_tokens <= 0 || arrays.num_tokens > limits_.max_num_tokens)
    throw std::invalid_argument("token_ids: between 1 and " + std::to_string(limits_.max_num_tokens) + " expected");
  if (arrays.num_seqs <= 0 || arrays.num_seqs > limits_.max_num_seqs)
    throw std::invalid_argument("seq_lens: between 1 and " + std::to_string(limits_.max_num_seqs) + " expected");
  if (arrays.num_rows < 0 || arrays.num_rows > limits_.max_logit_rows)
    throw std::invalid_argument("logit_rows: at most " + std::to_string(limits_.max_logit_rows) + " expected");
  for (const auto& node : nodes_) node->check(arrays);
}

bool Program::run(const StepArrays& arrays, BlockPool& blocks) {
  check(arrays);
  if (blocks.num_blocks() != kv_.num_blocks || blocks.block_size() != kKvBlock)
    throw std::invalid_argument("blocks: the block pool of another cache");
  if (blocks.num_host_blocks() != 0) throw std::invalid_argument("blocks: this cache is in host memory already");
  step_.kv = &kv_;
  step_.num_threads = pool_.num_threads();
  step_.prepare(arrays, blocks, limits_.max_position, std::max(1, kMaxQueryRows / heads_per_group_));
  if (scratch_.data() == nullptr)
    scratch_ = Mapping(scratch_per_worker_ * static_cast<size_t>(pool_.num_threads()), false);
  const size_t first = next_shared(0);
  for (int index = 0; index < pool_.num_threads(); ++index) deal(first, index, 0);
  abort_after_.store(kNever, std::memory_order_relaxed);
  last_start_s_ = seconds_now();
  run_small(0, first, worker(0));
  small_seconds_ = 0.0;
  if (abort_after_.load(std::memory_order_relaxed) == kNever) pool_.run(worker_entry, this);
  ++num_runs_;
  const bool finished = abort_after_.load(std::memory_order_relaxed) == kNever;
  if (finished) step_.record();
  if (finished) blocks.finish_pending(step_.new_blocks);
  return finished;
}

void Program::worker_entry(void* context, int worker) { static_cast<Program*>(context)->walk(worker); }

Worker Program::worker(int index) {
  return {&kernels_, scratch_.data() + static_cast<size_t>(index) * scratch_per_worker_};
}

// Every worker finds the same one, so none has to be told.
size_t Program::next_shared(size_t node) const {
  while (node < nodes_.size() && nodes_[node]->is_small(step_)) ++node;
  return node;
}

void Program::run_small(size_t first, size_t end, const Worker& self) {
  if (first == end) return;
  double before = seconds_now();
  for (size_t i = first; i < end; ++i) {
    const int64_t count = nodes_[i]->num_items(step_);
    for (int64_t item = 0; item < count && !leaves(i, progress_.get()); ++item) nodes_[i]->run(step_, item, self);
    if (progress_ != nullptr) progress_->bump();
    const double now = seconds_now();
    node_seconds_[i] += now - before;
    small_seconds_ += now - before;
    before = now;
    if (leaves(i, progress_.get())) return;
  }
}

void Program::walk(int index) {
  const Worker self = worker(index);
  ProgressCell* progress = index == 0 ? progress_.get() : nullptr;
  double before = index == 0 ? seconds_now() : 0.0;
  size_t next = 0;
  int turn = 0;
  for (size_t i = next_shared(0); i < nodes_.size(); i = next, turn ^= 1) {
    const Node& node = *nodes_[i];
    WorkQueue& queue = queues_[turn];
    for (int64_t item = queue.take(index, node.hand_out()); item != WorkQueue::kNone && !leaves(i, progress);
         item = queue.take(index, node.hand_out()))
      node.run(step_, item, self);
    next = next_shared(i + 1);
    deal(next, index, turn ^ 1);
    if (progress != nullptr) {
      leaves(i, progress);
      progress->bump();
    }
    pool_.barrier([&] { run_small(i + 1, next, self); });
    if (index == 0) {
      const double now = seconds_now();
      node_seconds_[i] += now - before - small_seconds_;
      small_seconds_ = 0.0;
      before = now;
    }
    if (abort_after_.load(std::memory_order_relaxed) < next) return;
  }
}

void Program::deal(size_t node, int index, int turn) {
  if (node < nodes_.size()) queues_[turn].deal(index, nodes_[node]->num_items(step_), nodes_[node]->hand_out());
}

bool Program::leaves(size_t node, ProgressCell* progress) {
  if (progress != nullptr) {
    progress->touch();
    if (progress->abort() && abort_after_.load(std::memory_order_relaxed) == kNever)
      abort_after_.store(node, std::memory_order_relaxed);
  }
  return abort_after_.load(std::memory_order_relaxed) <= node;
}

std::vector<NodeTime> Program::take_times() {
  std::map<std::string, NodeTime> by_kind;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    NodeTime& entry = by_kind[nodes_[i]->kind()];
    entry.kind = nodes_[i]->kind();
    entry.seconds += node_seconds_[i];
    entry.count += num_runs_;
    node_seconds_[i] = 0.0;
  }
  num_runs_ = 0;
  std::vector<NodeTime> times;
  for (auto& [kind, entry] : by_kind) times.push_back(entry);
  return times;
}

}  // namespace llmserve
