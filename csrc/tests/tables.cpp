#include "tests/tables.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "tests/check.h"

namespace llmserve::test {

namespace {

std::vector<NamedTable> make_tables() {
  std::vector<NamedTable> made;
  KernelTable table{};
  scalar::fill(table);
  made.push_back({"scalar", table});
#ifdef LLMSERVE_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    avx2::fill(table);
    made.push_back({"avx2", table});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    avx512::fill(table);
    made.push_back({"avx512", table});
    if (__builtin_cpu_supports("avx512vnni")) {
      avx512vnni::fill(table);
      made.push_back({"avx512+vnni", table});
      if (__builtin_cpu_supports("avx512bf16")) {
        avx512bf16::fill(table);
        made.push_back({"avx512+vnni+bf16", table});
      }
      if (std::strcmp(choose_kernels("").name, "amx") == 0) {
        amx::fill(table);
        made.push_back({"amx", table});
      }
    }
  }
#endif
  return made;
}

}  // namespace

const std::vector<NamedTable>& tables() {
  static const std::vector<NamedTable> made = make_tables();
  return made;
}

TEST(dispatch_chooses_the_last_table_and_obeys_the_limit) {
  const KernelTable best = choose_kernels("");
  const KernelTable& last = tables().back().kernels;
  CHECK(std::memcmp(&best, &last, sizeof(KernelTable)) == 0);
  CHECK(std::strcmp(choose_kernels("scalar").name, "scalar") == 0);
  CHECK(choose_kernels("scalar").rms_norm == tables().front().kernels.rms_norm);
  CHECK_THROWS(std::invalid_argument, choose_kernels("sse9"));
}

TEST(dispatch_leaves_no_kernel_empty) {
  for (const auto& [name, kernels] : tables()) {
    // All that follows the first kernel is function pointers.
    const auto* entry = reinterpret_cast<void* const*>(&kernels.gemm_packed[0]);
    const size_t first = offsetof(KernelTable, gemm_packed);
    for (size_t i = 0; i < (sizeof(KernelTable) - first) / sizeof(void*); ++i)
      CHECK(entry[i] != nullptr, name, " entry ", i);
  }
}

}  // namespace llmserve::test
