// A test is a function; a failed check ends it and names itself. Random inputs come from one printed seed.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>

namespace llmserve::test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  uint64_t bits() { return engine_(); }
  // Inclusive.
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }
  template <typename T, size_t kCount>
  T pick(const T (&choices)[kCount]) {
    return choices[integer(0, static_cast<int64_t>(kCount) - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

using TestFunction = void (*)(Random& random);

// Registers a test at start-up; see main.cpp.
struct Registration {
  Registration(const char* name, TestFunction function);
};

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  text.precision(9);
  (text << ... << parts);
  return text.str();
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure(join(file, ":", line, ": ", what));
}

}  // namespace llmserve::test

#define TEST(name)                                                              \
  static void name(::llmserve::test::Random& random);                           \
  static const ::llmserve::test::Registration registration_##name(#name, name); \
  static void name([[maybe_unused]] ::llmserve::test::Random& random)

// CHECK(condition, what was looked at, ...)
#define CHECK(condition, ...)                                                                       \
  do {                                                                                              \
    if (!(condition))                                                                               \
      ::llmserve::test::fail(__FILE__, __LINE__,                                                    \
                             ::llmserve::test::join(#condition __VA_OPT__(, " | ", ) __VA_ARGS__)); \
  } while (false)

#define CHECK_THROWS(Exception, expression)                                                             \
  do {                                                                                                  \
    bool thrown = false;                                                                                \
    try {                                                                                               \
      expression;                                                                                       \
    } catch (const Exception&) {                                                                        \
      thrown = true;                                                                                    \
    }                                                                                                   \
    if (!thrown) ::llmserve::test::fail(__FILE__, __LINE__, #expression " does not throw " #Exception); \
  } while (false)
