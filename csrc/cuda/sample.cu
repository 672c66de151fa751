// Three kernels. The first two give every chunk of 4,096 logits of every row a block, so that one row of 128k logits
// has 32 multiprocessors:
//
//   inspect: the largest logit and its token, the smallest, whether there is a NaN           → facts of the chunk
//   weigh:   the sum of weights of the chunk, and a histogram of the row by distance from the largest logit:
//            how many tokens and how much weight in each of 2,048 bins                       → sums, bins
//   choose:  a block per row finds the bin in which a filter ends, gathers the tokens up to there into shared memory
//            (only from segments of 256 logits whose largest is in them) and selects among them: top-k, typical_p,
//            top-p, then the draw in ascending id. Among 512 or fewer each thread adds up what is before its token
//
// Rows that are scored, greedy or void leave weigh at once and choose after a few reads. A row without filters gathers
// nothing: the chunk's sums say in which chunk the draw falls. Where more tokens pass than shared memory takes, only
// the bin in which the filter ends is gathered, and the draw walks the row itself; where even that bin is too large,
// selection reads the row digit by digit: right, and slow.
//
// Weights are whole numbers (sampling.h), 2^(62 - bits of an id) for the largest: with a vocabulary of 2^17 an error of
// 2^-46 of the largest weight each, so a token differs from the definition's only where a draw or a threshold lies
// within about 2^-46 * sqrt(vocabulary), 5e-12, of a boundary (2^-29 if all errors had one sign). The result depends on
// nothing else in the batch.
//
// choose takes some 120 registers and 100 KB of shared memory: one block a multiprocessor, 132 rows at once on an H100.
#include "cuda/sample.h"

#include "cuda/sampling.h"

namespace llmserve::cuda {

namespace {

constexpr int kChunk = 4096;  // logits of a block of the first two kernels
constexpr int kMostChunks = static_cast<int>(kMostVocab / kChunk);
constexpr int kOfThread = kChunk / kSelectThreads;
constexpr int kWarps = kSelectThreads / kWarp;
constexpr int kFew = kSelectThreads;       // tokens that are filtered without selection
constexpr int kSegment = kChunk / kWarps;  // logits of a warp of inspect

struct Facts {
  uint64_t best;         // rank key of the largest logit
  uint32_t raw_largest;  // descending keys: the largest is the smallest key
  uint32_t least;        // of the logits that are not -infinity
  uint32_t has_nan;
  uint32_t raw_has_nan;
};

// Where things lie in the workspace.
struct Workspace {
  Facts* facts;              // [rows][chunks]
  uint64_t* sums;            // [rows][chunks]
  unsigned long long* bins;  // [rows][kBins] weights
  uint32_t* counts;          // [rows][kBins]
  uint32_t* segments;        // [rows][chunks * kWarps] descending keys of the largest logits
  int chunks;

  __host__ __device__ Workspace(const SampleArgs& args) : chunks(static_cast<int>((args.vocab + kChunk - 1) / kChunk)) {
    facts = static_cast<Facts*>(args.workspace);
    sums = reinterpret_cast<uint64_t*>(facts + args.rows * chunks);
    bins = reinterpret_cast<unsigned long long*>(sums + args.rows * chunks);
    counts = reinterpret_cast<uint32_t*>(bins + args.rows * kBins);
    segments = counts + args.rows * kBins;
  }
};

// What a row is sampled with.
struct Row {
  const float* logits;  // what is sampled from
  const float* raw;
  int vocab, bits;  // of an id
  double inverse_temperature, top_p, min_p, typical_p;
  int top_k;
  bool is_scored, is_greedy;

  __device__ Row(const SampleArgs& args, int64_t row)
      : vocab(static_cast<int>(args.vocab)), bits(id_bits(args.vocab)), top_k(args.top_k[row]) {
    raw = args.logits + row * args.logits_stride;
    const int32_t edited = args.edited_rows == nullptr ? -1 : args.edited_rows[row];
    logits = edited < 0 ? raw : args.edited + edited * args.edited_stride;
    is_scored = args.targets[row] >= 0;
    is_greedy = args.temperature[row] == 0.0f;
    inverse_temperature = 1.0 / static_cast<double>(args.temperature[row]);
    top_p = args.top_p[row];
    min_p = args.min_p[row];
    typical_p = args.typical_p == nullptr ? 1.0f : args.typical_p[row];
    if (top_k <= 0 || top_k >= vocab) top_k = 0;
  }

