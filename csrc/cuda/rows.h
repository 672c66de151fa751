// What kernels that give a row to a group of threads share: vectors of eight values, sums and maxima of a row in one
// order whatever the block holds besides, and int8 rows with a scale.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/device.h"

namespace llmserve::cuda {

constexpr int kRowWidth = 8;           // values of a vector
constexpr int kRowVectors = 4;         // of a thread
constexpr int kMostRowThreads = 1024;  // of a row
constexpr int kRowBlock = 256;         // threads of a block, where a row takes fewer
constexpr int64_t kMostRowColumns = int64_t{kMostRowThreads} * kRowWidth * kRowVectors;

// `go` of each vector of a thread, without a loop, so that what it indexes stays in registers.
template <int kVectors, typename Go>
__device__ void for_each_vector(const Go& go) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    (go(kIndices), ...);
  }(std::make_integer_sequence<int, kVectors>{});
}

// Eight values from `column` on; past the row they are zero.
template <typename T, bool kWhole>
__device__ void load_vector(const T* row, int column, int columns, float (&out)[kRowWidth]) {
  if constexpr (kWhole) {
    const auto vector = *reinterpret_cast<const Vector<T, kRowWidth>*>(row + column);
    for (int i = 0; i < kRowWidth; ++i) out[i] = to_float(vector.values[i]);
  } else {
    for (int i = 0; i < kRowWidth; ++i) out[i] = column + i < columns ? to_float(row[column + i]) : 0.0f;
  }
}

template <typename T, bool kWhole>
__device__ void store_vector(T* row, int column, int columns, const float (&x)[kRowWidth]) {
  if constexpr (kWhole) {
    Vector<T, kRowWidth> vector;
    for (int i = 0; i < kRowWidth; ++i) from_float(x[i], vector.values[i]);
    *reinterpret_cast<Vector<T, kRowWidth>*>(row + column) = vector;
  } else {
    for (int i = 0; i < kRowWidth; ++i)
      if (column + i < columns) from_float(x[i], row[column + i]);
  }
}

// The sum over the kThreads threads of a row, whose group starts at a multiple of kThreads. All threads of the block
// come. A kernel that sums twice says which sum it is: each has shared memory of its own, so that none waits for the
// readers of the last.
template <int kThreads, int kUse = 0>
__device__ float sum_of_row(float x) {
  constexpr int kLanes = kThreads < kWarp ? kThreads : kWarp;
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step, kLanes);
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ float sums[kMostRowThreads / kWarp];
    const int warp = static_cast<int>(threadIdx.x) / kWarp, first = warp / kWarps * kWarps;
    if (threadIdx.x % kWarp == 0) sums[warp] = x;
    __syncthreads();
    x = 0.0f;
    for (int i = 0; i < kWarps; ++i) x += sums[first + i];
  }
  return x;
}

// The largest over the threads of a row, likewise.
template <int kThreads>
__device__ uint32_t max_of_row(uint32_t x) {
  constexpr int kLanes = kThreads < kWarp ? kThreads : kWarp;
  for (int step = kLanes / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, step, kLanes));
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ uint32_t largest[kMostRowThreads / kWarp];
    const int warp = static_cast<int>(threadIdx.x) / kWarp, first = warp / kWarps * kWarps;
    if (threadIdx.x % kWarp == 0) largest[warp] = x;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) x = max(x, largest[first + i]);
  }
  return x;
}

// |x| as bits, which have the order of the numbers, and NaN above all: a row that holds one gets a scale of NaN.
__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }

// Of an int8 row, from the largest magnitude in it.
__device__ inline float int8_scale(uint32_t largest) { return __fdiv_rn(__uint_as_float(largest), 127.0f); }

// Round half to even; 0 in a row of zeros. Where the scale is not finite, whatever is stored times it is NaN or
// infinite.
__device__ inline int8_t to_int8(float x, float scale) {
  if (scale == 0.0f) return 0;
  return static_cast<int8_t>(__float2int_rn(fminf(fmaxf(__fdiv_rn(x, scale), -127.0f), 127.0f)));
}

template <bool kWhole>
__device__ void store_int8(int8_t* row, int column, int columns, float scale, const float (&x)[kRowWidth]) {
  if constexpr (kWhole) {
    Vector<int8_t, kRowWidth> vector;
    for (int i = 0; i < kRowWidth; ++i) vector.values[i] = to_int8(x[i], scale);
    *reinterpret_cast<Vector<int8_t, kRowWidth>*>(row + column) = vector;
  } else {
    for (int i = 0; i < kRowWidth; ++i)
      if (column + i < columns) row[column + i] = to_int8(x[i], scale);
  }
}

// residual += x, and x becomes what the residual stream then holds.
template <bool kWhole>
__device__ void add_to_residual(float* residual, int column, int columns, float (&x)[kRowWidth]) {
  float before[kRowWidth];
  load_vector<float, kWhole>(residual, column, columns, before);
  for (int i = 0; i < kRowWidth; ++i) x[i] += before[i];
  store_vector<float, kWhole>(residual, column, columns, x);
}

// Writes the row that its threads hold, in bfloat16 or, where the arguments have scales, in int8. `largest` is this
// thread's magnitude; row -1 is none. All threads of the block come.
template <int kThreads, bool kWhole, typename Args, int kVectors>
__device__ void store_row(const Args& args, int64_t row, int in_row, uint32_t largest,
                          const float (&values)[kVectors][kRowWidth]) {
  const int columns = row < 0 ? 0 : static_cast<int>(args.columns);
  float scale = 0.0f;
  if (args.scales != nullptr) {
    scale = int8_scale(max_of_row<kThreads>(largest));
    if (row >= 0 && in_row == 0) args.scales[row] = scale;
  }
  for_each_vector<kVectors>([&](int v) {
    const int column = (v * kThreads + in_row) * kRowWidth;
    if (column >= columns) return;
    if (args.scales != nullptr)
      store_int8<kWhole>(static_cast<int8_t*>(args.out) + row * args.out_stride, column, columns, scale, values[v]);
    else
      store_vector<__nv_bfloat16, kWhole>(static_cast<__nv_bfloat16*>(args.out) + row * args.out_stride, column,
                                          columns, values[v]);
  });
}

// Whether vectors of T may start at every multiple of eight values of the tensor.
template <typename T>
bool rows_are_aligned(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Vector<T, kRowWidth>) == 0 && stride % kRowWidth == 0;
}

// The same of a result: bfloat16, or int8 where there are scales.
inline bool results_are_aligned(const void* out, int64_t stride, bool is_int8) {
  return is_int8 ? rows_are_aligned<int8_t>(out, stride) : rows_are_aligned<__nv_bfloat16>(out, stride);
}

// Calls `go` with the threads that a row of `columns` takes, as a constant.
template <typename Go>
auto with_row_threads(int64_t columns, const Go& go) {
  const int64_t vectors = (columns + kRowWidth - 1) / kRowWidth;
  if (vectors <= 8) return go(std::integral_constant<int, 8>{});
  if (vectors <= 32) return go(std::integral_constant<int, 32>{});
  if (vectors <= 512) return go(std::integral_constant<int, 256>{});
  return go(std::integral_constant<int, kMostRowThreads>{});
}

}  // namespace llmserve::cuda
