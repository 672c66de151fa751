// Row kernels against double, and every table against the scalar one bit by bit.
#include <algorithm>
#include <vector>

#include "tests/buffers.h"
#include "tests/numbers.h"
#include "tests/tables.h"

namespace llmserve::test {

namespace {

Exact<float> random_floats(Random& random, int64_t n, float scale = 1.0f) {
  Exact<float> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = random.normal() * scale;
  return values;
}

int64_t some_length(Random& random) { return random.chance(0.5) ? random.integer(1, 70) : random.integer(1, 700); }

void check_close(const Guarded<float>& got, const std::vector<double>& expected, double relative, double absolute,
                 const std::string& what) {
  got.check_zones(what);
  for (size_t i = 0; i < expected.size(); ++i)
    CHECK(std::fabs(static_cast<double>(got[i]) - expected[i]) <= relative * std::fabs(expected[i]) + absolute, what,
          " at ", i, " of ", expected.size(), ": ", got[i], " for ", expected[i]);
}

// The tables must agree bit by bit, so only the first one is compared with double.
void check_same(const std::vector<float>& first, const Guarded<float>& got, const std::string& what) {
  for (size_t i = 0; i < first.size(); ++i)
    CHECK(std::memcmp(&first[i], &got[i], sizeof(float)) == 0, what, " at ", i, ": ", got[i], ", the scalar table ",
          first[i]);
}

std::vector<float> copy_of(Guarded<float>& values) { return {values.data(), values.data() + values.size()}; }

double activation_value(Activation kind, double x) {
  switch (kind) {
    case Activation::kSilu: return x / (1.0 + std::exp(-x));
    case Activation::kGelu: return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh: return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu2: return x > 0 ? x * x : 0.0;
  }
  return 0.0;
}

constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu2};

}  // namespace

TEST(elementwise_rms_norm) {
  for (int round = 0; round < 20; ++round) {
    const int64_t n = some_length(random);
    const Exact<float> x = random_floats(random, n, random.pick({1.0f, 1e-3f, 1e4f})),
                       weight = random_floats(random, n);
    const float eps = random.pick({1e-5f, 1e-6f, 0.3f});
    double squares = 0.0;
    for (int64_t i = 0; i < n; ++i)
      squares += static_cast<double>(x[static_cast<size_t>(i)]) * x[static_cast<size_t>(i)];
    const double factor = 1.0 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(eps));
    std::vector<double> expected(static_cast<size_t>(n));
    for (size_t i = 0; i < expected.size(); ++i) expected[i] = x[i] * factor * weight[i];
    std::vector<float> first;
    for (const auto& [name, kernels] : tables()) {
      Guarded<float> out(static_cast<size_t>(n));
      kernels.rms_norm(x.data(), weight.data(), out.data(), n, eps);
      check_close(out, expected, kEpsilon * (static_cast<double>(n) / 32 + 16), 0.0, name);
      if (first.empty()) first = copy_of(out);
      check_same(first, out, name);
    }
  }
}

TEST(elementwise_norms_of_zeros_are_zero) {
  for (const auto& [name, kernels] : tables()) {
    const Exact<float> x(48);
    const Exact<float> weight = random_floats(random, 48);
    Guarded<float> out(48);
    kernels.rms_norm(x.data(), weight.data(), out.data(), 48, 1e-5f);
    for (size_t i = 0; i < 48; ++i) CHECK(out[i] == 0.0f, name);
    kernels.layer_norm(x.data(), weight.data(), nullptr, out.data(), 48, 1e-5f);
    for (size_t i = 0; i < 48; ++i) CHECK(out[i] == 0.0f, name);
  }
}

