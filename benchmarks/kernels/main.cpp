// GEMM kernels against the roofs of the machine. Everything is measured in rounds, each of which takes every case once
// and samples the roofs before and after it: a neighbour that comes and goes meets all of them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>

#include "report.h"

namespace llmserve::bench {

namespace {

constexpr size_t kWeightBytes = size_t{1} << 30;
constexpr size_t kColdBytes = size_t{256} << 20;  // of weights that a run passes by, so that no cache holds them
constexpr size_t kReadBytes = size_t{128} << 20;  // of one sample of the reading rate
constexpr double kMaxOperations = 12e9;           // of a run over all copies, where several rows make it long
constexpr int kMaxAttempts = 4;                   // to measure a case while nobody takes a core
constexpr double kUndisturbed = 0.9;              // of the best rate of the register loop
constexpr double kSameMemory = 0.7;               // a reading rate against the other of the pair
constexpr size_t kValueBytes = size_t{64} << 20;
constexpr int kMaxHeadRows = 64;  // only rows that are sampled from meet the head
constexpr int kAllRows[] = {1, 2, 4, 8, 16, 32, 64, 128, 512};
constexpr int kSomeRows[] = {1, 16, 512};
constexpr int kSquareRows[] = {16, 64, 512, 2048};

std::vector<int> rows_of(const Options& options, const Shape& shape, Part part) {
  std::vector<int> rows = options.m;
  if (rows.empty() && part == Part::kSquare)
    rows.assign(std::begin(kSquareRows), std::end(kSquareRows));
  else if (rows.empty() && shape.detailed)
    rows.assign(std::begin(kAllRows), std::end(kAllRows));
  else if (rows.empty())
    rows.assign(std::begin(kSomeRows), std::end(kSomeRows));
  if (part == Part::kHead) std::erase_if(rows, [](int m) { return m > kMaxHeadRows; });
  return rows;
}

int copies_of(const Case& what) {
  const auto bytes = static_cast<double>(what.matrix_bytes());
  double copies = std::ceil(static_cast<double>(kColdBytes) / bytes);
  if (what.m > 1) copies = std::min(copies, kMaxOperations / what.operations());
  return std::max(1, static_cast<int>(std::min(copies, static_cast<double>(kWeightBytes) / bytes)));
}

std::vector<Measured> plan(const Options& options) {
  std::vector<Measured> cases;
  for (const Shape& shape : options.shapes)
    for (const Matrix& matrix : shape.matrices())
      for (const PackedType type : options.types) {
        if (!options.has_part(matrix) || matrix.columns % describe(type).multiple != 0) continue;
        for (const int m : rows_of(options, shape, matrix.part)) {
          const Case what{type, matrix, m};
          if (what.matrix_bytes() <= kWeightBytes)
            cases.push_back({what, copies_of(what), 0, {}, {}, {}, {}});
          else
            std::fprintf(stderr, "left out: %s %s of %s is too large\n", matrix.shape, matrix.part_name(),
                         describe(type).name);
        }
      }
  return cases;
}

struct RoofNow {
  double dram, loop;  // bytes and operations per second
};

// The roofs with all threads, and with one.
class RoofSampler {
 public:
  RoofSampler(const std::string& isa, ThreadPool& pool, const Buffers& buffers)
      : table_(choose_roofs(isa)), pool_(pool), one_(1), buffers_(buffers) {
    for (ThreadPool* threads : {&pool_, &one_}) {
      samples_.push_back({"dram", threads->num_threads(), {}});
      for (const char* name : kRoofNames) samples_.push_back({name, threads->num_threads(), {}});
    }
  }

  // All that will be printed.
  void sample_all() {
    sample(pool_, 0);
    if (pool_.num_threads() > 1) sample(one_, 1 + kNumRoofs);
  }
  // What the measurements around it are compared with.
  RoofNow sample_now(Roof roof) {
    return {add(0, measure_read(table_, pool_, read_place(), kReadBytes)),
            add(1 + roof, measure_loop(table_, roof, pool_, buffers_.weights.data()))};
  }

