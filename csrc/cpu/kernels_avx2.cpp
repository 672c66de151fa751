// The AVX2 table, vectorized by the compiler where no file of its own has the kernel.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::avx2 {

#include "cpu/elementwise.inl"
#include "cpu/attention.inl"
#include "cpu/gemm_portable.inl"

void fill(KernelTable& table) {
  table.name = "avx2";
  fill_elementwise(table);
  fill_gemm(table);
  fill_gemm_int8(table);
  table.attention = attention;
}

}  // namespace llmserve::avx2