TEST(elementwise_layer_norm) {
  for (int round = 0; round < 20; ++round) {
    const int64_t n = some_length(random) + 1;
    const Exact<float> x = random_floats(random, n), weight = random_floats(random, n), bias = random_floats(random, n);
    const bool biased = random.chance(0.5);
    double mean = 0.0, variance = 0.0;
    for (size_t i = 0; i < x.size(); ++i) mean += x[i] / static_cast<double>(n);
    for (size_t i = 0; i < x.size(); ++i) variance += (x[i] - mean) * (x[i] - mean) / static_cast<double>(n);
    const double factor = 1.0 / std::sqrt(variance + 1e-5f);
    std::vector<double> expected(x.size());
    for (size_t i = 0; i < x.size(); ++i) expected[i] = (x[i] - mean) * factor * weight[i] + (biased ? bias[i] : 0.0f);
    std::vector<float> first;
    for (const auto& [name, kernels] : tables()) {
      Guarded<float> out(x.size());
      kernels.layer_norm(x.data(), weight.data(), biased ? bias.data() : nullptr, out.data(), n, 1e-5f);
      check_close(out, expected, 1e-5, 1e-5 * factor, name);
      if (first.empty()) first = copy_of(out);
      check_same(first, out, name);
    }
  }
}

namespace {

// An activation's whole code: the high parts are kept times 8 and count 128 each.
int whole_code(const int8_t* codes, const GroupMeta& meta, int i) {
  if (i / 4 != meta.high_step) return codes[i];
  int8_t high[4];
  std::memcpy(high, &meta.high, 4);
  return codes[i] + 128 * (high[i % 4] / 8);
}

// What the rule in layout.h says of a group's eight steps.
struct Steps {
  int at = 0;  // the first of the largest
  float first = 0.0f, second = 0.0f;
  bool finite = true;

  explicit Steps(const float* x) {
    float largest[8] = {};
    for (int i = 0; i < 32; ++i) {
      finite = finite && std::fabs(x[i]) < 1e38f;
      largest[i / 4] = std::max(largest[i / 4], std::fabs(x[i]));
    }
    for (int step = 0; step < 8; ++step)
      if (largest[step] > largest[at]) at = step;
    first = largest[at];
    for (int step = 0; step < 8; ++step)
      if (step != at) second = std::max(second, largest[step]);
  }
  bool has_codes() const { return finite && first > 1e-28f; }
  float scale() const { return std::max(second, first * kLeastShare) / 127.0f; }
};

void check_sums(const int8_t* codes, const GroupMeta& meta, const std::string& what) {
  int sums[2] = {};
  for (int i = 0; i < 32; ++i) sums[i / 16] += whole_code(codes, meta, i);
  CHECK(meta.negative_sum == -(sums[0] + sums[1]), what);
  CHECK(meta.negative_first_sum == -sums[0], what);
  if (std::isnan(meta.scale)) {
    CHECK(std::isnan(meta.scaled_sum) && std::isnan(meta.scaled_first_sum) && std::isnan(meta.scaled_second_sum), what);
    return;
  }
  CHECK(meta.scaled_sum == meta.scale * static_cast<float>(sums[0] + sums[1]), what);
  CHECK(meta.scaled_first_sum == meta.scale * static_cast<float>(sums[0]), what);
  CHECK(meta.scaled_second_sum == meta.scale * static_cast<float>(sums[1]), what);
}

void check_group(const float* x, const int8_t* codes, const GroupMeta& meta, const std::string& what) {
  const Steps steps(x);
  check_sums(codes, meta, what);
  CHECK(meta.high_step >= 0 && meta.high_step < 8, what);
  if (!steps.has_codes()) {
    CHECK(steps.finite ? meta.scale == 0.0f : std::isnan(meta.scale), what, " scale ", meta.scale);
    CHECK(meta.high == 0 && std::all_of(codes, codes + 32, [](int8_t code) { return code == 0; }), what);
    return;
  }
  CHECK(meta.high_step == steps.at, what, " step ", meta.high_step, " for ", steps.at);
  CHECK(meta.scale == steps.scale(), what, " scale ", meta.scale, " for ", steps.scale());
  for (int i = 0; i < 32; ++i) {
    const int code = whole_code(codes, meta, i);
    // The inverse of the scale and the product with it round, and so does the scale itself.
    const double bound = (0.5 + 4 * kEpsilon * std::abs(code)) * static_cast<double>(meta.scale);
    const double error = std::fabs(static_cast<double>(meta.scale) * code - static_cast<double>(x[i]));
    CHECK(error <= bound, what, " at ", i, ": ", x[i], " off by ", error, " of ", meta.scale);
    const bool high = i / 4 == meta.high_step;
    CHECK(codes[i] >= (high ? -64 : -127) && codes[i] <= (high ? 63 : 127), what, " code ", int{codes[i]}, " at ", i);
  }
}

// Draws of what a group can be; the last are not finite.
float group_value(Random& random, int kind, int i) {
  constexpr float kFew[] = {-2.0f, -1.0f, 0.0f, 1.0f, 2.0f};
  constexpr float kOdd[] = {INFINITY, -INFINITY, NAN, -NAN, 1e38f, -3.4e38f};
  switch (kind) {
    case 0: return 0.0f;
    case 1: return random.pick(kFew);                                       // ties within and between steps
    case 2: return random.normal() * (random.chance(0.05) ? 60.0f : 1.0f);  // some tower
    case 3: return random.normal() * (i == 17 ? 1e6f : 1e-3f);              // all codes but one's high part vanish
    case 4: return random.uniform(-1e-38f, 1e-38f);                         // denormal
    case 5: return random.uniform(-1.2e-28f, 1.2e-28f);                     // about where codes begin
    case 6: return random.uniform(-9.99e37f, 9.99e37f);                     // about the largest
    case 7: return i == 5 ? 15.5f : i == 20 ? random.uniform(0.99f, 1.01f) : 0.3f;  // about the least share
    case 8: return random.chance(0.5) ? -0.0f : random.normal() * 1e-20f;
    case 9: return i == 30 ? random.pick(kOdd) : random.normal();
    default: return random.chance(0.5) ? random.pick(kOdd) : random.normal();
  }
}
constexpr int kGroupKinds = 11;

}  // namespace