  __device__ bool is_filtered() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0 || typical_p < 1.0; }
};

// What all chunks of a row say together.
struct RowFacts {
  uint64_t best;
  float largest, raw_largest, least;
  bool has_nan, raw_has_nan;

  __device__ bool is_finite() const { return !raw_has_nan && raw_largest - raw_largest == 0.0f && !has_nan; }
  __device__ float scale() const { return bins_per_logit(largest, least); }
};

__device__ double weight_of(float logit, float largest, double inverse_temperature) {
  return exp((static_cast<double>(logit) - static_cast<double>(largest)) * inverse_temperature);
}

__device__ uint64_t whole(double weight, int bits) {
  return static_cast<uint64_t>(__double2ull_rn(weight * static_cast<double>(uint64_t{1} << (62 - bits))));
}

template <typename T>
__device__ T from_lane(T x, int with) {
  return __shfl_xor_sync(kAllLanes, x, with);
}

__device__ Facts from_lane(const Facts& x, int with) {
  return {from_lane(x.best, with), from_lane(x.raw_largest, with), from_lane(x.least, with), from_lane(x.has_nan, with),
          from_lane(x.raw_has_nan, with)};
}

template <typename T, typename Combine>
__device__ T over_warp(T x, const Combine& combine) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = combine(x, from_lane(x, step));
  return x;
}

__device__ Facts join(const Facts& x, const Facts& y) {
  return {min(x.best, y.best), min(x.raw_largest, y.raw_largest), max(x.least, y.least), x.has_nan | y.has_nan,
          x.raw_has_nan | y.raw_has_nan};
}

__device__ Facts over_warp(Facts x) {
  return over_warp(x, [](const Facts& own, const Facts& other) { return join(own, other); });
}

__device__ constexpr Facts nothing_known() { return {~uint64_t{0}, ~0u, 0, 0, 0}; }

__global__ void __launch_bounds__(kSelectThreads) inspect_kernel(SampleArgs args) {
  const int64_t index = blockIdx.y;
  const Row row(args, index);
  const Workspace workspace(args);
  const int chunk = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int segment = chunk * kWarps + thread / kWarp;
  Facts facts = nothing_known();
  for (int i = 0; i < kOfThread; ++i) {
    const int id = segment * kSegment + i * kWarp + thread % kWarp;
    if (id >= row.vocab) continue;
    const float raw = row.raw[id], logit = row.logits[id];
    facts = join(facts, {rank_key(logit, static_cast<uint32_t>(id), row.bits), descending(raw),
                         logit == -INFINITY ? 0 : descending(logit), logit != logit, raw != raw});
  }
  facts = over_warp(facts);
  __shared__ Facts warps[kWarps];
  if (thread % kWarp == 0) {
    warps[thread / kWarp] = facts;
    workspace.segments[index * workspace.chunks * kWarps + segment] = static_cast<uint32_t>(facts.best >> row.bits);
  }
  for (int i = chunk * kSelectThreads + thread; i < kBins; i += workspace.chunks * kSelectThreads) {
    workspace.bins[index * kBins + i] = 0;
    workspace.counts[index * kBins + i] = 0;
  }
  __syncthreads();
  if (thread >= kWarp) return;
  facts = over_warp(thread < kWarps ? warps[thread] : nothing_known());
  if (thread == 0) workspace.facts[index * workspace.chunks + chunk] = facts;
}

// All threads of the block call it, each warp by itself.
__device__ RowFacts facts_of(const Workspace& workspace, int64_t row, int bits) {
  Facts facts = nothing_known();
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < workspace.chunks; i += kWarp)
    facts = join(facts, workspace.facts[row * workspace.chunks + i]);
  facts = over_warp(facts);
  return {facts.best,
          logit_of(static_cast<uint32_t>(facts.best >> bits)),
          logit_of(facts.raw_largest),
          logit_of(facts.least),
          facts.has_nan != 0,
          facts.raw_has_nan != 0};
}

