// What the benchmark prints: one JSON object a line.
#pragma once

#include <string>
#include <vector>

#include "gemm_case.h"
#include "options.h"

namespace llmserve::bench {

// One figure of several rounds.
struct Samples {
  std::vector<double> values;

  void add(double value) { values.push_back(value); }
  double median() const;
  double low() const;
  double high() const;
};

struct RoofSamples {
  std::string name;  // "dram" or as in kRoofNames
  int threads;
  Samples per_s;  // bytes or operations
};

// A case with its samples. Shares are of the roofs sampled just before and after each measurement.
struct Measured {
  Case what;
  int num_copies;
  int num_disturbed;  // rounds that do not count, because a neighbour disturbed each attempt
  Samples gemm_s, call_s, dram_share, roof_share;
};

void print_run(const Options& options, const std::string& isa, int num_threads);
void print_roof(const RoofSamples& roof);
void print_case(const Measured& measured);

}  // namespace llmserve::bench
