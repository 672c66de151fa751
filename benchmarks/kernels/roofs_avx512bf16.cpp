#include "register_loop.h"
#include "roofs.h"

namespace llmserve::bench::avx512bf16 {

namespace {

#define LLMSERVE_DOT(n) "vdpbf16ps %%zmm31, %%zmm30, %%zmm" #n "\n\t"

double bf16_loop(int64_t times, const uint8_t* operands) {
  const double operations = static_cast<double>(times) * 28 * 64;
  LLMSERVE_ZMM_LOOP(LLMSERVE_DOT, times, operands);
  return operations;
}

}  // namespace

void fill(RoofTable& table) { table.loops[kBf16] = bf16_loop; }

}  // namespace llmserve::bench::avx512bf16