// By the rule, and every table bit by bit as the scalar one.
TEST(elementwise_quantize_q8) {
  for (int round = 0; round < 60; ++round) {
    const int64_t n = 32 * random.integer(1, 12);
    Exact<float> x(static_cast<size_t>(n));
    for (int64_t i = 0, kind = 0; i < n; ++i) {
      if (i % 32 == 0) kind = random.integer(0, kGroupKinds - 1);
      x[static_cast<size_t>(i)] = group_value(random, static_cast<int>(kind), static_cast<int>(i % 32));
    }
    Exact<int8_t> first_codes(static_cast<size_t>(n));
    Exact<GroupMeta> first_meta(static_cast<size_t>(n / 32));
    tables().front().kernels.quantize_q8(x.data(), first_codes.data(), first_meta.data(), n);
    for (const auto& [name, kernels] : tables()) {
      Guarded<int8_t> codes(static_cast<size_t>(n));
      Guarded<GroupMeta> meta(static_cast<size_t>(n / 32));
      kernels.quantize_q8(x.data(), codes.data(), meta.data(), n);
      codes.check_zones(name);
      meta.check_zones(name);
      for (size_t g = 0; g < meta.size(); ++g) {
        check_group(x.data() + g * 32, codes.data() + g * 32, meta[g], name);
        CHECK(std::memcmp(&first_meta[g], &meta[g], sizeof(GroupMeta)) == 0, name, " group ", g);
      }
      CHECK(std::memcmp(first_codes.data(), codes.data(), static_cast<size_t>(n)) == 0, name);
    }
  }
}

