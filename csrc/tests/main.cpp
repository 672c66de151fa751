// Runs all tests, or those whose name contains the first argument. LLMSERVE_TEST_SEED repeats a run.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "tests/check.h"

namespace llmserve::test {

namespace {

struct Test {
  std::string name;
  TestFunction function;
};

std::vector<Test>& registered() {
  static std::vector<Test> tests;
  return tests;
}

uint64_t choose_seed() {
  if (const char* text = std::getenv("LLMSERVE_TEST_SEED")) return std::strtoull(text, nullptr, 10);
  return static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count()) % 1000000007;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// True when the test passed.
bool run(const Test& test, uint64_t seed) {
  Random random(seed ^ std::hash<std::string>{}(test.name));
  const double start = seconds_now();
  try {
    test.function(random);
  } catch (const std::exception& error) {
    std::printf("FAILED %s (seed %llu)\n  %s\n", test.name.c_str(), static_cast<unsigned long long>(seed),
                error.what());
    return false;
  }
  const double seconds = seconds_now() - start;
  if (seconds > 1.0) std::printf("%6.1f s  %s\n", seconds, test.name.c_str());
  return true;
}

}  // namespace

Registration::Registration(const char* name, TestFunction function) { registered().push_back({name, function}); }

int run_all(const std::string& filter) {
  const uint64_t seed = choose_seed();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  int passed = 0, failed = 0;
  for (const Test& test : registered()) {
    if (test.name.find(filter) == std::string::npos) continue;
    std::fflush(stdout);
    run(test, seed) ? ++passed : ++failed;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace llmserve::test

int main(int argc, char** argv) { return llmserve::test::run_all(argc > 1 ? argv[1] : ""); }
