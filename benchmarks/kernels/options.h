// The command line of the benchmark.
#pragma once

#include <string>
#include <vector>

#include "packed_types.h"
#include "shapes.h"

namespace llmserve::bench {

struct Options {
  std::vector<PackedType> types;  // empty: all that a full run has
  std::vector<int> m;             // empty: what a full run has of the shape
  std::vector<Shape> shapes;
  std::vector<std::string> parts;  // empty: all
  std::string isa;                 // as for choose_kernels
  int threads = 0;                 // 0: all cores
  double seconds = 150.0;          // of measuring, about
  int rounds = 5;
  std::string commit;  // printed as it is

  bool has_part(const Matrix& matrix) const;
};

// Throws std::invalid_argument, which names the option.
Options parse_options(const std::vector<std::string>& arguments);
std::string usage();

}  // namespace llmserve::bench
