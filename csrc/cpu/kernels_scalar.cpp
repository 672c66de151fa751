// The scalar table: every kernel in portable C++, for the baseline of the architecture.
#include "cpu/kernel_table.h"

namespace llmserve::scalar {

#include "cpu/elementwise.inl"
#include "cpu/attention.inl"
#include "cpu/gemm_portable.inl"

void fill(KernelTable& table) {
  table.name = "scalar";
  fill_elementwise(table);
  fill_gemm(table);
  table.attention = attention;
}

}  // namespace llmserve::scalar