__global__ void __launch_bounds__(kSelectThreads) weigh_kernel(SampleArgs args) {
  const int64_t index = blockIdx.y;
  const Row row(args, index);
  if (row.is_scored || row.is_greedy) return;
  const Workspace workspace(args);
  const RowFacts facts = facts_of(workspace, index, row.bits);
  if (!facts.is_finite() || facts.largest == -INFINITY) return;
  Selection& s = *dynamic_shared<Selection>();
  const int chunk = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const bool is_filtered = row.is_filtered();
  const float scale = facts.scale();
  clear(s);
  uint64_t sum = 0;
  for (int i = 0; i < kOfThread; ++i) {
    const int id = chunk * kChunk + i * kSelectThreads + thread;
    if (id >= row.vocab) continue;
    const float logit = row.logits[id];
    const uint64_t weight = whole(weight_of(logit, facts.largest, row.inverse_temperature), row.bits);
    sum += weight;
    if (is_filtered) add(s, bin_of(logit, facts.largest, scale), weight);
  }
  sum = total(s, sum);
  if (thread == 0) workspace.sums[index * workspace.chunks + chunk] = sum;
  if (!is_filtered) return;
  for (int bin = thread; bin < kBins; bin += kSelectThreads) {
    const Sum own = sum_of_bin(s, bin);
    if (own.count == 0) continue;
    atomicAdd(&workspace.counts[index * kBins + bin], own.count);
    atomicAdd(&workspace.bins[index * kBins + bin], static_cast<unsigned long long>(own.weight));
  }
}

// The tokens that the filters so far leave.
struct Kept {
  uint64_t limit = ~uint64_t{0};  // the last rank key
  int bits;
  float largest;
  double inverse_temperature;
  bool is_typical = false;  // typical_p has chosen: by distance of the surprise from its mean, then by rank
  double mean = 0.0, most = 0.0;
  uint64_t limit_at_most = ~uint64_t{0};
  double least_weight = 0.0;

  __device__ double weight(float logit) const { return weight_of(logit, largest, inverse_temperature); }
  __device__ uint64_t whole_weight(float logit) const { return whole(weight(logit), bits); }
  // log(sum of weights) more or less: what -log p is in excess of it.
  __device__ double surprise(float logit) const {
    return (static_cast<double>(largest) - static_cast<double>(logit)) * inverse_temperature;
  }
  __device__ double distance(float logit) const { return fabs(surprise(logit) - mean); }
  __device__ bool holds(uint32_t id, float logit) const {
    const uint64_t key = rank_key(logit, id, bits);
    if (key > limit) return false;
    if (is_typical) {
      const double own = distance(logit);
      if (own > most || (own == most && key > limit_at_most) || whole_weight(logit) == 0) return false;
    }
    return least_weight == 0.0 || weight(logit) >= least_weight;
  }
};

struct Chooser {
  Selection& s;
  uint32_t* ids;   // [kGathered]
  float* values;   // [kGathered]
  uint64_t* sums;  // [kMostChunks]
  const uint32_t* segments;
  const Row& row;
  const RowFacts& facts;
  float scale;
  Tokens tokens;  // to select among
  bool has_all;   // of the tokens that can survive
  Kept kept;
  uint64_t sum = 0;  // of the weights of what the filters before top_p or typical_p leave

