// A block per row that asks; the others end at once. It reads the row three times: the largest logit; the sum of
// exponentials, the rank and a histogram by distance from the largest; and the tokens of the bins that hold the most
// likely ones, gathered into shared memory, where each counts those before it. More than shared memory takes come in
// batches, whose ends are selected in the row: right, and slow.
//
// Exponentials are float32, summed in double in an order of the row alone: a log-probability is wrong by 2e-7 or so.
//
// 64 registers and 90 KB of shared memory: two blocks a multiprocessor.
#include "cuda/token_logprobs.h"

#include "cuda/sampling.h"

namespace llmserve::cuda {

namespace {

struct Shared {
  Selection selection;
  uint32_t ids[kGathered];
  float values[kGathered];
};

struct Normalizer {
  double largest, log_sum;

  __device__ float logprob(float logit) const {
    return static_cast<float>(static_cast<double>(logit) - largest - log_sum);
  }
};

__device__ uint64_t to_bits(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
__device__ double from_bits(uint64_t x) { return __longlong_as_double(static_cast<long long>(x)); }

// Puts what was gathered, and is all between `position` and the tokens behind, where it belongs.
__device__ void place(const TokenLogprobsArgs& args, int64_t row, const Tokens& tokens, int bits, int position,
                      int count, const Normalizer& normalizer) {
  tokens.for_each([&](uint32_t id, float logit) {
    const uint64_t key = rank_key(logit, id, bits);
    int at = position;
    for (int i = 0; i < tokens.count; ++i) at += rank_key(tokens.values[i], tokens.ids[i], bits) < key ? 1 : 0;
    if (at >= count) return;
    args.top_ids[row * args.most + at] = static_cast<int32_t>(id);
    args.top_logprobs[row * args.most + at] = normalizer.logprob(logit);
  });
}

// The `count` most likely tokens; the selection holds the histogram.
__device__ void write_top(const TokenLogprobsArgs& args, int64_t row, const float* logits, int count, float largest,
                          float scale, const Normalizer& normalizer, Shared& shared) {
  Selection& s = shared.selection;
  const int vocab = static_cast<int>(args.vocab), bits = id_bits(args.vocab);
  const Found end = find(s, {static_cast<double>(count), true, false}, {0, 0});
  if (end.before.count + end.own.count <= kGathered) {
    const auto keep = [&](int, float logit) { return bin_of(logit, largest, scale) <= end.bin; };
    place(args, row, gather(s, logits, vocab, shared.ids, shared.values, keep), bits, 0, count, normalizer);
    return;
  }
  uint64_t next = 0;  // the smallest key that has no place yet
  for (int position = 0; position < count;) {
    const int num = min(count - position, kGathered);
    const auto visit = [&](const auto& use) {
      for_each_in_row(logits, vocab, [&](int id, float logit) {
        const uint64_t key = rank_key(logit, static_cast<uint32_t>(id), bits);
        if (key >= next) use(key, [] { return uint64_t{1}; });
      });
    };
    const uint64_t last = select(s, visit, 32 + bits, {static_cast<double>(num), true, false}, {0, 0}).key;
    const auto keep = [&](int id, float logit) {
      const uint64_t key = rank_key(logit, static_cast<uint32_t>(id), bits);
      return key >= next && key <= last;
    };
    place(args, row, gather(s, logits, vocab, shared.ids, shared.values, keep), bits, position, count, normalizer);
    position += num;
    next = last + 1;
  }
}

// Marks what nothing is said of.
__device__ void fill(const TokenLogprobsArgs& args, int64_t row, bool has_token, int count) {
  if (threadIdx.x == 0 && !has_token) {
    args.logprobs[row] = NAN;
    args.ranks[row] = 0;
  }
  for (int64_t i = count + static_cast<int64_t>(threadIdx.x); i < args.most; i += kSelectThreads) {
    args.top_ids[row * args.most + i] = -1;
    args.top_logprobs[row * args.most + i] = NAN;
  }
}

__global__ void __launch_bounds__(kSelectThreads) token_logprobs_kernel(TokenLogprobsArgs args) {
  const int64_t row = blockIdx.x;
  const int token = args.token_ids[row], vocab = static_cast<int>(args.vocab);
  const bool is_asked = token >= 0 && args.num_logprobs[row] >= 0;
  const int most = static_cast<int>(min(args.most, args.vocab));
  const int count = is_asked ? min(args.num_logprobs[row], most) : 0;
  fill(args, row, is_asked, count);
  if (!is_asked) return;
  auto& shared = *dynamic_shared<Shared>();
  Selection& s = shared.selection;
  const float* logits = args.logits + row * args.logits_stride;
  uint32_t best = ~0u, worst = 0;  // descending keys; -infinity is no end of the bins
  for_each_in_row(logits, vocab, [&](int, float logit) {
    best = min(best, descending(logit));
    if (logit != -INFINITY) worst = max(worst, descending(logit));
  });
  const uint64_t ends = reduce(s, uint64_t{best} << 32 | ~worst, [](uint64_t a, uint64_t b) {
    return min(a >> 32, b >> 32) << 32 | min(a & 0xFFFFFFFFu, b & 0xFFFFFFFFu);
  });
  const float largest = logit_of(static_cast<uint32_t>(ends >> 32));
  const float scale = bins_per_logit(largest, logit_of(~static_cast<uint32_t>(ends)));
  const float own = logits[token];
  clear(s);
  double sum = 0.0;
  int larger = 0;
  for_each_in_row(logits, vocab, [&](int, float logit) {
    sum += static_cast<double>(expf(__fsub_rn(logit, largest)));
    larger += logit > own ? 1 : 0;
    if (count > 0) add(s, bin_of(logit, largest, scale), 0);
  });
  sum = from_bits(reduce(s, to_bits(sum), [](uint64_t a, uint64_t b) { return to_bits(from_bits(a) + from_bits(b)); }));
  const uint64_t before = total(s, static_cast<uint64_t>(larger));
  const Normalizer normalizer{static_cast<double>(largest), log(sum)};
  if (threadIdx.x == 0) {
    args.logprobs[row] = normalizer.logprob(own);
    args.ranks[row] = 1 + static_cast<int32_t>(before);
  }
  if (count > 0) write_top(args, row, logits, count, largest, scale, normalizer, shared);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_token_logprobs(const llmserve::cuda::TokenLogprobsArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->rows == 0) return cudaSuccess;
  if (args->rows < 0 || args->rows > INT32_MAX || args->vocab <= 0 || args->vocab > kMostVocab || args->most < 0)
    return cudaErrorInvalidValue;
  return launch(token_logprobs_kernel, static_cast<unsigned>(args->rows), kSelectThreads, sizeof(Shared),
                static_cast<cudaStream_t>(stream), *args);
}
