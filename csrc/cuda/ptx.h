// The instructions that CUDA C++ has no word for: matrix products of a warp, the loads of their operands, and copies
// into shared memory that do not wait. The emulator has them of the same signatures.
#pragma once

#include "cuda/device.h"

#ifndef LLMSERVE_CUDA_EMULATOR

namespace llmserve::cuda {

// d += a b, bfloat16 to float32. a is 16x16, b 16x8, d 16x8. With row = lane / 4 and pair = lane % 4 * 2 a lane holds
//   a[0]: (row, pair)        a[1]: (row + 8, pair)    a[2]: (row, pair + 8)    a[3]: (row + 8, pair + 8), two values
//   b[0]: (pair, row)        b[1]: (pair + 8, row), two values of a column
//   d[0], d[1]: (row, pair)  d[2], d[3]: (row + 8, pair)
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of float16.
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, int8 to int32. a is 16x32, b 32x8. As above with four values where two are, pair = lane % 4 * 4, and 16 in
// place of 8 along the values that are summed.
__device__ inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit values: lane i says where row i % 8 of matrix i / 8 lies (16 bytes, aligned), and gets
// the two values at (lane / 4, lane % 4 * 2) of each; transposed those at (lane % 4 * 2, lane / 4) and one row below.
__device__ inline void ldmatrix(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global into shared memory, both aligned; zeros where not `exists` (`from` must be a valid address all
// the same). Done when cp_async_wait says so, and visible to other threads after a barrier behind that.
__device__ inline void cp_async(void* to, const void* from, bool exists = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

// The copies so far are a group.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes that are read once: they do not stay in the first cache.
__device__ inline uint4 load_streaming(const void* from) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(from));
  return out;
}

// 2^x, approximately.
__device__ inline float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// x, of which the compiler no longer knows where it came from: what depends on it is computed where it is needed.
__device__ inline uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Picks three-input bits: bit (a << 2 | b << 1 | c) of kTable.
template <int kTable>
__device__ inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return out;
}

// a - b of two bfloat16 each, rounded once. As a fused multiply-add, which sm_80 has too.
__device__ inline uint32_t subtract_bf16(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(b), "r"(0xBF80BF80), "r"(a));
  return out;
}

}  // namespace llmserve::cuda

#endif
