// Pieces of the register loops in assembly: one instruction for each of the accumulators 0 to n - 1.
#pragma once

#define LLMSERVE_EACH_8(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7)
#define LLMSERVE_EACH_13(op) LLMSERVE_EACH_8(op) op(8) op(9) op(10) op(11) op(12)
#define LLMSERVE_EACH_28(op) \
  LLMSERVE_EACH_13(op)       \
  op(13) op(14) op(15) op(16) op(17) op(18) op(19) op(20) op(21) op(22) op(23) op(24) op(25) op(26) op(27)

#define LLMSERVE_ZERO_YMM(n) "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n\t"
#define LLMSERVE_ZERO_ZMM(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define LLMSERVE_CLOBBER_YMM                                                                                          \
  "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", \
      "ymm14", "ymm15"
#define LLMSERVE_CLOBBER_ZMM                                                                                          \
  "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", \
      "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25",     \
      "zmm26", "zmm27", "zmm30", "zmm31"

// 28 accumulators in zmm 0 to 27, the operands in 30 and 31. `op(n)` is the instruction on accumulator n.
#define LLMSERVE_ZMM_LOOP(op, times, operands) \
  __asm__ volatile(LLMSERVE_EACH_28(LLMSERVE_ZERO_ZMM) "vmovdqu64 (%1), %%zmm30\n\t"             \
                                                       "vmovdqu64 64(%1), %%zmm31\n\t"           \
                                                       "1:\n\t" LLMSERVE_EACH_28(op) "dec %0\n\t" \
                                                                                     "jnz 1b\n\t" \
                   : "+r"(times)                                                                 \
                   : "r"(operands)                                                               \
                   : LLMSERVE_CLOBBER_ZMM, "cc", "memory")