  // The histogram of weigh.
  __device__ void load_bins(const Workspace& workspace, int64_t index) {
    clear(s);
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) {
      const uint64_t weight = workspace.bins[index * kBins + i];
      s.low[i] = static_cast<uint32_t>(weight);
      s.high[i] = static_cast<uint32_t>(weight >> 32);
      s.counts[i] = workspace.counts[index * kBins + i];
    }
    __syncthreads();
  }

  __device__ int bin(float logit) const { return bin_of(logit, facts.largest, scale); }

  // Copies the tokens of a range of bins to shared memory, in no order. A lane knows the largest logit of a segment;
  // of the segments that reach the bins a warp has two under way.
  __device__ void gather_bins(int first, int last) {
    __syncthreads();  // whoever still reads
    if (threadIdx.x == 0) s.num_gathered = 0;
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int num_segments = (row.vocab + kSegment - 1) / kSegment;
    for (int begin = warp; begin < num_segments; begin += kSelectThreads) {
      const int own = begin + lane * kWarps;
      const bool is_hit = own < num_segments && bin(logit_of(segments[own])) <= last;
      for (unsigned hits = __ballot_sync(kAllLanes, is_hit); hits != 0;) {
        const int one = begin + (__ffs(static_cast<int>(hits)) - 1) * kWarps;
        hits &= hits - 1;
        const int other = hits == 0 ? -1 : begin + (__ffs(static_cast<int>(hits)) - 1) * kWarps;
        hits &= hits - 1;  // of none it leaves none
        take_segments(one * kSegment, other < 0 ? row.vocab : other * kSegment, first, last);
      }
    }
    __syncthreads();
    tokens = {ids, values, s.num_gathered};
  }

  // The tokens from two ids on that are in a range of bins; what is past the row is none.
  __device__ void take_segments(int one, int other, int first, int last) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    float batch[2 * kOfThread];
    const auto id_at = [&](int i) { return (i < kOfThread ? one : other) + i % kOfThread * kWarp + lane; };
    for (int i = 0; i < 2 * kOfThread; ++i) batch[i] = id_at(i) < row.vocab ? row.logits[id_at(i)] : -INFINITY;
    for (int i = 0; i < 2 * kOfThread; ++i) {
      const int own = bin(batch[i]);
      if (id_at(i) >= row.vocab || own < first || own > last) continue;
      const int at = atomicAdd(&s.num_gathered, 1);
      ids[at] = static_cast<uint32_t>(id_at(i));
      values[at] = batch[i];
    }
  }

  // Prepares to select in `end.bin`, where a filter ends.
  __device__ void bring(const Found& end) {
    if (has_all) return;
    has_all = end.before.count + end.own.count <= kGathered;
    if (has_all || end.own.count <= kGathered)
      gather_bins(has_all ? 0 : end.bin, end.bin);
    else
      tokens = {nullptr, row.logits, row.vocab};
  }

  // The token of that bin at which a filter ends becomes the last that is kept. Returns the sums up to it.
  __device__ Sum cut(const Found& end, const Target& target) {
    bring(end);
    const auto visit = [&](const auto& use) {
      tokens.for_each([&](uint32_t id, float logit) {
        if (bin(logit) == end.bin && kept.holds(id, logit))
          use(rank_key(logit, id, row.bits), [&] { return kept.whole_weight(logit); });
      });
    };
    const Selected selected = select(s, visit, 32 + row.bits, target, end.before);
    kept.limit = selected.key;
    return selected.before + selected.own;
  }

  // typical_p, and top_p among what it leaves.
  __device__ void apply_typical() {
    if (!has_all) {
      has_all = row.vocab <= kGathered;
      if (has_all)
        gather_bins(0, kBins - 1);
      else
        tokens = {nullptr, row.logits, row.vocab};
    }
    uint64_t excess = 0;
    tokens.for_each([&](uint32_t id, float logit) {
      const double weight = kept.weight(logit);
      if (weight > 0.0 && kept.holds(id, logit)) excess += whole(weight * kept.surprise(logit), row.bits);
    });
    kept.mean = static_cast<double>(total(s, excess)) / static_cast<double>(sum);
    const Target target{row.typical_p * static_cast<double>(sum), false, false};
    const auto with_weight = [&](const auto& use) {
      tokens.for_each([&](uint32_t id, float logit) {
        const uint64_t weight = kept.whole_weight(logit);
        if (weight > 0 && kept.holds(id, logit)) use(id, logit, [=] { return weight; });
      });
    };
    const auto by_distance = [&](const auto& use) {
      with_weight([&](uint32_t, float logit, const auto& weight) {
        use(static_cast<uint64_t>(__double_as_longlong(kept.distance(logit))), weight);
      });
    };
    const Selected last = select(s, by_distance, 63, target, Sum{0, 0});
    const double most = __longlong_as_double(static_cast<long long>(last.key));
    const auto by_rank = [&](const auto& use) {
      with_weight([&](uint32_t id, float logit, const auto& weight) {
        if (kept.distance(logit) == most) use(rank_key(logit, id, row.bits), weight);
      });
    };
    const Selected tie = select(s, by_rank, 32 + row.bits, target, last.before);
    kept.is_typical = true;
    kept.most = most;
    kept.limit_at_most = tie.key;
    cut_typical(tie.before + tie.own);
  }

  // top_p behind typical_p: the histogram of the row says nothing of what is left.
  __device__ void cut_typical(Sum sum) {
    if (row.top_p >= 1.0) return;
    const auto visit = [&](const auto& use) {
      tokens.for_each([&](uint32_t id, float logit) {
        if (kept.holds(id, logit)) use(rank_key(logit, id, row.bits), [&] { return kept.whole_weight(logit); });
      });
    };
    const Target target{row.top_p * static_cast<double>(sum.weight), false, false};
    kept.limit = select(s, visit, 32 + row.bits, target, Sum{0, 0}).key;
  }

  __device__ void apply_min_p() {
    if (row.min_p <= 0.0) return;
    double most = 1.0;
    if (kept.is_typical) {
      uint64_t best = ~uint64_t{0};
      tokens.for_each([&](uint32_t id, float logit) {
        if (kept.holds(id, logit)) best = min(best, rank_key(logit, id, row.bits));
      });
      best = reduce(s, best, [](uint64_t a, uint64_t b) { return min(a, b); });
      most = kept.weight(logit_of(static_cast<uint32_t>(best >> row.bits)));
    }
    kept.least_weight = row.min_p * most;
  }

  // The bin behind which no token passes min_p.
  __device__ int last_bin_of_min_p() const {
    if (row.min_p <= 0.0) return kBins - 1;
    const double distance = -log(row.min_p) / row.inverse_temperature;
    return min(kBins - 1, bin_of_distance(static_cast<float>(distance * 1.00001), scale) + 1);
  }

  // Every filter, in order. True when few tokens can survive: they are gathered, and not filtered yet.
  __device__ bool filter(const Workspace& workspace, int64_t index) {
    load_bins(workspace, index);
    uint64_t own = 0;
    for (int i = static_cast<int>(threadIdx.x); i < workspace.chunks; i += kSelectThreads)
      own += workspace.sums[index * workspace.chunks + i];
    sum = total(s, own);
    const bool is_typical = row.typical_p < 1.0;
    const bool cuts = row.top_k > 0 || (row.top_p < 1.0 && !is_typical);
    const Target first = row.top_k > 0 ? Target{static_cast<double>(row.top_k), true, false}
                                       : Target{row.top_p * static_cast<double>(sum), false, false};
    Found end{kBins - 1, {0, 0}, {0, 0}};
    if (cuts) end = find(s, first, Sum{0, 0});
    // Before min_p at most one filter that cuts keeps all that min_p may keep, if it ends behind it.
    const bool is_one = !is_typical && (row.top_k == 0 || row.top_p >= 1.0);
    const int last = is_one ? min(end.bin, last_bin_of_min_p()) : end.bin;
    const uint64_t count = count_up_to(last);
    if (!is_typical && count <= kFew) {
      gather_bins(0, last);
      return true;
    }
    if (is_one && (last < end.bin || !cuts)) {
      has_all = count <= kGathered;
      if (has_all) gather_bins(0, last);
    } else {
      if (cuts) sum = cut(end, first).weight;
      if (is_typical) {
        apply_typical();
      } else if (row.top_k > 0 && row.top_p < 1.0) {
        load_bins(workspace, index);
        const Target target{row.top_p * static_cast<double>(sum), false, false};
        cut(find(s, target, Sum{0, 0}), target);
      }
    }
    apply_min_p();
    return false;
  }

  __device__ uint64_t count_up_to(int last) {
    uint64_t count = 0;
    for (int i = static_cast<int>(threadIdx.x); i <= last; i += kSelectThreads) count += s.counts[i];
    return total(s, count);
  }

  // Filters and draws among few tokens, one a thread: each adds up those before it.
  __device__ int draw_among_few(double uniform, uint64_t* keys, uint64_t* weights) {
    const auto thread = static_cast<int>(threadIdx.x);
    const bool exists = thread < tokens.count;
    const uint32_t id = exists ? tokens.ids[thread] : 0;
    const float logit = exists ? tokens.values[thread] : -INFINITY;
    const uint64_t key = rank_key(logit, id, row.bits), weight = exists ? kept.whole_weight(logit) : 0;
    keys[thread] = key;
    weights[thread] = weight;
    __syncthreads();
    int rank = 0;
    uint64_t before = 0;
    for (int i = 0; i < tokens.count; ++i) {
      if (keys[i] >= key) continue;
      ++rank;
      before += weights[i];
    }
    bool survives = exists && (row.top_k == 0 || rank < row.top_k);
    if (row.top_k > 0) sum = total(s, survives ? weight : 0);
    if (row.top_p < 1.0)
      survives = survives && (rank == 0 || static_cast<double>(before) < row.top_p * static_cast<double>(sum));
    survives = survives && kept.weight(logit) >= row.min_p;
    __syncthreads();  // whoever still reads
    weights[thread] = survives ? weight : 0;
    if (thread == 0) s.first = row.vocab;
    const double target = uniform * static_cast<double>(total(s, weights[thread]));
    uint64_t running = 0;
    for (int i = 0; i < tokens.count; ++i)
      if (id_of(keys[i]) <= static_cast<int>(id)) running += weights[i];
    if (survives && static_cast<double>(running) > target) atomicMin(&s.first, static_cast<int>(id));
    __syncthreads();
    return s.first < row.vocab ? s.first : id_of(facts.best);
  }

  __device__ int id_of(uint64_t key) const { return static_cast<int>(key & ((uint64_t{1} << row.bits) - 1)); }

  // The sum of weights of what is kept in each chunk of the row, a warp for a chunk.
  __device__ void sum_chunks(int chunks) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int chunk = static_cast<int>(threadIdx.x) / kWarp; chunk < chunks; chunk += kSelectThreads / kWarp) {
      uint64_t sum = 0;
      for (int id = chunk * kChunk + lane; id < min((chunk + 1) * kChunk, row.vocab); id += kWarp)
        if (kept.holds(static_cast<uint32_t>(id), row.logits[id])) sum += kept.whole_weight(row.logits[id]);
      sum = over_warp(sum, [](uint64_t a, uint64_t b) { return a + b; });
      if (lane == 0) sums[chunk] = sum;
    }
    __syncthreads();
  }

  // The draw over the row itself, from the sums of its chunks.
  __device__ int draw_in_row(double uniform, int chunks) {
    uint64_t all = 0;
    for (int i = 0; i < chunks; ++i) all += sums[i];
    const double target = uniform * static_cast<double>(all);
    uint64_t before = 0;
    int chunk = 0;
    while (chunk + 1 < chunks && static_cast<double>(before + sums[chunk]) <= target) before += sums[chunk++];
    const int begin = chunk * kChunk + static_cast<int>(threadIdx.x) * kOfThread;
    const int end = min(begin + kOfThread, row.vocab);
    uint64_t own = 0;
    for (int id = begin; id < end; ++id)
      if (kept.holds(static_cast<uint32_t>(id), row.logits[id])) own += kept.whole_weight(row.logits[id]);
    uint64_t running = before + scan(s, {own, 0}).weight - own;
    if (threadIdx.x == 0) s.first = row.vocab;
    __syncthreads();
    for (int id = begin; id < end; ++id) {
      if (!kept.holds(static_cast<uint32_t>(id), row.logits[id])) continue;
      running += kept.whole_weight(row.logits[id]);
      if (static_cast<double>(running) <= target) continue;
      atomicMin(&s.first, id);
      break;
    }
    __syncthreads();
    return s.first < row.vocab ? s.first : id_of(facts.best);
  }

  // The draw over tokens in shared memory: a selection by id.
  __device__ int draw_gathered(double uniform) {
    uint64_t all = 0;
    tokens.for_each([&](uint32_t id, float logit) {
      if (kept.holds(id, logit)) all += kept.whole_weight(logit);
    });
    all = total(s, all);
    const auto visit = [&](const auto& use) {
      tokens.for_each([&](uint32_t id, float logit) {
        if (kept.holds(id, logit)) use(uint64_t{id}, [&] { return kept.whole_weight(logit); });
      });
    };
    const Target target{uniform * static_cast<double>(all), false, true};
    return static_cast<int>(select(s, visit, row.bits, target, Sum{0, 0}).key);
  }
};

