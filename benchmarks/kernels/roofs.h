// What the machine can do at most: register loops that nothing but their own unit holds up, and reads of memory.
//
// The loops are inline assembly, so that no compiler can fold them. Shares of a roof are worth something only with a
// roof of the same moment, so it is sampled again and again between the measurements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/thread_pool.h"

namespace llmserve::bench {

enum Roof : uint8_t { kInt8, kBf16, kF32 };
constexpr int kNumRoofs = 3;
constexpr const char* kRoofNames[kNumRoofs] = {"int8", "bf16", "f32"};

constexpr size_t kOperandBytes = 128;
constexpr size_t kReadAhead = 4096;  // bytes that the reads prefetch ahead

// Runs the loop so many times on operands of kOperandBytes finite values; returns the operations it did (a
// multiplication and its addition are two).
using LoopFunction = double (*)(int64_t times, const uint8_t* operands);
// Reads all of it, a multiple of 256 bytes; returns a sum.
using ReadFunction = uint64_t (*)(const uint8_t* data, size_t num_bytes);

// One loop of each kind for each ISA level; null where the level has no instruction of its own.
struct RoofTable {
  LoopFunction loops[kNumRoofs] = {};
  ReadFunction read = nullptr;
};

// The loops of the instructions that the kernels of this level use: "scalar", "avx2", "avx512" or "amx".
RoofTable choose_roofs(const std::string& isa);

// Operations per second of all workers together; 0 when the table has no such loop. Takes about two milliseconds.
double measure_loop(const RoofTable& table, Roof roof, ThreadPool& pool, const uint8_t* operands);
// Bytes per second of all workers together, each with a part of its own.
double measure_read(const RoofTable& table, ThreadPool& pool, const uint8_t* data, size_t num_bytes);

double seconds_now();

#ifdef LLMSERVE_X86
namespace avx2 {
void fill(RoofTable& table);
}
namespace avx512 {
void fill(RoofTable& table);
}
namespace avx512vnni {
void fill(RoofTable& table);
}
namespace avx512bf16 {
void fill(RoofTable& table);
}
namespace amx {
void fill(RoofTable& table);
}
#endif

}  // namespace llmserve::bench