// Halves go to the even neighbour: with a second largest step of 127 the scale is 1.
TEST(elementwise_quantize_q8_rounds_half_to_even) {
  Exact<float> x(32);
  const float halves[] = {127.0f, 0.5f, 1.5f, 2.5f, 127.0f, -0.5f, -1.5f, -2.5f, 125.5f, 126.5f};
  const int expected[] = {127, 0, 2, 2, 127, 0, -2, -2, 126, 126};
  std::memcpy(x.data(), halves, sizeof(halves));
  for (const auto& [name, kernels] : tables()) {
    Guarded<int8_t> codes(32);
    Guarded<GroupMeta> meta(1);
    kernels.quantize_q8(x.data(), codes.data(), meta.data(), 32);
    for (int i = 0; i < 10; ++i) CHECK(whole_code(codes.data(), meta[0], i) == expected[i], name, " ", halves[i]);
  }
}

// The largest step's codes reach 127 * 15.5, both ways, whatever of the group it is.
TEST(elementwise_quantize_q8_gives_the_high_parts_to_the_first_of_the_largest_steps) {
  for (const auto& [name, kernels] : tables())
    for (int i = 0; i < 32; ++i)
      for (const int later : {i, (i / 4 + 3) % 8 * 4}) {
        Exact<float> x(32);
        x[static_cast<size_t>(later)] = -15.5f;
        x[static_cast<size_t>(i)] = 15.5f;
        Guarded<int8_t> codes(32);
        Guarded<GroupMeta> meta(1);
        kernels.quantize_q8(x.data(), codes.data(), meta.data(), 32);
        check_group(x.data(), codes.data(), meta[0], name);
        CHECK(meta[0].high_step == std::min(i, later) / 4, name, " ", i, " ", later);
        const int code = whole_code(codes.data(), meta[0], i);
        CHECK(later == i ? code == 1968 || code == 1969 : code == 127, name, " code ", code);
      }
}

TEST(elementwise_quantize_q8_sees_what_is_not_finite_wherever_it_stands) {
  for (const auto& [name, kernels] : tables())
    for (size_t i = 0; i < 32; ++i)
      for (const float odd : {INFINITY, -INFINITY, NAN, 1e38f}) {
        Exact<float> x = random_floats(random, 32);
        x[i] = odd;
        Guarded<int8_t> codes(32);
        Guarded<GroupMeta> meta(1);
        kernels.quantize_q8(x.data(), codes.data(), meta.data(), 32);
        check_group(x.data(), codes.data(), meta[0], join(name, " ", odd, " at ", i));
      }
}

// The rule's checks reject what a wrong rule would give.
TEST(elementwise_quantize_q8_checks_reject_planted_mistakes) {
  Exact<float> x = random_floats(random, 32);
  x[9] = 30.0f;
  Exact<int8_t> codes(32);
  GroupMeta meta;
  tables().front().kernels.quantize_q8(x.data(), codes.data(), &meta, 32);
  const auto rejects = [&](void (*spoil)(GroupMeta& meta, int8_t* codes)) {
    GroupMeta wrong = meta;
    int8_t wrong_codes[32];
    std::memcpy(wrong_codes, codes.data(), 32);
    spoil(wrong, wrong_codes);
    try {
      check_group(x.data(), wrong_codes, wrong, "");
    } catch (const Failure&) {
      return true;
    }
    return false;
  };
  CHECK(!rejects([](GroupMeta&, int8_t*) {}));
  CHECK(rejects([](GroupMeta& m, int8_t*) { m.scale *= 1.0001f; }), "scale");
  CHECK(rejects([](GroupMeta& m, int8_t*) { m.high_step ^= 1; }), "high step");
  CHECK(rejects([](GroupMeta& m, int8_t*) { m.high = 0; }), "high part");
  CHECK(rejects([](GroupMeta& m, int8_t*) { m.negative_sum += 1; }), "sum");
  CHECK(rejects([](GroupMeta& m, int8_t*) { m.negative_first_sum += 1; }), "sum of the first half");
  CHECK(rejects([](GroupMeta& m, int8_t*) { m.scaled_second_sum += m.scale; }), "scaled sum of the second half");
  CHECK(rejects([](GroupMeta& m, int8_t* c) {
          c[20] = static_cast<int8_t>(c[20] + 1);
          m.negative_sum -= 1;
          m.scaled_sum = m.scale * static_cast<float>(-m.negative_sum);
          m.scaled_second_sum = m.scale * static_cast<float>(m.negative_first_sum - m.negative_sum);
        }),
        "one code");
}

