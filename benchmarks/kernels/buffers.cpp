#include "buffers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace llmserve::bench {

namespace {

struct Fill {
  uint8_t* data;
  size_t num_bytes;
  size_t num_workers;
};

// splitmix64.
uint64_t mix(uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void fill_weights(void* context, int worker) {
  const auto* fill = static_cast<const Fill*>(context);
  const size_t part = fill->num_bytes / fill->num_workers;
  const size_t first = part * static_cast<size_t>(worker) / 8 * 8;
  const size_t end = static_cast<size_t>(worker) + 1 == fill->num_workers ? fill->num_bytes : first + part;
  for (size_t at = first; at + 8 <= end; at += 8) {
    const uint64_t word = (mix(at) & 0xBFFFBFFFBFFFBFFFu) | 0x2000200020002000u;  // exponents of 2^-7 to 2^0 as float16
    std::memcpy(fill->data + at, &word, 8);
  }
}

float normal(uint64_t seed) {
  const double u = (static_cast<double>(mix(seed) >> 11) + 1.0) * 0x1p-53;
  const double v = static_cast<double>(mix(~seed) >> 11) * 0x1p-53;
  return static_cast<float>(std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * M_PI * v));
}

}  // namespace

Buffers::Buffers(size_t weight_bytes, size_t value_bytes, ThreadPool& pool)
    : weights(weight_bytes, true), activations(4 * value_bytes, false), value_bytes(value_bytes) {
  Fill fill{weights.data(), weights.size(), static_cast<size_t>(pool.num_threads())};
  pool.run(fill_weights, &fill);
  std::vector<float> drawn(size_t{1} << 18);
  for (size_t i = 0; i < drawn.size(); ++i) drawn[i] = normal(i);
  const size_t piece = drawn.size() * sizeof(float);
  for (size_t at = 0; at < value_bytes; at += piece)
    std::memcpy(activations.data() + at, drawn.data(), std::min(piece, value_bytes - at));
}

}  // namespace llmserve::bench