  double best(Roof roof) const { return samples_[1 + size_t{roof}].per_s.high(); }

  void print() const {
    for (const RoofSamples& roof : samples_)
      if (!roof.per_s.values.empty() && roof.per_s.median() > 0.0) print_roof(roof);
  }

 private:
  void sample(ThreadPool& pool, size_t first) {
    add(first, measure_read(table_, pool, read_place(), kReadBytes));
    for (size_t i = 0; i < kNumRoofs; ++i)
      add(first + 1 + i, measure_loop(table_, static_cast<Roof>(i), pool, buffers_.weights.data()));
  }
  double add(size_t index, double value) {
    samples_[index].per_s.add(value);
    return value;
  }
  // Another eighth each time, so that no cache has any of it.
  const uint8_t* read_place() {
    place_ = (place_ + kReadBytes) % kWeightBytes;
    return buffers_.weights.data() + place_;
  }

  RoofTable table_;
  ThreadPool& pool_;
  ThreadPool one_;
  const Buffers& buffers_;
  std::vector<RoofSamples> samples_;
  size_t place_ = 0;
};

// Nothing but a neighbour on the same cores slows the register loop; and what memory gave before and after must agree.
bool undisturbed(const RoofNow& before, const RoofNow& after, double best_loop) {
  return std::min(before.loop, after.loop) >= kUndisturbed * best_loop &&
         std::min(before.dram, after.dram) >= kSameMemory * std::max(before.dram, after.dram);
}

// One measurement between two samples of the roofs. What was disturbed in every attempt does not count.
void measure(Measured& measured, double seconds, const std::string& isa, const Buffers& buffers, int num_threads,
             RoofSampler& roofs) {
  const Case& what = measured.what;
  const Roof roof = describe(what.type).roof;
  GemmCase gemm(what, measured.num_copies, isa, num_threads, buffers);
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    const RoofNow before = roofs.sample_now(roof);
    const CaseTime time = gemm.measure(seconds);
    const RoofNow after = roofs.sample_now(roof);
    if (!undisturbed(before, after, roofs.best(roof))) continue;
    measured.gemm_s.add(time.gemm);
    measured.call_s.add(time.call);
    const double dram = (before.dram + after.dram) / 2, loop = (before.loop + after.loop) / 2;
    measured.dram_share.add(static_cast<double>(what.matrix_bytes()) / time.gemm / dram);
    measured.roof_share.add(loop > 0.0 ? what.operations() / time.gemm / loop : 0.0);
    return;
  }
  ++measured.num_disturbed;
}

void run(const Options& options) {
  const std::string isa = choose_kernels(options.isa.c_str()).name;
  const int num_threads = options.threads > 0 ? options.threads : num_available_cores();
  std::vector<Measured> cases = plan(options);
  if (cases.empty()) throw std::invalid_argument("nothing to measure is left");
  ThreadPool pool(num_threads);
  const Buffers buffers(kWeightBytes, kValueBytes, pool);
  RoofSampler roofs(isa, pool, buffers);
  // A run that does not count and the samples of the roofs take more than half of the time.
  const double seconds = options.seconds / 3 / options.rounds / static_cast<double>(cases.size());
  print_run(options, isa, num_threads);
  for (int round = 0; round < options.rounds; ++round) {
    std::fprintf(stderr, "round %d of %d: %zu cases\n", round + 1, options.rounds, cases.size());
    roofs.sample_all();
    for (Measured& measured : cases) measure(measured, seconds, isa, buffers, num_threads, roofs);
  }
  roofs.print();
  for (const Measured& measured : cases) print_case(measured);
}

}  // namespace

}  // namespace llmserve::bench

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (std::find(words.begin(), words.end(), "--help") != words.end()) {
    std::fputs(llmserve::bench::usage().c_str(), stdout);
    return 0;
  }
  try {
    llmserve::bench::run(llmserve::bench::parse_options(words));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n%s", error.what(), llmserve::bench::usage().c_str());
    return 2;
  }
  return 0;
}
