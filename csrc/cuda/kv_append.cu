// A group of lanes has a head of a token, eight values each, as one load of 16 bytes and one store: 32 lanes where
// head_dim is 256, two heads of 128 in a warp. All arithmetic is float32 in registers, and rounded once. Values that
// are rotated together may lie in any two lanes (half of rotary_dim need not be a multiple of eight), so that partners
// are read from shared memory.
//
// sm_90: 40 registers at most and 8 KB of shared memory of a block of 256 threads, so that 6 blocks, 48 warps, are on
// an SM: 24 KB of loads are under way in each, and of stores no less.
#include "cuda/kv_append.h"

#include "cuda/device.h"

namespace llmserve::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kWidth = 8;  // values of a lane
constexpr int64_t kMostHeadDim = kWarp * kWidth;
constexpr float kTiny = 1e-35f;  // rows that are smaller are zeros: their scale would have no reciprocal

template <typename T>
constexpr bool kIsQuantized = sizeof(T) == 1;

// The largest value of a one-byte type.
template <typename T>
constexpr float kLargest = std::is_same_v<T, int8_t> ? 127.0f : 448.0f;

__device__ void quantize(float x, int8_t& out) {
  const int rounded = __float2int_rn(x);  // half to even
  out = static_cast<int8_t>(rounded < -127 ? -127 : rounded > 127 ? 127 : rounded);
}

__device__ void quantize(float x, __nv_fp8_e4m3& out) { out.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

template <int kLanes>
__device__ float sum_of_head(float x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step, kLanes);
  return x;
}

// The largest magnitude of a head. Bits of magnitudes are in the order of the values with NaN above all: what is not
// finite reaches the scale, and from there whoever reads the token.
template <int kLanes>
__device__ float largest_of_head(const float (&values)[kWidth]) {
  unsigned bits = 0;
  for (int i = 0; i < kWidth; ++i) bits = max(bits, __float_as_uint(fabsf(values[i])));
  for (int step = kLanes / 2; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(kAllLanes, bits, step, kLanes));
  return __uint_as_float(bits);
}

// Turns the pairs of a head by the angles of its position. `row` is where the head's values are shown to its lanes.
__device__ void rotate(const KvAppendArgs& args, int64_t position, int first, float* row, float (&values)[kWidth]) {
  const int rotary = static_cast<int>(args.rotary_dim), half = rotary / 2;
  const auto* angles = reinterpret_cast<const float2*>(args.rope) + position * half;
  for (int i = 0; i < kWidth; ++i) row[first + i] = values[i];
  __syncwarp();
  if (first >= rotary) return;
  for (int i = 0; i < kWidth; ++i) {
    const int at = first + i;
    if (at >= rotary) break;
    const bool is_second = args.is_interleaved != 0 ? at % 2 != 0 : at >= half;
    const int apart = args.is_interleaved != 0 ? 1 : half, other = is_second ? at - apart : at + apart;
    const float2 angle = angles[args.is_interleaved != 0 ? at / 2 : at % half];
    values[i] = values[i] * angle.x + (is_second ? row[other] : -row[other]) * angle.y;
  }
}