struct ChooseShared {
  Selection selection;
  uint32_t ids[kGathered];
  float values[kGathered];
  uint64_t sums[kMostChunks];
  uint64_t few_keys[kFew], few_weights[kFew];
};

__global__ void __launch_bounds__(kSelectThreads) choose_kernel(SampleArgs args) {
  const int64_t index = blockIdx.x;
  const Row row(args, index);
  const Workspace workspace(args);
  const RowFacts facts = facts_of(workspace, index, row.bits);
  const bool is_void = facts.raw_has_nan || facts.raw_largest - facts.raw_largest != 0.0f;
  int token = 0;
  if (is_void || (facts.has_nan && !row.is_scored)) {
    token = kNotFinite;
  } else if (row.is_scored) {
    token = args.targets[index];
  } else if (facts.largest == -INFINITY) {
    token = kNoToken;
  } else if (row.is_greedy) {
    token = static_cast<int>(facts.best & ((uint64_t{1} << row.bits) - 1));
  } else {
    auto& shared = *dynamic_shared<ChooseShared>();
    Kept kept;
    kept.bits = row.bits;
    kept.largest = facts.largest;
    kept.inverse_temperature = row.inverse_temperature;
    Chooser chooser{shared.selection,
                    shared.ids,
                    shared.values,
                    shared.sums,
                    workspace.segments + index * workspace.chunks * kWarps,
                    row,
                    facts,
                    facts.scale(),
                    Tokens{nullptr, row.logits, row.vocab},
                    false,
                    kept};
    const double uniform =
        philox_uniform(static_cast<uint64_t>(args.seed[index]), static_cast<uint64_t>(args.sample_position[index]));
    if (!row.is_filtered()) {
      for (int i = static_cast<int>(threadIdx.x); i < workspace.chunks; i += kSelectThreads)
        shared.sums[i] = workspace.sums[index * workspace.chunks + i];
      __syncthreads();
      token = chooser.draw_in_row(uniform, workspace.chunks);
    } else if (chooser.filter(workspace, index)) {
      token = chooser.draw_among_few(uniform, shared.few_keys, shared.few_weights);
    } else if (chooser.has_all) {
      token = chooser.draw_gathered(uniform);
    } else {
      chooser.sum_chunks(workspace.chunks);
      token = chooser.draw_in_row(uniform, workspace.chunks);
    }
  }
  if (threadIdx.x == 0) args.token_ids[index] = token;
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int64_t llmserve_cuda_sample_workspace(int64_t rows, int64_t vocab) {
  using namespace llmserve::cuda;
  SampleArgs args{};
  args.rows = rows;
  args.vocab = vocab;
  const Workspace workspace(args);
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(workspace.segments + rows * workspace.chunks * kWarps));
}

LLMSERVE_CUDA_API int32_t llmserve_cuda_sample(const llmserve::cuda::SampleArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->rows == 0) return cudaSuccess;
  if (args->rows < 0 || args->rows > 65535 || args->vocab <= 0 || args->vocab > kMostVocab)
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  const auto rows = static_cast<unsigned>(args->rows);
  const dim3 chunks(static_cast<unsigned>((args->vocab + kChunk - 1) / kChunk), rows);
  cudaError_t status = launch(inspect_kernel, chunks, kSelectThreads, 0, on, *args);
  if (status != cudaSuccess) return status;
  status = launch(weigh_kernel, chunks, kSelectThreads, sizeof(Selection), on, *args);
  if (status != cudaSuccess) return status;
  return launch(choose_kernel, rows, kSelectThreads, sizeof(ChooseShared), on, *args);
}
