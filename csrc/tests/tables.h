// The kernel tables that this machine can run, each feature step on its own.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace llmserve::test {

struct NamedTable {
  std::string name;
  KernelTable kernels;
};

// Scalar first; then avx2, avx512, avx512+vnni, avx512+vnni+bf16 as far as the machine goes.
const std::vector<NamedTable>& tables();

}  // namespace llmserve::test
