#include "roofs.h"

namespace llmserve::bench::amx {

namespace {

struct alignas(64) UnitConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
};

// Four tiles of sums, one of 16 rows x 64 activations, one of 64 weights x 16 channels.
double int8_loop(int64_t times, const uint8_t*) {
  const double operations = static_cast<double>(times) * 4 * 16 * 16 * 64 * 2;
  const UnitConfig config;
  __asm__ volatile(
      "ldtilecfg %1\n\t"
      "1:\n\t"
      "tdpbssd %%tmm5, %%tmm4, %%tmm0\n\t"
      "tdpbssd %%tmm5, %%tmm4, %%tmm1\n\t"
      "tdpbssd %%tmm5, %%tmm4, %%tmm2\n\t"
      "tdpbssd %%tmm5, %%tmm4, %%tmm3\n\t"
      "dec %0\n\t"
      "jnz 1b\n\t"
      "tilerelease"
      : "+r"(times)
      : "m"(config)
      : "cc", "memory");
  return operations;
}

}  // namespace

void fill(RoofTable& table) { table.loops[kInt8] = int8_loop; }

}  // namespace llmserve::bench::amx
