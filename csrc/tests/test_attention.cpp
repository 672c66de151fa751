// Paged attention against double, and every query against itself alone.
#include <algorithm>
#include <vector>

#include "tests/buffers.h"
#include "tests/numbers.h"
#include "tests/tables.h"

namespace llmserve::test {

namespace {

constexpr double kLog2E = 1.4426950408889634;

// A sequence whose keys and values lie in scattered blocks; other heads and other blocks are NaN.
struct Case {
  int head_dim = 0, heads = 0, window = 0, num_tokens = 0;  // tokens of the sequence
  float scale = 0, softcap = 0;
  bool bidirectional = false;
  std::vector<float> sinks;
  int64_t block_stride = 0, head_offset = 0;
  Exact<float> q;  // [num_tokens][heads * head_dim]
  Exact<uint16_t> kv;
  Exact<int32_t> table;

  double key(int token, int d) const {
    const uint16_t* block = kv.data() + table[static_cast<size_t>(token / 16)] * block_stride + head_offset;
    return bf16_value(block[d / 2 * 32 + token % 16 * 2 + d % 2]);
  }
  double value(int token, int d) const {
    const uint16_t* block = kv.data() + table[static_cast<size_t>(token / 16)] * block_stride + head_offset;
    return bf16_value(block[16 * head_dim + token % 16 / 2 * 2 * head_dim + d * 2 + token % 2]);
  }
  const float* query(int token, int head) const {
    return q.data() + (static_cast<int64_t>(token) * heads + head) * head_dim;
  }
};

void fill_kv(Random& random, Case& made) {
  const int num_blocks = static_cast<int>(made.table.size());
  std::memset(made.kv.data(), 0xFF, made.kv.num_bytes());
  for (int token = 0; token < num_blocks * 16; ++token)
    for (int d = 0; d < made.head_dim; ++d) {
      const bool written = token < made.num_tokens;
      uint16_t* block =
          made.kv.data() + made.table[static_cast<size_t>(token / 16)] * made.block_stride + made.head_offset;
      block[d / 2 * 32 + token % 16 * 2 + d % 2] = written ? nearest_bf16(random.normal()) : 0;
      block[16 * made.head_dim + token % 16 / 2 * 2 * made.head_dim + d * 2 + token % 2] =
          written ? nearest_bf16(random.normal()) : 0;
    }
}

Case random_case(Random& random, int num_tokens, int head_dim, int heads, int window) {
  Case made;
  made.head_dim = head_dim;
  made.heads = heads;
  made.window = window;
  made.num_tokens = num_tokens;
  made.scale = random.uniform(0.5f, 2.0f) / std::sqrt(static_cast<float>(head_dim));
  const int64_t kv_heads = random.integer(1, 3);
  made.block_stride = kv_heads * 32 * head_dim;
  made.head_offset = random.integer(0, kv_heads - 1) * 32 * head_dim;
  const int num_blocks = (num_tokens + 15) / 16;
  made.table = Exact<int32_t>(static_cast<size_t>(num_blocks));
  std::vector<int32_t> places(static_cast<size_t>(num_blocks) * 2);
  for (size_t i = 0; i < places.size(); ++i) places[i] = static_cast<int32_t>(i);
  for (size_t i = 0; i < made.table.size(); ++i) {
    std::swap(
        places[i],
        places[static_cast<size_t>(random.integer(static_cast<int64_t>(i), static_cast<int64_t>(places.size()) - 1))]);
    made.table[i] = places[i];
  }
  made.kv = Exact<uint16_t>(places.size() * static_cast<size_t>(made.block_stride));
  fill_kv(random, made);
  made.q = Exact<float>(static_cast<size_t>(num_tokens) * static_cast<size_t>(heads * head_dim));
  for (size_t i = 0; i < made.q.size(); ++i) made.q[i] = random.normal();
  return made;
}

// Output of tokens [first, first + count), [count][heads * head_dim].
std::vector<float> attend(const Case& made, const KernelTable& kernels, int first, int count, const std::string& what) {
  const int64_t columns = int64_t{made.heads} * made.head_dim, out_stride = columns + 16;
  Guarded<float> out(static_cast<size_t>((count - 1) * out_stride + columns));
  Exact<uint8_t> scratch(attention_scratch_bytes(made.head_dim));
  std::memset(scratch.data(), 0xFF, scratch.size());
  AttentionArgs args;
  args.q = made.query(first, 0);
  args.q_stride = columns;
  args.num_tokens = count;
  args.heads = made.heads;
  args.head_dim = made.head_dim;
  args.first_position = first;
  args.window = made.window;
  args.num_keys = made.bidirectional ? made.num_tokens : 0;
  args.scale = made.scale;
  args.softcap = made.softcap;
  args.sinks = made.sinks.empty() ? nullptr : made.sinks.data();
  args.table = made.table.data();
  args.kv = made.kv.data() + made.head_offset;
  args.block_stride = made.block_stride;
  args.out = out.data();
  args.out_stride = out_stride;
  args.scratch = scratch.data();
  kernels.attention(args);
  out.check_zones(what);
  std::vector<float> rows;
  for (int token = 0; token < count; ++token)
    rows.insert(rows.end(), out.data() + token * out_stride, out.data() + token * out_stride + columns);
  for (int token = 0; token + 1 < count; ++token)
    for (int64_t gap = columns; gap < out_stride; ++gap)
      CHECK(out.is_untouched(static_cast<size_t>(token * out_stride + gap)), what, " wrote between rows");
  return rows;
}

struct Row {
  std::vector<double> value, bound;
};

// Softmax attention of one query head in double, over keys [oldest, newest]. The kernels round the scaled query and
// the probabilities to bf16: the first is done here too, the second may move a result by 2^-8 of its terms' sizes.
Row expected_row(const Case& made, int position, int head, int window) {
  const int oldest = window > 0 ? std::max(0, position - window + 1) : 0;
  const int end = window > 0 ? std::min(made.num_tokens, position + window) : made.num_tokens;
  const int newest = made.bidirectional ? end - 1 : position;
  const double cap = double{made.softcap} * kLog2E;
  std::vector<double> scores;
  double largest = -INFINITY, roughness = 0.0;
  const float factor = made.scale * static_cast<float>(kLog2E);
  for (int token = oldest; token <= newest; ++token) {
    double score = 0.0, magnitude = 0.0;
    for (int d = 0; d < made.head_dim; ++d) {
      const double term = bf16_value(nearest_bf16(made.query(position, head)[d] * factor)) * made.key(token, d);
      score += term;
      magnitude += std::fabs(term);
    }
    if (cap > 0) score = cap * std::tanh(score / cap);
    scores.push_back(score);
    largest = std::max(largest, score);
    roughness = std::max(roughness, (magnitude * (made.head_dim + 2) + 4 * cap) * kEpsilon);
  }
  const double sink = made.sinks.empty() ? -INFINITY : made.sinks[static_cast<size_t>(head)] * kLog2E;
  double total = std::exp2(sink - largest);
  for (double& score : scores) total += score = std::exp2(score - largest);
  Row row{std::vector<double>(static_cast<size_t>(made.head_dim)),
          std::vector<double>(static_cast<size_t>(made.head_dim))};
  for (size_t d = 0; d < row.value.size(); ++d) {
    double sizes = 0.0;
    for (size_t i = 0; i < scores.size(); ++i) {
      const double term = scores[i] / total * made.value(oldest + static_cast<int>(i), static_cast<int>(d));
      row.value[d] += term;
      sizes += std::fabs(term);
    }
    row.bound[d] = sizes * (0x1p-8 + 2 * roughness + 1e-5);
  }
  return row;
}

// The first place outside the bound, empty when there is none.
std::string mistake(const Case& made, const std::vector<float>& got, int first, int count, int window, int shift = 0) {
  for (int token = 0; token < count; ++token)
    for (int head = 0; head < made.heads; ++head) {
      const Row expected = expected_row(made, first + token - shift, head, window);
      for (int d = 0; d < made.head_dim; ++d) {
        const double value = got[static_cast<size_t>((token * made.heads + head) * made.head_dim + d)];
        const auto at = static_cast<size_t>(d);
        if (!(std::fabs(value - expected.value[at]) <= expected.bound[at]))
          return join("token ", first + token, " head ", head, " channel ", d, ": ", value, " for ", expected.value[at],
                      " +- ", expected.bound[at]);
      }
    }
  return "";
}

std::string describe(const std::string& name, const Case& made) {
  return join(name, " D=", made.head_dim, " heads=", made.heads, " window=", made.window, " tokens=", made.num_tokens,
              " cap=", made.softcap, " sinks=", made.sinks.size(), made.bidirectional ? " bidirectional" : "");
}

void set_options(Random& random, Case& made) {
  if (random.chance(0.3)) made.softcap = random.uniform(0.2f, 3.0f);
  made.bidirectional = random.chance(0.3);
  if (random.chance(0.3))
    for (int head = 0; head < made.heads; ++head) made.sinks.push_back(random.uniform(-3.0f, 3.0f));
}

constexpr int kLengths[] = {1, 2, 15, 16, 17, 31, 33, 64, 100, 255, 256, 257, 272, 300, 511, 512, 513, 530};
constexpr int kHeadDims[] = {16, 32, 48, 64, 80, 96, 112, 128, 192, 256};
constexpr int kWindows[] = {0, 0, 1, 2, 7, 16, 17, 100, 255, 256, 257};

}  // namespace

TEST(attention_agrees_with_double) {
  for (const auto& [name, kernels] : tables())
    for (int round = 0; round < 24; ++round) {
      const int length = round < 18 ? kLengths[round] : static_cast<int>(random.integer(1, 600));
      const int heads = static_cast<int>(random.integer(1, 8));
      Case made = random_case(random, length, random.pick(kHeadDims), heads, random.pick(kWindows));
      set_options(random, made);
      const int count = static_cast<int>(random.integer(1, std::min(length, kMaxQueryRows / heads)));
      const std::vector<float> got = attend(made, kernels, length - count, count, describe(name, made));
      const int shown = std::min(count, 3);  // the first and the last ones
      CHECK(mistake(made, got, length - count, shown, made.window).empty(), describe(name, made), " ",
            mistake(made, got, length - count, shown, made.window));
      const std::vector<float> last(got.end() - heads * made.head_dim, got.end());
      CHECK(mistake(made, last, length - 1, 1, made.window).empty(), describe(name, made),
            " last: ", mistake(made, last, length - 1, 1, made.window));
    }
}

// However the prompt is cut, and whatever later tokens already stand in the cache.
TEST(attention_of_a_query_does_not_depend_on_its_chunk) {
  for (const auto& [name, kernels] : tables())
    for (const int heads : {1, 3, 4, 8}) {
      const int length = static_cast<int>(random.integer(258, 300)), most = kMaxQueryRows / heads;
      Case made = random_case(random, length, random.pick({16, 64, 80}), heads, random.pick({0, 0, 5, 40, 256}));
      set_options(random, made);
      const int start = 236;
      const size_t columns = static_cast<size_t>(heads * made.head_dim);
      std::vector<float> alone;
      for (int token = start; token < length; ++token) {
        const std::vector<float> row = attend(made, kernels, token, 1, describe(name, made));
        alone.insert(alone.end(), row.begin(), row.end());
      }
      for (const int chunk : {2, 3, 5, 7, most})
        for (int first = start; first < length; first += std::min(chunk, most)) {
          const int count = std::min({chunk, most, length - first});
          const std::vector<float> got = attend(made, kernels, first, count, describe(name, made));
          CHECK(std::memcmp(got.data(), alone.data() + static_cast<size_t>(first - start) * columns,
                            got.size() * sizeof(float)) == 0,
                describe(name, made), ": chunk of ", count, " at ", first);
        }
    }
}

TEST(attention_bound_rejects_planted_mistakes) {
  for (const auto& [name, kernels] : tables()) {
    Case made = random_case(random, 40, 64, 2, 9);
    const std::vector<float> got = attend(made, kernels, 38, 2, name);
    CHECK(mistake(made, got, 38, 2, 9).empty(), name);
    CHECK(!mistake(made, got, 38, 2, 8).empty(), name, ": a window too short");
    CHECK(!mistake(made, got, 38, 2, 10).empty(), name, ": a window too long");
    CHECK(!mistake(made, got, 38, 2, 9, 1).empty(), name, ": the query before");
    const auto rejected = [&](auto plant) {
      Case other = random_case(random, 40, 64, 2, 0);
      other.softcap = 0.5f;
      other.sinks = {0.0f, 1.0f};
      other.bidirectional = true;
      const std::vector<float> right = attend(other, kernels, 30, 3, name);
      CHECK(mistake(other, right, 30, 3, 0).empty(), name, ": ", mistake(other, right, 30, 3, 0));
      plant(other);
      return !mistake(other, right, 30, 3, 0).empty();
    };
    CHECK(rejected([](Case& other) { other.softcap = 0.0f; }), name, ": no soft cap");
    CHECK(rejected([](Case& other) { other.softcap = 0.6f; }), name, ": a higher soft cap");
    CHECK(rejected([](Case& other) { other.sinks.clear(); }), name, ": no sinks");
    CHECK(rejected([](Case& other) { std::swap(other.sinks[0], other.sinks[1]); }), name, ": sinks of other heads");
    CHECK(rejected([](Case& other) { other.bidirectional = false; }), name, ": causal");
    std::swap(made.table[1], made.table[2]);
    CHECK(!mistake(made, got, 38, 2, 9).empty(), name, ": blocks swapped");
  }
}

TEST(attention_with_large_scores_picks_one_key) {
  for (const auto& [name, kernels] : tables()) {
    Case made = random_case(random, 300, 32, 1, 0);
    made.scale = 1e4f;
    for (const float got : attend(made, kernels, 299, 1, name)) CHECK(std::isfinite(got), name);
  }
}

// Also where they fill a whole tile of keys, whose largest score is then none.
TEST(attention_to_what_is_not_a_number_is_not_a_number) {
  for (const auto& [name, kernels] : tables())
    for (const int num_poisoned : {1, 200, 256, 300}) {
      Case made = random_case(random, 400, 32, 1, 0);
      for (int token = 0; token < num_poisoned; ++token) {
        uint16_t* block =
            made.kv.data() + made.table[static_cast<size_t>(token / 16)] * made.block_stride + made.head_offset;
        for (int d = 0; d < 32; ++d) block[d / 2 * 32 + token % 16 * 2 + d % 2] = 0x7FC0;
      }
      for (const int query : {num_poisoned, 399})
        for (const float got : attend(made, kernels, query, 1, name)) CHECK(std::isnan(got), name, " ", num_poisoned);
    }
}

TEST(attention_with_infinite_queries_does_not_crash) {
  for (const auto& [name, kernels] : tables()) {
    Case made = random_case(random, 20, 32, 2, 0);
    for (size_t i = 0; i < 64; i += 9) made.q[static_cast<size_t>(18 * 64) + i] = i % 2 == 0 ? INFINITY : -INFINITY;
    const std::vector<float> got = attend(made, kernels, 18, 2, name);
    const std::vector<float> second(got.begin() + 64, got.end());
    CHECK(mistake(made, second, 19, 1, 0).empty(), name, ": the row after it changed");
  }
}

}  // namespace llmserve::test