namespace {

void check_i8(const Exact<float>& x, const int8_t* codes, const RowMeta& meta, const std::string& what) {
  float largest = 0.0f;
  bool finite = true;
  for (size_t i = 0; i < x.size(); ++i) {
    finite = finite && std::fabs(x[i]) < 1e38f;
    largest = std::max(largest, std::fabs(x[i]));
  }
  const bool has_codes = finite && largest > 1e-30f;
  CHECK(has_codes ? meta.scale == largest / 127.0f
        : finite  ? meta.scale == 0.0f
                  : std::isnan(meta.scale),
        what, " scale ", meta.scale, " of ", largest);
  int sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    sum += codes[i];
    const double bound = (0.5 + 4 * kEpsilon * 127) * static_cast<double>(meta.scale);
    const double error = std::fabs(static_cast<double>(meta.scale) * codes[i] - static_cast<double>(x[i]));
    CHECK(has_codes ? error <= bound : codes[i] == 0, what, " at ", i, ": ", x[i], " off by ", error);
  }
  CHECK(meta.negative_sum == -sum, what);
  for (size_t i = x.size(); i % 64 != 0; ++i) CHECK(codes[i] == 0, what, " past the row, at ", i);
}

}  // namespace

TEST(elementwise_quantize_i8) {
  for (int round = 0; round < 60; ++round) {
    const int64_t n = some_length(random), padded = padded_columns(n);
    Exact<float> x = random_floats(random, n, random.pick({1.0f, 1e-20f, 1e25f, 1e-31f, 1e-40f, 0.0f}));
    if (random.chance(0.3)) x[static_cast<size_t>(random.integer(0, n - 1))] *= 100.0f;
    if (random.chance(0.3))
      x[static_cast<size_t>(random.integer(0, n - 1))] = random.pick({INFINITY, -INFINITY, NAN, -1.01e38f});
    Exact<int8_t> first_codes(static_cast<size_t>(padded));
    const RowMeta first = tables().front().kernels.quantize_i8(x.data(), first_codes.data(), n);
    for (const auto& [name, kernels] : tables()) {
      Guarded<int8_t> codes(static_cast<size_t>(padded));
      const RowMeta meta = kernels.quantize_i8(x.data(), codes.data(), n);
      const std::string what = join(name, " n=", n);
      codes.check_zones(what);
      check_i8(x, codes.data(), meta, what);
      CHECK(std::memcmp(&first, &meta, sizeof(RowMeta)) == 0, what, " differs from the scalar table");
      CHECK(std::memcmp(first_codes.data(), codes.data(), codes.size()) == 0, what, " differs from the scalar table");
    }
  }
}

TEST(elementwise_quantize_q8_of_tiny_values_is_zero) {
  for (const auto& [name, kernels] : tables()) {
    Exact<float> x(32);
    for (size_t i = 0; i < 32; ++i) x[i] = i % 3 == 0 ? 1e-42f : 0.0f;
    Guarded<int8_t> codes(32);
    Guarded<GroupMeta> meta(1);
    kernels.quantize_q8(x.data(), codes.data(), meta.data(), 32);
    CHECK(meta[0].scale == 0 && meta[0].negative_sum == 0, name);
  }
}

