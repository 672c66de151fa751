#include "register_loop.h"
#include "roofs.h"

namespace llmserve::bench::avx512vnni {

namespace {

#define LLMSERVE_DOT(n) "vpdpbusd %%zmm31, %%zmm30, %%zmm" #n "\n\t"

double int8_loop(int64_t times, const uint8_t* operands) {
  const double operations = static_cast<double>(times) * 28 * 128;
  LLMSERVE_ZMM_LOOP(LLMSERVE_DOT, times, operands);
  return operations;
}

}  // namespace

void fill(RoofTable& table) { table.loops[kInt8] = int8_loop; }

}  // namespace llmserve::bench::avx512vnni
