// Philox4x32-10 against the known answers of its authors' Random123 distribution.
#include "core/philox.h"
#include "tests/check.h"

namespace llmserve::test {

namespace {

struct KnownAnswer {
  uint32_t counter[4], key[2], out[4];
};

constexpr KnownAnswer kAnswers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

}  // namespace

TEST(philox_known_answers) {
  for (const KnownAnswer& answer : kAnswers) {
    const auto& c = answer.counter;
    const PhiloxBlock out = philox4x32({{c[0], c[1], c[2], c[3]}}, answer.key[0], answer.key[1]);
    for (int i = 0; i < 4; ++i) CHECK(out.word[i] == answer.out[i], "word ", i);
  }
}

TEST(philox_uniform_uses_all_bits_of_seed_and_position) {
  const double base = philox_uniform(5, 9);
  CHECK(base == philox_uniform(5, 9));
  CHECK(base == (static_cast<double>(philox4x32({{9, 0, 0, 0}}, 5, 0).word[0] >> 8) + 0.5) / 16777216.0);
  CHECK(base != philox_uniform(5 + (uint64_t{1} << 32), 9));
  CHECK(base != philox_uniform(5, 9 + (uint64_t{1} << 32)));
}

TEST(philox_uniform_is_inside_the_open_interval_and_even) {
  int buckets[16] = {};
  const uint64_t seed = random.bits();
  constexpr int kDraws = 16000;
  for (int i = 0; i < kDraws; ++i) {
    const double u = philox_uniform(seed, static_cast<uint64_t>(i));
    CHECK(u > 0.0 && u < 1.0);
    ++buckets[static_cast<int>(u * 16)];
  }
  double chi_square = 0.0;
  for (const int count : buckets) chi_square += (count - kDraws / 16.0) * (count - kDraws / 16.0) / (kDraws / 16.0);
  CHECK(chi_square < 60.0, "15 degrees of freedom: ", chi_square);  // passed by chance but once in a million
}

}  // namespace llmserve::test
