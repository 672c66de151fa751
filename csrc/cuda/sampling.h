// What the kernels of sampling share: random numbers, the order of tokens, exact sums of weights, and selection.
//
// Weights are whole numbers, 2^shift for the largest: their sums are exact, so they depend neither on the order of
// threads nor on the batch. Selection finds the first item, in the order of a key, whose running sum reaches a target:
// digit by digit of the key from the top, by a histogram of the sums of each digit. Nothing is sorted.
#pragma once

#include "cuda/device.h"

namespace llmserve::cuda {

constexpr int kDigit = 11;  // bits of a key that one histogram tells apart
constexpr int kBins = 1 << kDigit;
constexpr int kSelectThreads = 512;  // of a block that selects
constexpr int kBinsOfThread = kBins / kSelectThreads;
constexpr int kGathered = 8192;      // tokens that shared memory takes
constexpr float kMostRange = 64.0f;  // of logits that bins tell apart; what is below is in the last
constexpr int64_t kMostVocab = 1 << 20;
constexpr int32_t kNoToken = -1, kNotFinite = -2;  // llmserve/ops/protocol.py

// Bits of an integer below `vocab`.
__host__ __device__ inline int id_bits(int64_t vocab) {
  int bits = 0;
  while ((int64_t{1} << bits) < vocab) ++bits;
  return bits;
}

// The first word of Philox4x32-10 as a number above 0 and below 1: llmserve/ops/philox.py.
__device__ inline double philox_uniform(uint64_t seed, uint64_t position) {
  auto x0 = static_cast<uint32_t>(position), x1 = static_cast<uint32_t>(position >> 32);
  uint32_t x2 = 0, x3 = 0;
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, x0), low0 = 0xD2511F53u * x0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, x2), low1 = 0xCD9E8D57u * x2;
    x0 = high1 ^ x1 ^ key0;
    x1 = low1;
    x2 = high0 ^ x3 ^ key1;
    x3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return (static_cast<double>(x0 >> 8) + 0.5) * 0x1p-24;
}

// Smaller for a larger logit; both zeros are one.
__device__ inline uint32_t descending(float logit) {
  const uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
  return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

__device__ inline float logit_of(uint32_t descending_key) {
  return __uint_as_float((descending_key & 0x80000000u) != 0 ? descending_key : ~descending_key & 0x7FFFFFFFu);
}

// Ascending in (logit descending, id ascending), and different for every token.
__device__ inline uint64_t rank_key(float logit, uint32_t id, int bits) {
  return static_cast<uint64_t>(descending(logit)) << bits | id;
}

// Bins of a row's tokens by distance from the largest logit.
__device__ inline float bins_per_logit(float largest, float least) {
  return (kBins - 1) / fminf(fmaxf(__fsub_rn(largest, least), 1e-3f), kMostRange);
}

__device__ inline int bin_of_distance(float distance, float scale) {
  return static_cast<int>(fminf(__fmul_rn(distance, scale), kBins - 1.0f));
}

// It never falls as a logit does, so bins are ranges of the order of tokens.
__device__ inline int bin_of(float logit, float largest, float scale) {
  return bin_of_distance(__fsub_rn(largest, logit), scale);
}

struct Sum {
  uint64_t weight;
  uint32_t count;
};

__device__ inline Sum operator+(Sum x, Sum y) { return {x.weight + y.weight, x.count + y.count}; }

// What a histogram found: the bin in which the running sum reaches the target, the sum before it, and its own.
struct Found {
  int bin;
  Sum before, own;
};

// What the running sum of weights, or the count of items, must come to.
struct Target {
  double value;
  bool is_count;
  bool is_passed;  // the sum must be larger, not equal

  __device__ bool is_reached(Sum sum) const {
    const double c = is_count ? static_cast<double>(sum.count) : static_cast<double>(sum.weight);
    return is_passed ? c > value : c >= value;
  }
};

// Shared memory of a block that selects.
struct Selection {
  uint32_t low[kBins], high[kBins], counts[kBins];  // 64-bit sums in halves: shared memory adds 32 bits at a time
  Sum warps[kSelectThreads / kWarp];
  Found found;
  uint64_t reduced[kSelectThreads / kWarp];
  uint64_t single;
  int first, last;  // bins
  int num_gathered;
};

// Tokens to select among: `values[i]` is the logit of token `ids[i]`, or of token i where ids is null.
struct Tokens {
  const uint32_t* ids;
  const float* values;
  int count;

  template <typename Visit>
  __device__ void for_each(const Visit& visit) const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kSelectThreads)
      visit(ids == nullptr ? static_cast<uint32_t>(i) : ids[i], values[i]);
  }
};

// All threads of the block call these functions.

__device__ inline void clear(Selection& s) {
  __syncthreads();  // whoever still reads
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) s.low[i] = s.high[i] = s.counts[i] = 0;
  if (threadIdx.x == 0) {
    s.first = kBins;
    s.last = -1;
  }
  __syncthreads();
}

// One token more in a bin; threads may come at once.
__device__ inline void add(Selection& s, int bin, uint64_t weight) {
  const auto low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&s.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before ? 1 : 0);
  if (high != 0) atomicAdd(&s.high[bin], high);
  atomicAdd(&s.counts[bin], 1u);
}

__device__ inline Sum sum_of_bin(const Selection& s, int bin) {
  return {static_cast<uint64_t>(s.high[bin]) << 32 | s.low[bin], s.counts[bin]};
}

