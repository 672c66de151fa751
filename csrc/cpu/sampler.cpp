#include "cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/philox.h"

namespace llmserve {

namespace {

constexpr int64_t kChunk = 256;  // of KernelTable::exp_weights

struct Candidate {
  float weight;
  int32_t id;
};

bool before(const Candidate& a, const Candidate& b) { return a.weight != b.weight ? a.weight > b.weight : a.id < b.id; }

struct Scratch {
  float* weights;         // [vocab]
  double* sums;           // [vocab / 256]
  Candidate* candidates;  // [vocab]
};

Scratch carve(uint8_t* base, int64_t vocab) {
  Scratch s;
  s.sums = reinterpret_cast<double*>(base);
  s.weights = reinterpret_cast<float*>(s.sums + vocab / kChunk + 1);
  s.candidates = reinterpret_cast<Candidate*>(s.weights + (vocab + 1) / 2 * 2);
  return s;
}

double total(const double* sums, int64_t vocab) {
  double sum = 0.0;
  for (int64_t i = 0; i < (vocab + kChunk - 1) / kChunk; ++i) sum += sums[i];
  return sum;
}

int32_t first_maximum(const float* logits, int64_t vocab, float largest) {
  for (int64_t i = 0; i < vocab; ++i)
    if (logits[i] == largest) return static_cast<int32_t>(i);
  return 0;  // all NaN
}

// No filter: find the chunk, then the token in it.
int32_t draw_from_all(const Scratch& s, int64_t vocab, double uniform) {
  const double goal = uniform * total(s.sums, vocab);
  double reached = 0.0;
  int64_t chunk = 0;
  const int64_t last_chunk = (vocab + kChunk - 1) / kChunk - 1;
  while (chunk < last_chunk && reached + s.sums[chunk] <= goal) reached += s.sums[chunk++];
  int32_t chosen = -1;
  for (int64_t i = chunk * kChunk; i < vocab; ++i) {
    if (s.weights[i] <= 0.0f) continue;
    chosen = static_cast<int32_t>(i);
    reached += static_cast<double>(s.weights[i]);
    if (reached > goal) break;
  }
  // Rounding may leave the goal just past the end: the last token with any weight is it.
  for (int64_t i = vocab - 1; chosen < 0 && i >= 0; --i)
    if (s.weights[i] > 0.0f) chosen = static_cast<int32_t>(i);
  return chosen;
}

// The first `count` candidates in order, sorted; grows geometrically so that small nuclei cost little.
int64_t sort_prefix(Candidate* candidates, int64_t size, int64_t sorted, int64_t count) {
  const int64_t end = std::min(size, count);
  if (end < size) std::nth_element(candidates + sorted, candidates + end, candidates + size, before);
  std::sort(candidates + sorted, candidates + end, before);
  return end;
}

// Cuts the candidates to the smallest prefix that reaches top_p of their sum.
int64_t apply_top_p(Candidate* candidates, int64_t size, float top_p) {
  double sum = 0.0;
  for (int64_t i = 0; i < size; ++i) sum += static_cast<double>(candidates[i].weight);
  const double goal = static_cast<double>(top_p) * sum;
  double reached = 0.0;
  int64_t sorted = 0, step = 64;
  while (sorted < size) {
    const int64_t end = sort_prefix(candidates, size, sorted, sorted + step);
    for (; sorted < end; ++sorted) {
      reached += static_cast<double>(candidates[sorted].weight);
      if (reached >= goal) return sorted + 1;
    }
    step *= 4;
  }
  return size;
}

int64_t apply_filters(Candidate* candidates, int64_t size, int32_t top_k, float top_p, float min_p) {
  if (top_k > 0 && top_k < size) {
    std::nth_element(candidates, candidates + top_k, candidates + size, before);
    size = top_k;
  }
  if (top_p < 1.0f) size = apply_top_p(candidates, size, top_p);
  // The largest weight is exp(0) = 1, so min_p compares with the weight itself.
  if (min_p > 0.0f)
    size = std::partition(candidates, candidates + size, [min_p](const Candidate& c) { return c.weight >= min_p; }) -
           candidates;
  return std::max<int64_t>(size, 1);
}

int32_t draw_filtered(const Scratch& s, int64_t vocab, const Step& step, int row, double uniform) {
  int64_t size = 0;
  for (int64_t i = 0; i < vocab; ++i)
    if (s.weights[i] > 0.0f) s.candidates[size++] = {s.weights[i], static_cast<int32_t>(i)};
  size = apply_filters(s.candidates, size, step.top_k[row], step.top_p[row], step.min_p[row]);
  std::sort(s.candidates, s.candidates + size, [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  double sum = 0.0;
  for (int64_t i = 0; i < size; ++i) sum += static_cast<double>(s.candidates[i].weight);
  const double goal = uniform * sum;
  double reached = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    reached += static_cast<double>(s.candidates[i].weight);
    if (reached > goal) return s.candidates[i].id;
  }
  return s.candidates[size - 1].id;
}

int32_t draw(const KernelTable& kernels, const Step& step, int row, const float* logits, int64_t vocab, float largest,
             const Scratch& s) {
  const float temperature = step.temperature[row];
  if (temperature <= 0.0f || step.top_k[row] == 1 || !std::isfinite(largest))
    return first_maximum(logits, vocab, largest);
  kernels.exp_weights(logits, largest, 1.0f / temperature, s.weights, s.sums, vocab);
  const double uniform = philox_uniform(step.seed[row], static_cast<uint64_t>(step.sample_position[row]));
  const bool filtered = step.top_k[row] > 0 || step.top_p[row] < 1.0f || step.min_p[row] > 0.0f;
  return filtered ? draw_filtered(s, vocab, step, row, uniform) : draw_from_all(s, vocab, uniform);
}

void write_top(const Step& step, int row, const float* logits, int64_t vocab, float normalizer, Candidate* heap) {
  const int64_t count = std::min<int64_t>(step.num_logprobs[row], vocab);
  if (count <= 0) return;
  // A heap of the best so far with the worst on top; almost every token fails the first comparison.
  int64_t size = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    const Candidate candidate{logits[i], static_cast<int32_t>(i)};
    if (size < count) {
      heap[size++] = candidate;
      std::push_heap(heap, heap + size, before);
    } else if (before(candidate, heap[0])) {
      std::pop_heap(heap, heap + size, before);
      heap[size - 1] = candidate;
      std::push_heap(heap, heap + size, before);
    }
  }
  std::sort_heap(heap, heap + size, before);
  for (int64_t i = 0; i < size; ++i) {
    step.out_top_ids[static_cast<int64_t>(row) * step.max_top + i] = heap[i].id;
    step.out_top_logprobs[static_cast<int64_t>(row) * step.max_top + i] = heap[i].weight - normalizer;
  }
}

void write_logprobs(const KernelTable& kernels, const Step& step, int row, const float* logits, int64_t vocab,
                    float largest, const Scratch& s) {
  kernels.exp_weights(logits, largest, 1.0f, s.weights, s.sums, vocab);
  const float normalizer = static_cast<float>(static_cast<double>(largest) + std::log(total(s.sums, vocab)));
  const int32_t token = step.out_token_ids[row];
  int32_t rank = 1;
  for (int64_t i = 0; i < vocab; ++i) rank += logits[i] > logits[token] ? 1 : 0;
  step.out_logprobs[row] = logits[token] - normalizer;
  step.out_ranks[row] = rank;
  write_top(step, row, logits, vocab, normalizer, s.candidates);
}

}  // namespace

size_t sampler_scratch_bytes(int64_t vocab) {
  const auto n = static_cast<size_t>(vocab);
  return (n / kChunk + 1) * sizeof(double) + (n + 1) / 2 * 2 * sizeof(float) + n * sizeof(Candidate) + 64;
}

void sample_row(const KernelTable& kernels, const Step& step, int row, const float* logits, int64_t vocab,
                uint8_t* scratch) {
  const Scratch s = carve(scratch, vocab);
  const float largest = kernels.maximum(logits, vocab);
  const int32_t target = step.targets[row];
  step.out_token_ids[row] = target >= 0 ? target : draw(kernels, step, row, logits, vocab, largest, s);
  step.out_logprobs[row] = std::numeric_limits<float>::quiet_NaN();
  step.out_ranks[row] = 0;
  if (step.num_logprobs[row] >= 0) write_logprobs(kernels, step, row, logits, vocab, largest, s);
}

}  // namespace llmserve
