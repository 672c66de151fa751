// Fibers for the threads of one block, and what they wait for.
#include "cuda/emulator/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

// Saves the registers that a call must keep on the stack of the fiber that runs, and goes on where another stopped.
extern "C" void llmserve_emulator_switch(void** save_stack, void* stack);
asm(R"(
.text
.globl llmserve_emulator_switch
.hidden llmserve_emulator_switch
.type llmserve_emulator_switch, @function
llmserve_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size llmserve_emulator_switch, .-llmserve_emulator_switch
)");

namespace llmserve::cuda::emulator {

namespace {

constexpr size_t kStack = 256 * 1024;  // bytes of a fiber's
constexpr size_t kMostThreads = 1024, kMostShared = 227 * 1024;
constexpr size_t kCanary = 1024;  // bytes on each side of dynamic shared memory
constexpr unsigned char kPoison = 0xFF;

[[noreturn]] void fail(const char* what) {
  const Thread& at = current();
  std::fprintf(stderr, "CUDA emulator: %s (block %u %u %u, thread %u %u %u)\n", what, at.block_idx.x, at.block_idx.y,
               at.block_idx.z, at.thread_idx.x, at.thread_idx.y, at.thread_idx.z);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  bool exists;
};

struct Fiber {
  void* stack_pointer = nullptr;
  Thread thread;
  int index = 0;
  bool ended = false;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> copies;               // since then
};

// A meeting of lanes of one warp.
struct Meeting {
  unsigned arrived = 0;
  uint64_t generation = 0;
  unsigned char offered[2][kLanes * kOffered];  // by parity of the generation: who is slow still reads the last
};

struct Warp {
  std::map<unsigned, std::unique_ptr<Meeting>> meetings;  // by mask
};

struct Block {
  void* scheduler_stack = nullptr;
  Fiber* running = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int alive = 0, arrived = 0, arrived_true = 0, last_true = 0;
  uint64_t generation = 0, progress = 0;
  const std::function<void()>* kernel = nullptr;
  unsigned char* shared = nullptr;
};

struct Memory {
  unsigned char* stacks;
  std::vector<unsigned char> shared;

  Memory() : shared(kMostShared + 2 * kCanary + 128) {
    stacks = static_cast<unsigned char*>(mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) std::abort();
  }
  ~Memory() { munmap(stacks, kStack * kMostThreads); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

thread_local Block* block = nullptr;

void yield() { llmserve_emulator_switch(&block->running->stack_pointer, block->scheduler_stack); }

void finish_barrier() {
  block->last_true = block->arrived_true;
  block->arrived = block->arrived_true = 0;
  ++block->generation;
  ++block->progress;
}

void fiber_main() {
  try {
    (*block->kernel)();
  } catch (const std::exception& error) {
    fail(error.what());
  }
  Fiber& self = *block->running;
  if (!self.groups.empty() || !self.copies.empty()) fail("a thread ended with copies that it did not wait for");
  self.ended = true;
  --block->alive;
  ++block->progress;
  if (block->alive > 0 && block->arrived == block->alive) finish_barrier();  // who has ended is not waited for
  yield();
}

void prepare(Fiber& fiber, unsigned char* stack) {
  auto** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // where a call would return to: keeps the stack aligned as behind a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void run_block(Block& state, const std::vector<int>& order) {
  block = &state;
  while (state.alive > 0) {
    const uint64_t before = state.progress;
    for (const int index : order) {
      Fiber& fiber = state.fibers[static_cast<size_t>(index)];
      if (fiber.ended) continue;
      state.running = &fiber;
      llmserve_emulator_switch(&state.scheduler_stack, fiber.stack_pointer);
    }
    if (state.progress == before) fail("all threads wait: a barrier or a warp's exchange that not all of them reach");
  }
}

}  // namespace

const Thread& current() {
  static const Thread nothing{};
  return block == nullptr || block->running == nullptr ? nothing : block->running->thread;
}

void* dynamic_shared() { return block->shared; }

int lane() { return block->running->index % kLanes; }

int block_barrier(bool is_true) {
  const uint64_t mine = block->generation;
  block->arrived_true += is_true ? 1 : 0;
  ++block->progress;
  if (++block->arrived == block->alive) finish_barrier();
  while (block->generation == mine) yield();
  return block->last_true;
}

const unsigned char* exchange(unsigned mask, const void* offered, size_t size) {
  const int self = lane();
  if ((mask >> self & 1) == 0) fail("a lane takes part in an exchange whose mask it is not in");
  auto& meeting = block->warps[static_cast<size_t>(block->running->index / kLanes)].meetings[mask];
  if (meeting == nullptr) meeting = std::make_unique<Meeting>();
  const uint64_t mine = meeting->generation;
  unsigned char* all = meeting->offered[mine % 2];
  std::memset(all + static_cast<size_t>(self) * kOffered, kPoison, kOffered);
  if (size > 0) std::memcpy(all + static_cast<size_t>(self) * kOffered, offered, size);
  meeting->arrived |= 1u << self;
  ++block->progress;
  if (meeting->arrived == mask) {
    meeting->arrived = 0;
    ++meeting->generation;
  }
  while (meeting->generation == mine) yield();
  return all;
}

void async_copy(void* to, const void* from, bool exists) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("cp_async: an address is not aligned to 16 bytes");
  block->running->copies.push_back({to, from, exists});
}

void async_commit() {
  Fiber& self = *block->running;
  self.groups.push_back(std::move(self.copies));
  self.copies.clear();
}

void async_wait(int pending) {
  auto& groups = block->running->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) {
      if (copy.exists)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

cudaError_t run(dim3 grid, dim3 dim, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t threads = size_t{dim.x} * dim.y * dim.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > kMostThreads || shared_bytes > kMostShared)
    return cudaErrorInvalidConfiguration;
  static thread_local Memory memory;
  static thread_local std::mt19937 random{20261127};
  unsigned char* shared = memory.shared.data() + kCanary;
  shared += (128 - reinterpret_cast<uintptr_t>(shared) % 128) % 128;
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (unsigned index = 0; index < grid.x * grid.y * grid.z; ++index) {
    Block state;
    state.kernel = &kernel;
    state.shared = shared;
    state.alive = static_cast<int>(threads);
    state.fibers.resize(threads);
    state.warps.resize((threads + kLanes - 1) / kLanes);
    std::memset(shared - kCanary, kPoison, shared_bytes + 2 * kCanary);
    for (size_t i = 0; i < threads; ++i) {
      Fiber& fiber = state.fibers[i];
      const auto thread = static_cast<unsigned>(i);
      fiber.index = static_cast<int>(i);
      fiber.thread = {{thread % dim.x, thread / dim.x % dim.y, thread / dim.x / dim.y},
                      {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y},
                      dim,
                      grid};
      prepare(fiber, memory.stacks + i * kStack);
    }
    std::shuffle(order.begin(), order.end(), random);
    run_block(state, order);
    const auto is_untouched = [](unsigned char byte) { return byte == kPoison; };
    if (!std::all_of(shared - kCanary, shared, is_untouched) ||
        !std::all_of(shared + shared_bytes, shared + shared_bytes + kCanary, is_untouched))
      fail("a block wrote outside its dynamic shared memory");
  }
  block = nullptr;
  return cudaSuccess;
}

}  // namespace llmserve::cuda::emulator