TEST(elementwise_quantize_head) {
  for (const auto& [name, kernels] : tables())
    for (const float odd : {0.0f, INFINITY, -INFINITY, std::nanf(""), 3.4e38f})
      for (size_t at = 0; at < 48; ++at) {
        Exact<float> x = random_floats(random, 48);
        if (odd != 0) x[at] = odd;
        Guarded<int8_t> codes(48);
        const float scale = kernels.quantize_head(x.data(), codes.data(), 48);
        codes.check_zones(name);
        CHECK(std::isnan(scale) == (odd != 0), name, " ", odd, " at ", at);
        for (size_t i = 0; i < 48; ++i) {
          const float expected = odd != 0 ? 0.0f : x[i];
          const float tolerance = odd != 0 ? 0.0f : 0.51f * scale;
          const float got = odd != 0 ? static_cast<float>(codes[i]) : static_cast<float>(codes[i]) * scale;
          CHECK(std::fabs(got - expected) <= tolerance, name, " ", i);
        }
      }
}

TEST(elementwise_round_bf16) {
  for (int round = 0; round < 20; ++round) {
    const int64_t n = some_length(random);
    Exact<float> x = random_floats(random, n, random.pick({1.0f, 1e-38f, 1e38f}));
    x[0] = random.pick({0.0f, -0.0f, INFINITY, -INFINITY, 1.00390625f, 3.3961776e38f});
    for (const auto& [name, kernels] : tables()) {
      Guarded<uint16_t> out(static_cast<size_t>(n));
      kernels.round_bf16(x.data(), out.data(), n);
      out.check_zones(name);
      for (size_t i = 0; i < x.size(); ++i) CHECK(out[i] == nearest_bf16(x[i]), name, " ", x[i]);
    }
  }
}

TEST(elementwise_round_bf16_keeps_nan) {
  const uint32_t quiet[] = {0x7F800001u, 0xFFC00000u, 0x7FFFFFFFu};
  Exact<float> x(3);
  std::memcpy(x.data(), quiet, sizeof(quiet));
  for (const auto& [name, kernels] : tables()) {
    Guarded<uint16_t> out(3);
    kernels.round_bf16(x.data(), out.data(), 3);
    for (size_t i = 0; i < 3; ++i) CHECK(std::isnan(bf16_value(out[i])), name, " NaN ", i);
  }
}

TEST(elementwise_activations) {
  for (const Activation kind : kActivations) {
    const int64_t n = some_length(random);
    Exact<float> x = random_floats(random, n, 4.0f), other = random_floats(random, n);
    for (size_t i = 0; i < x.size(); i += 17) x[i] = random.uniform(-120.0f, 120.0f);
    std::vector<double> expected(x.size()), product(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      expected[i] = activation_value(kind, x[i]);
      product[i] = expected[i] * other[i];
    }
    std::vector<float> first, first_gated;
    for (const auto& [name, kernels] : tables()) {
      // The tails of gelu are differences of nearly equal numbers: absolute there.
      Guarded<float> out(x.size()), gated(x.size());
      kernels.activate(kind, x.data(), out.data(), n);
      check_close(out, expected, 4e-6, 2e-6, join(name, " activation ", static_cast<int>(kind)));
      kernels.gated(kind, x.data(), other.data(), gated.data(), n);
      check_close(gated, product, 4e-6, 1e-5, join(name, " gated ", static_cast<int>(kind)));
      if (first.empty()) first = copy_of(out), first_gated = copy_of(gated);
      check_same(first, out, name);
      check_same(first_gated, gated, name);
    }
  }
}

TEST(elementwise_activations_of_extremes_are_finite_where_the_function_is) {
  const Exact<float> x = [] {
    Exact<float> values(6);
    const float extremes[] = {-1e4f, -88.8f, -1e-40f, 1e-40f, 88.8f, 1e4f};
    std::memcpy(values.data(), extremes, sizeof(extremes));
    return values;
  }();
  for (const auto& [name, kernels] : tables())
    for (const Activation kind : kActivations) {
      Guarded<float> out(6);
      kernels.activate(kind, x.data(), out.data(), 6);
      for (size_t i = 0; i < 6; ++i) {
        const double expected = activation_value(kind, x[i]);
        CHECK(std::fabs(out[i] - expected) <= 1e-5 * std::fabs(expected) + 1e-30, name, " of ", x[i], ": ", out[i]);
      }
    }
}