// The sum over all threads up to this one.
__device__ inline Sum scan(Selection& s, Sum x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const Sum other{__shfl_up_sync(kAllLanes, x.weight, step), __shfl_up_sync(kAllLanes, x.count, step)};
    if (lane >= step) x = x + other;
  }
  __syncthreads();  // whoever still reads
  if (lane == kWarp - 1) s.warps[warp] = x;
  __syncthreads();
  for (int i = 0; i < warp; ++i) x = x + s.warps[i];
  return x;
}

// Sum and minimum over all threads.
template <typename Combine>
__device__ uint64_t reduce(Selection& s, uint64_t x, const Combine& combine) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, step));
  __syncthreads();  // whoever still reads
  if (threadIdx.x % kWarp == 0) s.reduced[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = s.reduced[0];
  for (int i = 1; i < kSelectThreads / kWarp; ++i) x = combine(x, s.reduced[i]);
  return x;
}

__device__ inline uint64_t total(Selection& s, uint64_t x) {
  return reduce(s, x, [](uint64_t a, uint64_t b) { return a + b; });
}

// `visit(id, logit)` of a row in global memory, with 32 KB under way in a multiprocessor where the row is aligned.
template <typename Visit>
__device__ void for_each_in_row(const float* row, int vocab, const Visit& visit) {
  constexpr int kBatch = 4, kStep = kSelectThreads * kBatch;
  const int vectors = reinterpret_cast<uintptr_t>(row) % sizeof(float4) == 0 ? vocab / 4 : 0;
  for (int begin = static_cast<int>(threadIdx.x); begin < vectors; begin += kStep) {
    float4 batch[kBatch];
    for (int i = 0; i < kBatch; ++i)
      batch[i] = reinterpret_cast<const float4*>(row)[min(begin + i * kSelectThreads, vectors - 1)];
    for (int i = 0; i < kBatch; ++i) {
      const int vector = begin + i * kSelectThreads;
      if (vector >= vectors) break;
      visit(4 * vector, batch[i].x);
      visit(4 * vector + 1, batch[i].y);
      visit(4 * vector + 2, batch[i].z);
      visit(4 * vector + 3, batch[i].w);
    }
  }
  for (int id = 4 * vectors + static_cast<int>(threadIdx.x); id < vocab; id += kSelectThreads) visit(id, row[id]);
}

// Copies the tokens of a row for which keep(id, logit), kGathered at most, to shared memory, in no order.
template <typename Keep>
__device__ Tokens gather(Selection& s, const float* row, int vocab, uint32_t* ids, float* values, const Keep& keep) {
  __syncthreads();  // whoever still reads
  if (threadIdx.x == 0) s.num_gathered = 0;
  __syncthreads();
  for_each_in_row(row, vocab, [&](int id, float logit) {
    if (!keep(id, logit)) return;
    const int at = atomicAdd(&s.num_gathered, 1);
    ids[at] = static_cast<uint32_t>(id);
    values[at] = logit;
  });
  __syncthreads();
  return {ids, values, s.num_gathered};
}

// The first bin at which the running sum, from `base` on, reaches the target; where rounding lets none, the last that
// holds a token. The histogram is complete and followed by a barrier.
__device__ inline Found find(Selection& s, const Target& target, Sum base) {
  const int begin = static_cast<int>(threadIdx.x) * kBinsOfThread;
  Sum own{0, 0};
  for (int i = 0; i < kBinsOfThread; ++i) own = own + sum_of_bin(s, begin + i);
  const Sum up_to = scan(s, own);
  const Sum before = base + Sum{up_to.weight - own.weight, up_to.count - own.count};
  Sum running = before;
  for (int i = 0; i < kBinsOfThread; ++i) {
    const Sum bin = sum_of_bin(s, begin + i);
    if (bin.count == 0) continue;
    running = running + bin;
    atomicMax(&s.last, begin + i);
    if (!target.is_reached(running)) continue;
    atomicMin(&s.first, begin + i);
    break;
  }
  __syncthreads();
  const int bin = s.first < kBins ? s.first : max(s.last, 0);
  if (bin >= begin && bin < begin + kBinsOfThread) {
    running = before;
    for (int i = begin; i < bin; ++i) running = running + sum_of_bin(s, i);
    s.found = {bin, running, sum_of_bin(s, bin)};
  }
  __syncthreads();
  return s.found;
}

struct Selected {
  uint64_t key;
  Sum before, own;  // of the tokens with smaller keys, and with this one
};

// The first token, in the order of keys of `bits` bits, whose running sum reaches the target. `visit(f)` calls
// f(key, weight) for the tokens that take part, where weight() computes it.
template <typename Visit>
__device__ Selected select(Selection& s, const Visit& visit, int bits, const Target& target, Sum base) {
  uint64_t prefix = 0;
  Found found{0, base, {0, 0}};
  for (int left = bits; left > 0;) {
    const int width = min(left, kDigit), above = left;
    left -= width;
    clear(s);
    visit([&](uint64_t key, const auto& weight) {
      if (above < bits && key >> above != prefix) return;
      add(s, static_cast<int>(key >> left & ((uint64_t{1} << width) - 1)), weight());
    });
    __syncthreads();
    found = find(s, target, found.before);
    prefix = prefix << width | static_cast<uint64_t>(found.bin);
    if (found.own.count != 1 || left == 0) continue;
    visit([&](uint64_t key, const auto&) {  // one token has this prefix
      if (key >> left == prefix) s.single = key;
    });
    __syncthreads();
    prefix = s.single;
    break;
  }
  return {prefix, found.before, found.own};
}

}  // namespace llmserve::cuda