template <typename T, int kLanes>
__device__ void write_to_cache(const KvAppendArgs& args, bool is_key, int64_t kv_head, int64_t slot, int first,
                               bool exists, const float (&values)[kWidth]) {
  const KvCache& cache = args.cache;
  const int shift = __ffs(static_cast<int>(cache.block_size)) - 1;
  const int64_t row = ((((slot >> shift) * cache.kv_heads) + kv_head) << shift) + (slot & (cache.block_size - 1));
  T* to = static_cast<T*>(is_key ? cache.k : cache.v) + row * cache.head_dim + first;
  Vector<T, kWidth> out;
  if constexpr (kIsQuantized<T>) {
    const float largest = largest_of_head<kLanes>(values);
    const bool is_zero = largest < kTiny;
    const float inverse = is_zero ? 0.0f : kLargest<T> / largest;
    for (int i = 0; i < kWidth; ++i) quantize(values[i] * inverse, out.values[i]);
    if (exists && first == 0) (is_key ? cache.k_scales : cache.v_scales)[row] = is_zero ? 0.0f : largest / kLargest<T>;
  } else {
    for (int i = 0; i < kWidth; ++i) from_float(values[i], out.values[i]);
  }
  if (exists) *reinterpret_cast<Vector<T, kWidth>*>(to) = out;
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kBlock) kv_append_kernel(KvAppendArgs args) {
  __shared__ float shown[kBlock * kWidth];
  const int in_head = static_cast<int>(threadIdx.x) % kLanes, first = in_head * kWidth;
  const int64_t kv_heads = args.cache.kv_heads, head_dim = args.cache.head_dim;
  const auto in_row = static_cast<uint32_t>(args.heads + 2 * kv_heads);
  const uint32_t item = blockIdx.x * (kBlock / kLanes) + threadIdx.x / kLanes;
  const bool exists = item < args.tokens * in_row && first < head_dim;  // all lanes take part in what is exchanged
  const int64_t token = exists ? item / in_row : 0, head = exists ? item % in_row : 0;
  const bool is_query = head < args.heads, is_key = !is_query && head < args.heads + kv_heads;

  float values[kWidth] = {};
  if (exists) {
    const auto* from = static_cast<const __nv_bfloat16*>(args.qkv) + token * args.qkv_stride + head * head_dim + first;
    const auto vector = *reinterpret_cast<const Vector<__nv_bfloat16, kWidth>*>(from);
    for (int i = 0; i < kWidth; ++i) values[i] = to_float(vector.values[i]);
  }
  float squares = 0.0f;
  for (int i = 0; i < kWidth; ++i) squares += values[i] * values[i];
  const float factor = rsqrtf(sum_of_head<kLanes>(squares) / static_cast<float>(head_dim) + args.eps);
  const float* weight = is_query ? args.q_norm : is_key ? args.k_norm : nullptr;
  if (exists && weight != nullptr)
    for (int i = 0; i < kWidth; ++i) values[i] = values[i] * factor * weight[first + i];
  if (args.rope != nullptr) {
    float turned[kWidth];
    for (int i = 0; i < kWidth; ++i) turned[i] = values[i];
    rotate(args, args.positions[token], first, shown + threadIdx.x / kLanes * (kLanes * kWidth), turned);
    if (is_query || is_key)
      for (int i = 0; i < kWidth; ++i) values[i] = turned[i];
  }

  if (exists && is_query) {
    Vector<__nv_bfloat16, kWidth> out;
    for (int i = 0; i < kWidth; ++i) from_float(values[i], out.values[i]);
    auto* to = static_cast<__nv_bfloat16*>(args.q_out) + token * args.q_stride + head * head_dim + first;
    *reinterpret_cast<Vector<__nv_bfloat16, kWidth>*>(to) = out;
  }
  const int64_t slot = args.slots[token], kv_head = is_query ? 0 : head - args.heads - (is_key ? 0 : kv_heads);
  write_to_cache<T, kLanes>(args, is_key, kv_head, slot < 0 ? 0 : slot, first, exists && !is_query && slot >= 0,
                            values);
}

template <typename T>
cudaError_t launch_type(const KvAppendArgs& args, cudaStream_t stream) {
  const int64_t vectors = args.cache.head_dim / kWidth;
  const int lanes = vectors <= 8 ? 8 : vectors <= 16 ? 16 : 32;
  const auto kernel = lanes == 8    ? kv_append_kernel<T, 8>
                      : lanes == 16 ? kv_append_kernel<T, 16>
                                    : kv_append_kernel<T, 32>;
  const int64_t items = args.tokens * (args.heads + 2 * args.cache.kv_heads), of_block = kBlock / lanes;
  if (items > INT32_MAX) return cudaErrorInvalidValue;
  return launch(kernel, static_cast<unsigned>((items + of_block - 1) / of_block), kBlock, 0, stream, args);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_kv_append(const llmserve::cuda::KvAppendArgs* args, void* stream) {
  using namespace llmserve::cuda;
  if (args->tokens == 0) return cudaSuccess;
  const int64_t head_dim = args->cache.head_dim;
  if (args->tokens < 0 || head_dim <= 0 || head_dim > kMostHeadDim || head_dim % kWidth != 0)
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args->cache.type) {
    case Type::kBF16: return launch_type<__nv_bfloat16>(*args, on);
    case Type::kF16: return launch_type<__half>(*args, on);
    case Type::kF8E4M3: return launch_type<__nv_fp8_e4m3>(*args, on);
    case Type::kI8: return launch_type<int8_t>(*args, on);
    default: return cudaErrorInvalidValue;
  }
}