TEST(elementwise_add_scale_in_place) {
  const int64_t n = some_length(random);
  const Exact<float> x = random_floats(random, n), y = random_floats(random, n);
  for (const auto& [name, kernels] : tables()) {
    Guarded<float> out(x.size());
    kernels.add(x.data(), y.data(), out.data(), n);
    out.check_zones(name);
    for (size_t i = 0; i < x.size(); ++i) CHECK(out[i] == x[i] + y[i], name);
    std::memcpy(out.data(), x.data(), x.num_bytes());
    kernels.add(out.data(), y.data(), out.data(), n);
    kernels.scale(out.data(), 0.37f, out.data(), n);
    out.check_zones(name);
    for (size_t i = 0; i < x.size(); ++i) CHECK(out[i] == (x[i] + y[i]) * 0.37f, name);
  }
}

// As the GEMM node calls it: the gate's tile and the other side by side, the result over the gate.
TEST(elementwise_gated_over_its_gate) {
  for (const Activation kind : kActivations)
    for (const auto& [name, kernels] : tables()) {
      Exact<float> both = random_floats(random, 128);
      const Exact<float> gate = [&] {
        Exact<float> copy(64);
        std::memcpy(copy.data(), both.data(), copy.num_bytes());
        return copy;
      }();
      Guarded<float> expected(64);
      kernels.gated(kind, gate.data(), both.data() + 64, expected.data(), 64);
      kernels.gated(kind, both.data(), both.data() + 64, both.data(), 64);
      CHECK(std::memcmp(expected.data(), both.data(), 64 * sizeof(float)) == 0, name);
    }
}

TEST(elementwise_head_adds_bias_normalizes_then_rotates) {
  for (int round = 0; round < 40; ++round) {
    const int head_dim = 16 * static_cast<int>(random.integer(1, 16));
    const int rotary_dim = random.chance(0.5) ? head_dim : 2 * static_cast<int>(random.integer(1, head_dim / 2));
    const bool interleaved = random.chance(0.5), biased = random.chance(0.5), normed = random.chance(0.5);
    const Exact<float> x = random_floats(random, head_dim), bias = random_floats(random, head_dim),
                       norm = random_floats(random, head_dim);
    Exact<float> cosine(static_cast<size_t>(rotary_dim / 2)), sine(static_cast<size_t>(rotary_dim / 2));
    std::vector<double> y(x.size());
    for (size_t i = 0; i < y.size(); ++i) y[i] = x[i] + (biased ? static_cast<double>(bias[i]) : 0.0);
    double squares = 1e-5f;
    for (const double value : y) squares += value * value / head_dim;
    for (size_t i = 0; i < y.size() && normed; ++i) y[i] *= norm[i] / std::sqrt(squares);
    const size_t half = cosine.size();
    for (size_t i = 0; i < half; ++i) {
      const double angle = random.uniform(-3.0f, 3.0f);
      cosine[i] = static_cast<float>(std::cos(angle));
      sine[i] = static_cast<float>(std::sin(angle));
      const size_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
      const double p = y[a], q = y[b];
      y[a] = p * cosine[i] - q * sine[i];
      y[b] = q * cosine[i] + p * sine[i];
    }
    for (const auto& [name, kernels] : tables()) {
      Guarded<float> out(x.size());
      std::memcpy(out.data(), x.data(), x.num_bytes());
      kernels.head({out.data(), biased ? bias.data() : nullptr, normed ? norm.data() : nullptr, cosine.data(),
                    sine.data(), head_dim, rotary_dim, interleaved, 1e-5f});
      check_close(out, y, 2e-6, 1e-5, join(name, " D=", head_dim, " rotary ", rotary_dim));
    }
  }
}

