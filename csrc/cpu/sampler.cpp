#include "cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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

// A candidate of the typical-p filter.
struct Surprise {
  double distance;  // of its surprise from the entropy
  float weight;
  int32_t id;
};

bool nearer(const Surprise& a, const Surprise& b) {
  if (a.distance != b.distance) return a.distance < b.distance;
  return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

struct Scratch {
  double* sums;           // [vocab / 256]
  float* weights;         // [vocab]
  float* edited;          // [vocab] logits after bias, penalties and masks
  Candidate* candidates;  // [vocab]
  Surprise* surprises;    // [vocab]
};

Scratch carve(uint8_t* base, int64_t vocab) {
  Scratch s;
  s.sums = reinterpret_cast<double*>(base);
  s.weights = reinterpret_cast<float*>(s.sums + vocab / kChunk + 1);
  s.edited = s.weights + (vocab + 1) / 2 * 2;
  s.candidates = reinterpret_cast<Candidate*>(s.edited + (vocab + 1) / 2 * 2);
  s.surprises = reinterpret_cast<Surprise*>(s.candidates + vocab);
  return s;
}

double total(const double* sums, int64_t vocab) {
  double sum = 0.0;
  for (int64_t i = 0; i < (vocab + kChunk - 1) / kChunk; ++i) sum += sums[i];
  return sum;
}

int32_t first_maximum(const LogitRow& row, float largest) {
  int64_t first = 0;
  while (row.maxima != nullptr && row.maxima[first / kTile] != largest) first += kTile;
  for (int64_t i = first; i < row.vocab; ++i)
    if (row.logits[i] == largest) return static_cast<int32_t>(i);
  return 0;  // not reached: one of them is the maximum
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

// Cuts to the shortest prefix, in the order of `less`, whose weights reach `share` of the sum over all. Sorts only as
// far as it must: the part looked at grows geometrically, so that a small nucleus costs little.
template <typename T>
int64_t cut_prefix(T* items, int64_t size, float share, bool (*less)(const T&, const T&)) {
  double sum = 0.0;
  for (int64_t i = 0; i < size; ++i) sum += static_cast<double>(items[i].weight);
  const double goal = static_cast<double>(share) * sum;
  double reached = 0.0;
  int64_t sorted = 0, step = 64;
  while (sorted < size) {
    const int64_t end = std::min(size, sorted + step);
    if (end < size) std::nth_element(items + sorted, items + end, items + size, less);
    std::sort(items + sorted, items + end, less);
    for (; sorted < end; ++sorted) {
      reached += static_cast<double>(items[sorted].weight);
      if (reached >= goal) return sorted + 1;
    }
    step *= 4;
  }
  return size;
}

// |-log p - H| is |log w - mean of log w under p|: the normalizer cancels.
int64_t apply_typical_p(Candidate* candidates, int64_t size, float typical_p, Surprise* surprises) {
  double sum = 0.0, mean = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    const auto weight = static_cast<double>(candidates[i].weight);
    surprises[i] = {std::log(weight), candidates[i].weight, candidates[i].id};
    sum += weight;
    mean += weight * surprises[i].distance;
  }
  mean /= sum;
  for (int64_t i = 0; i < size; ++i) surprises[i].distance = std::fabs(surprises[i].distance - mean);
  size = cut_prefix(surprises, size, typical_p, nearer);
  for (int64_t i = 0; i < size; ++i) candidates[i] = {surprises[i].weight, surprises[i].id};
  return size;
}

// Keeps the tokens at least min_p times as likely as the most likely one that is left.
int64_t apply_min_p(Candidate* candidates, int64_t size, float min_p) {
  float largest = 0.0f;
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, candidates[i].weight);
  const float least = min_p * largest;
  return std::partition(candidates, candidates + size, [least](const Candidate& c) { return c.weight >= least; }) -
         candidates;
}

