// Memory that all cases share, filled once.
#pragma once

#include <cstdint>

#include "core/memory.h"
#include "core/thread_pool.h"

namespace llmserve::bench {

// Weights: random, but every two bytes are a float16 and a bfloat16 of ordinary size, and every four a float32. So they
// are a legal matrix of any packed type, and no kernel meets a NaN or a denormal. Activations: normally distributed.
struct Buffers {
  Mapping weights, activations;
  size_t value_bytes;  // of each of the four values within `activations`

  Buffers(size_t weight_bytes, size_t value_bytes, ThreadPool& pool);
  uint8_t* value(int index) const { return activations.data() + static_cast<size_t>(index) * value_bytes; }
};

}  // namespace llmserve::bench