TEST(elementwise_maximum_and_exp_weights) {
  for (int round = 0; round < 20; ++round) {
    const int64_t n = random.integer(1, 1100);
    Exact<float> x = random_floats(random, n, 8.0f);
    if (random.chance(0.3)) x[0] = -INFINITY;
    const float temperature = random.uniform(0.05f, 3.0f);
    float largest = -INFINITY;
    for (size_t i = 0; i < x.size(); ++i) largest = std::max(largest, x[i]);
    if (!std::isfinite(largest)) continue;
    std::vector<float> first;
    for (const auto& [name, kernels] : tables()) {
      CHECK(kernels.maximum(x.data(), n) == largest, name);
      Guarded<float> weights(x.size());
      Guarded<double> sums(static_cast<size_t>((n + 255) / 256));
      kernels.exp_weights(x.data(), largest, 1.0f / temperature, weights.data(), sums.data(), n);
      weights.check_zones(name);
      sums.check_zones(name);
      std::vector<double> added(sums.size());
      for (size_t i = 0; i < x.size(); ++i) {
        const double z = (static_cast<double>(x[i]) - largest) / temperature;
        const double relative = 4e-7 + 3e-7 * std::min(std::fabs(z), 100.0);
        CHECK(std::fabs(weights[i] - std::exp(z)) <= std::exp(z) * relative + 2e-38, name, " z ", z);
        CHECK(x[i] < largest || weights[i] == 1.0f, name, ": the most likely token must weigh 1");
        added[i / 256] += static_cast<double>(weights[i]);
      }
      for (size_t i = 0; i < sums.size(); ++i) CHECK(std::fabs(sums[i] - added[i]) <= 1e-12 * added[i], name);
      if (first.empty()) first = copy_of(weights);
      check_same(first, weights, name);
    }
  }
}

TEST(elementwise_infinities_do_not_crash) {
  for (const auto& [name, kernels] : tables()) {
    Exact<float> x = random_floats(random, 64);
    x[1] = INFINITY, x[2] = -INFINITY, x[3] = std::nanf("");
    const Exact<float> weight = random_floats(random, 64);
    Guarded<float> out(64);
    Guarded<double> sums(1);
    kernels.rms_norm(x.data(), weight.data(), out.data(), 64, 1e-5f);
    kernels.layer_norm(x.data(), weight.data(), nullptr, out.data(), 64, 1e-5f);
    for (const Activation kind : kActivations) kernels.activate(kind, x.data(), out.data(), 64);
    kernels.exp_weights(x.data(), 3.0f, 1.0f, out.data(), sums.data(), 64);
    out.check_zones(name);
  }
}

TEST(elementwise_maximum_finds_what_is_not_a_number) {
  for (const auto& [name, kernels] : tables())
    for (int64_t n = 1; n < 70; ++n) {
      Exact<float> x = random_floats(random, n);
      x[static_cast<size_t>(random.integer(0, n - 1))] = INFINITY;
      CHECK(kernels.maximum(x.data(), n) == INFINITY, name, " ", n);
      x[static_cast<size_t>(random.integer(0, n - 1))] = std::nanf("");
      CHECK(std::isnan(kernels.maximum(x.data(), n)), name, " ", n);
    }
}

TEST(elementwise_activations_keep_what_is_not_a_number) {
  for (const auto& [name, kernels] : tables())
    for (const Activation kind : kActivations) {
      Exact<float> x = random_floats(random, 40), other = random_floats(random, 40);
      for (const size_t i : {0, 17, 39}) x[i] = std::nanf("");
      Guarded<float> out(40), gated(40);
      kernels.activate(kind, x.data(), out.data(), 40);
      kernels.gated(kind, x.data(), other.data(), gated.data(), 40);
      for (size_t i = 0; i < 40; ++i)
        CHECK(std::isnan(out[i]) == std::isnan(x[i]) && std::isnan(gated[i]) == std::isnan(x[i]), name, " ", i);
    }
}

}  // namespace llmserve::test
