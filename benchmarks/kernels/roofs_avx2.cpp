#include <immintrin.h>

#include "register_loop.h"
#include "roofs.h"

namespace llmserve::bench::avx2 {

namespace {

// Four bytes' products at a time take three instructions: accumulator n, its temporary in n + 4.
#define LLMSERVE_PRODUCTS(n, t) "vpmaddubsw %%ymm13, %%ymm12, %%ymm" #t "\n\t"
#define LLMSERVE_PAIRS(n, t) "vpmaddwd %%ymm14, %%ymm" #t ", %%ymm" #t "\n\t"
#define LLMSERVE_ADD(n, t) "vpaddd %%ymm" #t ", %%ymm" #n ", %%ymm" #n "\n\t"
#define LLMSERVE_EACH_6(op) op(0, 6) op(1, 7) op(2, 8) op(3, 9) op(4, 10) op(5, 11)

double int8_loop(int64_t times, const uint8_t* operands) {
  const double operations = static_cast<double>(times) * 6 * 64;
  __asm__ volatile(LLMSERVE_EACH_13(LLMSERVE_ZERO_YMM)  //
                   "vmovdqu (%1), %%ymm12\n\t"
                   "vmovdqu 64(%1), %%ymm13\n\t"
                   "vmovdqu 32(%1), %%ymm14\n\t"
                   "1:\n\t" LLMSERVE_EACH_6(LLMSERVE_PRODUCTS) LLMSERVE_EACH_6(LLMSERVE_PAIRS)
                       LLMSERVE_EACH_6(LLMSERVE_ADD) "dec %0\n\t"
                                                     "jnz 1b\n\t"
                   : "+r"(times)
                   : "r"(operands)
                   : LLMSERVE_CLOBBER_YMM, "cc", "memory");
  return operations;
}

#define LLMSERVE_FMA(n) "vfmadd231ps %%ymm14, %%ymm13, %%ymm" #n "\n\t"

double f32_loop(int64_t times, const uint8_t* operands) {
  const double operations = static_cast<double>(times) * 13 * 16;
  __asm__ volatile(LLMSERVE_EACH_13(LLMSERVE_ZERO_YMM)  //
                   "vmovdqu (%1), %%ymm13\n\t"
                   "vmovdqu 32(%1), %%ymm14\n\t"
                   "1:\n\t" LLMSERVE_EACH_13(LLMSERVE_FMA) "dec %0\n\t"
                                                           "jnz 1b\n\t"
                   : "+r"(times)
                   : "r"(operands)
                   : LLMSERVE_CLOBBER_YMM, "cc", "memory");
  return operations;
}

uint64_t read(const uint8_t* data, size_t num_bytes) {
  __m256i sums[4];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (size_t at = 0; at < num_bytes; at += 256) {
    for (size_t i = 0; i < 4; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(data + at + 64 * i + kReadAhead), _MM_HINT_T0);
    for (size_t i = 0; i < 8; ++i)
      sums[i % 4] =
          _mm256_add_epi64(sums[i % 4], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + at + 32 * i)));
  }
  uint64_t words[4];
  const __m256i total = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), total);
  return words[0] + words[1] + words[2] + words[3];
}

}  // namespace

void fill(RoofTable& table) {
  table.loops[kInt8] = int8_loop;
  table.loops[kF32] = f32_loop;
  table.loops[kBf16] = f32_loop;  // bf16 weights are widened and multiplied as float32
  table.read = read;
}

}  // namespace llmserve::bench::avx2
