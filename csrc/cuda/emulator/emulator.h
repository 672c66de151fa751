// CUDA's execution model on a CPU, for tests: the kernels' own sources, compiled by the host's compiler, run with their
// threads as fibers. Blocks run one after the other; the threads of a block run in an order that changes from launch to
// launch, each until it waits for others. What waits: barriers, shuffles, votes and matrix products of a warp.
//
// It is strict where a GPU may forgive: copies into shared memory arrive when they are waited for and not before;
// dynamic shared memory starts as NaN in each block and is watched at its ends; a barrier that not all reach ends the
// process with the kernel's place. It says nothing of speed, and races it finds only where an order of threads shows
// them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

namespace llmserve::cuda::emulator {

struct Thread {
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
};

// Of the fiber that runs.
const Thread& current();

// Runs `kernel` once for each thread of the grid.
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

void* dynamic_shared();

// Waits for all threads of the block that have not ended; returns how many of them came with `is_true`.
int block_barrier(bool is_true = false);

constexpr int kLanes = 32;
constexpr size_t kOffered = 64;  // bytes that a lane can show to the others

// Shows `size` bytes to the lanes of `mask`; returns what each lane showed, lane by lane. Every lane of the mask must
// come. What is returned lasts until the next call.
const unsigned char* exchange(unsigned mask, const void* offered, size_t size);

int lane();

// Copies that wait to be waited for.
void async_copy(void* to, const void* from, bool exists);
void async_commit();
void async_wait(int pending);

template <typename T>
T shown(const unsigned char* all, int of_lane) {
  T value;
  std::memcpy(&value, all + static_cast<size_t>(of_lane) * kOffered, sizeof(T));
  return value;
}

}  // namespace llmserve::cuda::emulator

#undef __shared__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define threadIdx (::llmserve::cuda::emulator::current().thread_idx)
#define blockIdx (::llmserve::cuda::emulator::current().block_idx)
#define blockDim (::llmserve::cuda::emulator::current().block_dim)
#define gridDim (::llmserve::cuda::emulator::current().grid_dim)

// --- what the headers declare for nvcc only -------------------------------------------------------------------------

inline void __syncthreads() { llmserve::cuda::emulator::block_barrier(); }
inline int __syncthreads_or(int x) { return llmserve::cuda::emulator::block_barrier(x != 0) > 0; }
inline int __syncthreads_count(int x) { return llmserve::cuda::emulator::block_barrier(x != 0); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { llmserve::cuda::emulator::exchange(mask, nullptr, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace llmserve::cuda::emulator {

template <typename T>
T shuffle(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= kOffered);
  const unsigned char* all = exchange(mask, &value, sizeof(T));
  return from < 0 ? value : shown<T>(all, from);
}

}  // namespace llmserve::cuda::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = llmserve::cuda::emulator::lane();
  return llmserve::cuda::emulator::shuffle(mask, value, lane / width * width + from % width);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  const int lane = llmserve::cuda::emulator::lane(), from = lane ^ with;
  return llmserve::cuda::emulator::shuffle(mask, value, from / width > lane / width ? -1 : from);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32) {
  const int lane = llmserve::cuda::emulator::lane();
  return llmserve::cuda::emulator::shuffle(mask, value, lane % width + by < width ? lane + by : -1);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32) {
  const int lane = llmserve::cuda::emulator::lane();
  return llmserve::cuda::emulator::shuffle(mask, value, lane % width >= by ? lane - by : -1);
}

inline unsigned __ballot_sync(unsigned mask, int is_true) {
  using namespace llmserve::cuda::emulator;
  const unsigned char* all = exchange(mask, &is_true, sizeof(is_true));
  unsigned out = 0;
  for (int i = 0; i < kLanes; ++i)
    if ((mask >> i & 1) != 0 && shown<int>(all, i) != 0) out |= 1u << i;
  return out;
}

inline int __any_sync(unsigned mask, int is_true) { return __ballot_sync(mask, is_true) != 0; }
inline int __all_sync(unsigned mask, int is_true) { return __ballot_sync(mask, is_true) == mask; }

// Threads take turns by themselves, so nothing comes between the two halves.
template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> x) {
  const T before = *at;
  *at = before + x;
  return before;
}

template <typename T>
T atomicMax(T* at, std::type_identity_t<T> x) {
  const T before = *at;
  if (x > before) *at = x;
  return before;
}

template <typename T>
T atomicMin(T* at, std::type_identity_t<T> x) {
  const T before = *at;
  if (x < before) *at = x;
  return before;
}

template <typename T>
T atomicExch(T* at, std::type_identity_t<T> x) {
  const T before = *at;
  *at = x;
  return before;
}

template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  const T before = *at;
  if (before == expected) *at = x;
  return before;
}

