// The AVX-512 table without VNNI and BF16: the portable kernels, vectorized by the compiler for this ISA.
// The integer and bf16 kernels of machines that have those features replace entries of it.
#include "cpu/kernel_table.h"

namespace llmserve::avx512 {

#include "cpu/elementwise.inl"
#include "cpu/attention.inl"
#include "cpu/gemm_portable.inl"

void fill(KernelTable& table) {
  // Without VNNI the AVX2 integer kernels are the better ones.
  const TileFunction gemm_q4_avx2 = table.gemm_q4, gemm_u8_avx2 = table.gemm_u8;
  table.name = "avx512";
  fill_elementwise(table);
  fill_gemm(table);
  table.gemm_q4 = gemm_q4_avx2;
  table.gemm_u8 = gemm_u8_avx2;
  table.attention = attention;
}

}  // namespace llmserve::avx512
