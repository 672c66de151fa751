// The sampler's edges; that it agrees with its definition is tested from Python against the reference executor.
#include <algorithm>
#include <vector>

#include "core/philox.h"
#include "cpu/sampler.h"
#include "tests/buffers.h"
#include "tests/tables.h"

namespace llmserve::test {

namespace {

struct Options {
  float temperature = 1.0f;
  int32_t top_k = 0;
  float top_p = 1.0f, min_p = 0.0f;
  uint64_t seed = 1;
  int64_t position = 1;
  int32_t target = -1, num_logprobs = -1;
};

struct Sampled {
  int32_t token = -1, rank = -1;
  float logprob = 0.0f;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

Sampled sample(const KernelTable& kernels, const Exact<float>& logits, const Options& options) {
  const auto vocab = static_cast<int64_t>(logits.size());
  const auto width = static_cast<size_t>(std::max(0, options.num_logprobs));
  Guarded<int32_t> top_ids(width);
  Guarded<float> top_logprobs(width);
  Exact<uint8_t> scratch(sampler_scratch_bytes(vocab));
  Sampled result;
  Step step;
  step.num_tokens = step.num_seqs = step.num_rows = 1;
  step.max_top = static_cast<int>(width);
  step.temperature = &options.temperature;
  step.top_k = &options.top_k;
  step.top_p = &options.top_p;
  step.min_p = &options.min_p;
  step.seed = &options.seed;
  step.sample_position = &options.position;
  step.targets = &options.target;
  step.num_logprobs = &options.num_logprobs;
  step.out_token_ids = &result.token;
  step.out_logprobs = &result.logprob;
  step.out_ranks = &result.rank;
  step.out_top_ids = top_ids.data();
  step.out_top_logprobs = top_logprobs.data();
  sample_row(kernels, step, 0, {logits.data(), vocab}, scratch.data());
  top_ids.check_zones("top ids");
  top_logprobs.check_zones("top logprobs");
  const size_t count = std::min(width, logits.size());
  result.top_ids.assign(top_ids.data(), top_ids.data() + count);
  result.top_logprobs.assign(top_logprobs.data(), top_logprobs.data() + count);
  return result;
}

Exact<float> random_logits(Random& random, int64_t vocab) {
  Exact<float> logits(static_cast<size_t>(vocab));
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = random.normal() * 4.0f;
  return logits;
}

Options random_options(Random& random) {
  Options options;
  options.temperature = random.chance(0.2) ? 0.0f : random.uniform(0.05f, 3.0f);
  options.top_k = random.chance(0.5) ? 0 : static_cast<int32_t>(random.integer(1, 1200));
  options.top_p = random.pick({1.0f, 0.9f, 0.5f, 1e-6f});
  options.min_p = random.pick({0.0f, 0.0f, 0.05f, 1.0f});
  options.seed = random.bits();
  options.position = random.integer(0, int64_t{1} << 40);
  options.num_logprobs = static_cast<int32_t>(random.integer(-1, 30));
  return options;
}

int32_t argmax(const Exact<float>& logits) {
  return static_cast<int32_t>(std::max_element(logits.data(), logits.data() + logits.size()) - logits.data());
}

constexpr int64_t kVocabs[] = {1, 2, 3, 255, 256, 257, 511, 1000};

}  // namespace

TEST(sampler_stays_within_the_vocabulary_and_its_buffers) {
  for (const auto& [name, kernels] : tables())
    for (int round = 0; round < 200; ++round) {
      const Exact<float> logits = random_logits(random, random.pick(kVocabs));
      const Options options = random_options(random);
      const Sampled found = sample(kernels, logits, options);
      const auto vocab = static_cast<int32_t>(logits.size());
      CHECK(found.token >= 0 && found.token < vocab, name);
      if (options.num_logprobs < 0) {
        CHECK(std::isnan(found.logprob) && found.rank == 0, name);
        continue;
      }
      CHECK(found.logprob <= 1e-6f && found.rank >= 1 && found.rank <= vocab, name);
      for (size_t i = 0; i < found.top_ids.size(); ++i) {
        CHECK(found.top_ids[i] >= 0 && found.top_ids[i] < vocab, name);
        if (i > 0) CHECK(found.top_logprobs[i] <= found.top_logprobs[i - 1], name);
      }
      if (!found.top_ids.empty()) CHECK(found.top_ids[0] == argmax(logits), name);
    }
}

TEST(sampler_is_the_same_in_every_table) {
  for (int round = 0; round < 200; ++round) {
    const Exact<float> logits = random_logits(random, random.pick(kVocabs));
    const Options options = random_options(random);
    const Sampled first = sample(tables().front().kernels, logits, options);
    for (const auto& [name, kernels] : tables()) {
      const Sampled found = sample(kernels, logits, options);
      CHECK(found.token == first.token && found.rank == first.rank, name);
      CHECK(std::memcmp(&found.logprob, &first.logprob, sizeof(float)) == 0, name);
      CHECK(found.top_ids == first.top_ids && found.top_logprobs == first.top_logprobs, name);
    }
  }
}

TEST(sampler_takes_the_lowest_id_among_equals) {
  const KernelTable& kernels = tables().back().kernels;
  Exact<float> logits(600);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = 1.5f;
  Options options;
  options.temperature = 0.0f;
  options.num_logprobs = 5;
  const Sampled greedy = sample(kernels, logits, options);
  CHECK(greedy.token == 0 && greedy.rank == 1);
  CHECK((greedy.top_ids == std::vector<int32_t>{0, 1, 2, 3, 4}));
  CHECK(std::fabs(greedy.logprob + std::log(600.0f)) < 1e-5f);
  options.temperature = 1.0f;
  options.top_k = 3;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    options.seed = seed;
    const int32_t expected = static_cast<int32_t>(philox_uniform(seed, 1) * 3);
    CHECK(sample(kernels, logits, options).token == expected, "seed ", seed);
  }
}

TEST(sampler_draws_all_equal_logits_by_the_inverse_distribution) {
  const KernelTable& kernels = tables().back().kernels;
  Exact<float> logits(1000);
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Options options;
    options.seed = seed;
    CHECK(sample(kernels, logits, options).token == static_cast<int32_t>(philox_uniform(seed, 1) * 1000), "seed ",
          seed);
  }
}

