#include <immintrin.h>

#include "register_loop.h"
#include "roofs.h"

namespace llmserve::bench::avx512 {

namespace {

#define LLMSERVE_FMA(n) "vfmadd231ps %%zmm31, %%zmm30, %%zmm" #n "\n\t"

double f32_loop(int64_t times, const uint8_t* operands) {
  const double operations = static_cast<double>(times) * 28 * 32;
  LLMSERVE_ZMM_LOOP(LLMSERVE_FMA, times, operands);
  return operations;
}

uint64_t read(const uint8_t* data, size_t num_bytes) {
  __m512i sums[4];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (size_t at = 0; at < num_bytes; at += 256)
    for (size_t i = 0; i < 4; ++i) {
      const uint8_t* line = data + at + 64 * i;
      _mm_prefetch(reinterpret_cast<const char*>(line + kReadAhead), _MM_HINT_T0);
      sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(line));
    }
  const __m512i total = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(total));
}

}  // namespace

void fill(RoofTable& table) {
  table.loops[kF32] = f32_loop;
  table.loops[kBf16] = f32_loop;  // bf16 weights are widened and multiplied as float32
  table.read = read;
}

}  // namespace llmserve::bench::avx512