template <typename T>
T atomicOr(T* at, std::type_identity_t<T> x) {
  const T before = *at;
  *at = before | x;
  return before;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

template <typename T>
std::common_type_t<T> emulated_bits(const void* from) {
  T out;
  std::memcpy(&out, from, sizeof(T));
  return out;
}

inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(&x); }
inline int __float_as_int(float x) { return emulated_bits<int>(&x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(&x); }
inline float __int_as_float(int x) { return emulated_bits<float>(&x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(&x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(&x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline unsigned long long __double2ull_rn(double x) { return static_cast<unsigned long long>(std::nearbyint(x)); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32);
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 0xF;
    unsigned byte = static_cast<unsigned>(both >> 8 * (pick & 7) & 0xFF);
    if ((pick & 8) != 0) byte = (byte & 0x80) != 0 ? 0xFF : 0;
    out |= byte << 8 * i;
  }
  return out;
}

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return sum;
}

inline __nv_bfloat162 __hfma2(__nv_bfloat162 x, __nv_bfloat162 y, __nv_bfloat162 z) {
  return __floats2bfloat162_rn(std::fma(__low2float(x), __low2float(y), __low2float(z)),
                               std::fma(__high2float(x), __high2float(y), __high2float(z)));
}

inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
  return __floats2half2_rn(std::fma(__low2float(x), __low2float(y), __low2float(z)),
                           std::fma(__high2float(x), __high2float(y), __high2float(z)));
}

using std::max;
using std::min;

// --- csrc/cuda/ptx.h ------------------------------------------------------------------------------------------------

namespace llmserve::cuda {

namespace emulator {

// One lane's share of a product, from what all lanes hold: kValues of A and B lie in a word, `value` reads one.
template <typename Sum, int kValues, typename Read>
void mma(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Read& value) {
  uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* all = exchange(0xFFFFFFFFu, own, sizeof(own));
  struct Words {
    uint32_t words[6];
  };
  const int row = lane() / 4, pair = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const int column = pair + i % 2;
    for (int k = 0; k < 8 * kValues; ++k) {
      const int half = k / (4 * kValues), quad = k % (4 * kValues) / kValues, in_word = k % kValues;
      const auto left = shown<Words>(all, row * 4 + quad).words[half * 2 + i / 2];
      const auto right = shown<Words>(all, column * 4 + quad).words[4 + half];
      d[i] += value(left, in_word) * value(right, in_word);
    }
  }
}

}  // namespace emulator

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<float, 2>(d, a, b, [](uint32_t word, int i) {
    const uint32_t bits = (word >> 16 * i & 0xFFFFu) << 16;
    return emulated_bits<float>(&bits);
  });
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<float, 2>(d, a, b, [](uint32_t word, int i) {
    return __half2float(__half(__half_raw{static_cast<unsigned short>(word >> 16 * i)}));
  });
}

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<int32_t, 4>(d, a, b, [](uint32_t word, int i) { return int32_t{static_cast<int8_t>(word >> 8 * i)}; });
}

namespace emulator {

inline void ldmatrix(uint32_t (&out)[4], const void* row, bool transposed) {
  const unsigned char* all = exchange(0xFFFFFFFFu, &row, sizeof(row));
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int along = lane() / 4, across = lane() % 4 * 2 + j;
      const void* at = shown<const void*>(all, 8 * i + (transposed ? across : along));
      std::memcpy(&pair[j], static_cast<const uint16_t*>(at) + (transposed ? along : across), sizeof(uint16_t));
    }
    out[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  __syncwarp();  // nobody writes over the rows before all have read
}

}  // namespace emulator

inline void ldmatrix(uint32_t (&out)[4], const void* row) { emulator::ldmatrix(out, row, false); }
inline void ldmatrix_transposed(uint32_t (&out)[4], const void* row) { emulator::ldmatrix(out, row, true); }
inline void cp_async(void* to, const void* from, bool exists = true) { emulator::async_copy(to, from, exists); }
inline void cp_async_commit() { emulator::async_commit(); }

template <int kPending>
void cp_async_wait() {
  emulator::async_wait(kPending);
}

inline uint4 load_streaming(const void* from) { return *static_cast<const uint4*>(from); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline uint32_t opaque(uint32_t x) { return x; }

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int i = 0; i < 8; ++i)
    if ((kTable >> i & 1) != 0) out |= ((i & 4) != 0 ? a : ~a) & ((i & 2) != 0 ? b : ~b) & ((i & 1) != 0 ? c : ~c);
  return out;
}

inline uint32_t subtract_bf16(uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t left = (a >> 16 * i) << 16, right = (b >> 16 * i) << 16;
    const __nv_bfloat16 rounded = __float2bfloat16_rn(emulated_bits<float>(&left) - emulated_bits<float>(&right));
    out |= static_cast<uint32_t>(emulated_bits<uint16_t>(&rounded)) << 16 * i;
  }
  return out;
}

}  // namespace llmserve::cuda
