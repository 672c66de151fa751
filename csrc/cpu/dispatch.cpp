// Chooses the kernel table by what the processor and the operating system support. Compiled without -m flags.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernel_table.h"

#ifdef LLMSERVE_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmserve {

namespace {

struct CpuFeatures {
  bool avx2 = false;
  bool avx512 = false;
  bool vnni = false;
  bool bf16 = false;
  bool amx = false;
};

#ifdef LLMSERVE_X86
uint64_t extended_control() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

bool bit(uint32_t word, int index) { return ((word >> index) & 1u) != 0; }

// Linux gives the registers of the matrix unit (8 KB a thread) to processes that ask, all threads at once.
bool may_use_matrix_unit() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

CpuFeatures detect() {
  CpuFeatures features;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return features;  // OSXSAVE
  const bool fma = bit(c, 12), f16c = bit(c, 29);
  const uint64_t state = extended_control();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  features.avx2 = (state & 0x6) == 0x6 && bit(b, 5) && fma && f16c;
  const bool zmm_state = (state & 0xE6) == 0xE6;
  features.avx512 = features.avx2 && zmm_state && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  features.vnni = features.avx512 && bit(c, 11);
  const bool has_unit = (state & 0x60000) == 0x60000 && bit(d, 24) && bit(d, 25);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) features.bf16 = features.vnni && bit(a, 5);
  features.amx = features.bf16 && has_unit && may_use_matrix_unit();
  return features;
}
#else
CpuFeatures detect() { return {}; }
#endif

int level_of(const char* name) {
  if (name[0] == '\0') return 3;
  if (std::strcmp(name, "scalar") == 0) return 0;
  if (std::strcmp(name, "avx2") == 0) return 1;
  if (std::strcmp(name, "avx512") == 0) return 2;
  if (std::strcmp(name, "amx") == 0) return 3;
  throw std::invalid_argument(std::string("isa: '") + name + "' is not one of scalar, avx2, avx512, amx");
}

}  // namespace

KernelTable choose_kernels(const char* limit) {
  const int level = level_of(limit);
  const CpuFeatures has = detect();
  if (limit[0] != '\0' && ((level == 1 && !has.avx2) || (level == 2 && !has.avx512) || (level == 3 && !has.amx)))
    throw std::invalid_argument(std::string("isa: this machine has no ") + limit);
  KernelTable table{};
  scalar::fill(table);
#ifdef LLMSERVE_X86
  if (level >= 1 && has.avx2) avx2::fill(table);
  if (level >= 2 && has.avx512) avx512::fill(table);
  if (level >= 2 && has.vnni) avx512vnni::fill(table);
  if (level >= 2 && has.bf16) avx512bf16::fill(table);
  if (level >= 3 && has.amx) amx::fill(table);
#endif
  return table;
}

}  // namespace llmserve