int64_t apply_filters(const Scratch& s, int64_t size, const Step& step, int row, float typical_p) {
  const int64_t top_k = step.top_k[row];
  if (top_k > 0 && top_k < size) {
    std::nth_element(s.candidates, s.candidates + top_k, s.candidates + size, before);
    size = top_k;
  }
  if (typical_p < 1.0f) size = apply_typical_p(s.candidates, size, typical_p, s.surprises);
  if (step.top_p[row] < 1.0f) size = cut_prefix(s.candidates, size, step.top_p[row], before);
  if (step.min_p[row] > 0.0f) size = apply_min_p(s.candidates, size, step.min_p[row]);
  return size;
}

int32_t draw_filtered(const Scratch& s, int64_t vocab, const Step& step, int row, float typical_p, double uniform) {
  int64_t size = 0;
  for (int64_t i = 0; i < vocab; ++i)
    if (s.weights[i] > 0.0f) s.candidates[size++] = {s.weights[i], static_cast<int32_t>(i)};
  size = apply_filters(s, size, step, row, typical_p);
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

int32_t draw(const KernelTable& kernels, const Step& step, int row, const LogitRow& logits, float largest,
             const Scratch& s) {
  const float temperature = step.temperature[row];
  const int64_t vocab = logits.vocab;
  if (temperature <= 0.0f || step.top_k[row] == 1 || !std::isfinite(largest)) return first_maximum(logits, largest);
  kernels.exp_weights(logits.logits, largest, 1.0f / temperature, s.weights, s.sums, vocab);
  const double uniform = philox_uniform(step.seed[row], static_cast<uint64_t>(step.sample_position[row]));
  const float typical_p = step.state(row) == nullptr ? 1.0f : step.state(row)->options().typical_p;
  const bool filtered = step.top_k[row] > 0 || step.top_p[row] < 1.0f || step.min_p[row] > 0.0f || typical_p < 1.0f;
  return filtered ? draw_filtered(s, vocab, step, row, typical_p, uniform) : draw_from_all(s, vocab, uniform);
}

// The row after bias, penalties and masks, copied only where there is something to change; raw log-probabilities need
// the row as it was.
const float* edited_row(const Step& step, int row, const float* logits, int64_t vocab, float* edited) {
  const SamplingState* state = step.state(row);
  const uint32_t* mask = step.targets[row] >= 0 ? nullptr : step.mask(row);
  const bool edits = state != nullptr && state->edits();
  if (!edits && mask == nullptr) return logits;
  std::memcpy(edited, logits, static_cast<size_t>(vocab) * sizeof(float));
  if (edits) state->apply(edited);
  if (mask != nullptr) apply_mask(mask, edited, vocab);
  return edited;
}

int32_t choose(const KernelTable& kernels, const Step& step, int row, const LogitRow& raw, float largest,
               const Scratch& s) {
  if (step.targets[row] >= 0) return step.targets[row];
  const float* logits = edited_row(step, row, raw.logits, raw.vocab, s.edited);
  if (logits == raw.logits) return draw(kernels, step, row, raw, largest, s);
  largest = kernels.maximum(logits, raw.vocab);
  if (std::isnan(largest)) return kNotFinite;  // the parameters did it: an infinite bias on an infinite logit
  if (largest == -std::numeric_limits<float>::infinity()) return kNoToken;
  return draw(kernels, step, row, {logits, raw.vocab}, largest, s);
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
  return (n / kChunk + 1) * sizeof(double) + (n + 1) / 2 * 4 * sizeof(float) +
         n * (sizeof(Candidate) + sizeof(Surprise)) + 64;
}

void sample_row(const KernelTable& kernels, const Step& step, int row, const LogitRow& logits, uint8_t* scratch) {
  const Scratch s = carve(scratch, logits.vocab);
  const float largest = logits.maxima == nullptr ? kernels.maximum(logits.logits, logits.vocab)
                                                 : kernels.maximum(logits.maxima, (logits.vocab + kTile - 1) / kTile);
  step.out_token_ids[row] = std::isfinite(largest) ? choose(kernels, step, row, logits, largest, s) : kNotFinite;
  step.out_logprobs[row] = std::numeric_limits<float>::quiet_NaN();
  step.out_ranks[row] = 0;
  if (step.num_logprobs[row] >= 0 && step.out_token_ids[row] >= 0)
    write_logprobs(kernels, step, row, logits.logits, logits.vocab, largest, s);
}

}  // namespace llmserve