TEST(sampler_with_a_single_possible_token_draws_it) {
  const KernelTable& kernels = tables().back().kernels;
  for (int round = 0; round < 100; ++round) {
    Exact<float> logits(static_cast<size_t>(random.pick(kVocabs)));
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = -INFINITY;
    const auto only = static_cast<int32_t>(random.integer(0, static_cast<int64_t>(logits.size()) - 1));
    logits[static_cast<size_t>(only)] = random.normal();
    Options options = random_options(random);
    options.num_logprobs = 2;
    const Sampled found = sample(kernels, logits, options);
    CHECK(found.token == only && found.rank == 1 && std::fabs(found.logprob) < 1e-6f);
  }
}

TEST(sampler_with_top_k_one_tiny_top_p_or_full_min_p_is_greedy) {
  const KernelTable& kernels = tables().back().kernels;
  for (int round = 0; round < 60; ++round) {
    const Exact<float> logits = random_logits(random, random.pick(kVocabs));
    Options options;
    options.seed = random.bits();
    if (round % 3 == 0) options.top_k = 1;
    if (round % 3 == 1) options.top_p = 1e-9f;
    if (round % 3 == 2) options.min_p = 1.0f;
    CHECK(sample(kernels, logits, options).token == argmax(logits));
  }
}

TEST(sampler_scores_a_target_instead_of_drawing) {
  const KernelTable& kernels = tables().back().kernels;
  const Exact<float> logits = random_logits(random, 300);
  double total = 0.0;
  for (size_t i = 0; i < 300; ++i) total += std::exp(static_cast<double>(logits[i]));
  for (int32_t target = 0; target < 300; ++target) {
    Options options;
    options.target = target;
    options.num_logprobs = 0;
    const Sampled found = sample(kernels, logits, options);
    const float logit = logits[static_cast<size_t>(target)];
    CHECK(found.token == target);
    CHECK(std::fabs(found.logprob - (logit - std::log(total))) < 1e-5);
    CHECK(found.rank == 1 + std::count_if(logits.data(), logits.data() + 300, [&](float x) { return x > logit; }));
  }
}

// One that is not a number is enough, wherever it stands; -infinity is a logit like any other.
TEST(sampler_reports_logits_that_are_not_finite) {
  for (const auto& [name, kernels] : tables())
    for (int round = 0; round < 300; ++round) {
      Exact<float> logits = random_logits(random, random.pick(kVocabs));
      const double share = random.pick({0.01, 0.5, 1.0});
      const float odd = random.pick({INFINITY, -INFINITY, std::nanf(""), 3.4e38f, -3.4e38f});
      for (size_t i = 0; i < logits.size(); ++i)
        if (random.chance(share)) logits[i] = odd;
      Options options = random_options(random);
      bool has_nan = false;
      float largest = -INFINITY;
      for (size_t i = 0; i < logits.size(); ++i) {
        has_nan = has_nan || std::isnan(logits[i]);
        largest = std::max(largest, logits[i]);
      }
      if (random.chance(0.3)) options.target = 0;
      const Sampled found = sample(kernels, logits, options);
      if (has_nan || !std::isfinite(largest)) {
        CHECK(found.token == kNotFinite && std::isnan(found.logprob), name, " ", odd);
      } else {
        CHECK(found.token >= 0 && found.token < static_cast<int32_t>(logits.size()), name, " ", odd);
      }
    }
}

}  // namespace llmserve::test
