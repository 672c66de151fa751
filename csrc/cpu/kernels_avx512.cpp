// The AVX-512 table without VNNI and BF16: the portable kernels, vectorized by the compiler for this ISA.
// The integer and bf16 kernels of machines that have those features replace entries of it.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::avx512 {

#include "cpu/elementwise.inl"
#include "cpu/attention.inl"
#include "cpu/gemm_portable.inl"

namespace {

constexpr int kVectors = 4;  // zmm of 16 channels in a tile

inline __m512 load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Byte k of each channel's four codes, minus the zero point, as floats.
inline __m512 code_floats(__m512i codes, int k, __m512 zero) {
  const __m512i bytes = _mm512_and_si512(_mm512_srl_epi32(codes, _mm_cvtsi32_si128(8 * k)), _mm512_set1_epi32(255));
  return _mm512_sub_ps(_mm512_cvtepi32_ps(bytes), zero);
}

template <int kRows>
void u8_f32_rows(const TileArgs& args, int row) {
  const size_t stride = unpacked_group_bytes(args.minimum);
  const __m512 zero = _mm512_set1_ps(static_cast<float>(args.zero_point));
  const float* x = args.x.f32 + row * args.x.columns;
  __m512 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_ps();
  const uint8_t* group = args.weights;
  for (int64_t g = 0; g < args.x.columns / kGroup; ++g, group += stride, x += kGroup) {
    __m512 sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
    for (int k = 0; k < kGroup; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        const __m512 codes = code_floats(_mm512_loadu_si512(group + (k / 4 * kVectors + v) * 64), k % 4, zero);
        for (int r = 0; r < kRows; ++r)
          sums[r][v] = _mm512_fmadd_ps(codes, _mm512_set1_ps(x[r * args.x.columns + k]), sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const __m512 x_sum = _mm512_set1_ps(args.minimum ? group_sum(x + r * args.x.columns) : 0.0f);
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = _mm512_fmadd_ps(sums[r][v], load_f16(group + kByteBytes + v * 32), acc[r][v]);
        if (args.minimum)
          acc[r][v] = _mm512_fmadd_ps(load_f16(group + kByteBytes + kTableBytes + v * 32), x_sum, acc[r][v]);
      }
    }
  }
  float* out = args.out + row * args.out_stride;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + r * args.out_stride + v * 16, acc[r][v]);
}

void gemm_u8_f32_avx512(const TileArgs& args) {
  int row = 0;
  for (; row + 3 <= args.rows; row += 3) u8_f32_rows<3>(args, row);
  for (; row < args.rows; ++row) u8_f32_rows<1>(args, row);
}

// The same rule as quantize_group, bit by bit: the group is two registers.
inline void quantize_group_avx512(const float* x, int8_t* codes, GroupMeta* meta) {
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  const __m512 low_abs = _mm512_abs_ps(low), high_abs = _mm512_abs_ps(high);
  const float first = _mm512_reduce_max_ps(_mm512_max_ps(low_abs, high_abs));
  const __m512 peak = _mm512_set1_ps(first);
  const uint32_t equal = static_cast<uint32_t>(_mm512_cmpeq_ps_mask(low_abs, peak)) |
                         static_cast<uint32_t>(_mm512_cmpeq_ps_mask(high_abs, peak)) << 16;
  const bool numbers = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q) == 0;
  if (equal == 0 || !numbers || !(first < 1e38f)) return quantize_group(x, codes, meta);  // NaN or infinity
  const uint32_t at = equal & (~equal + 1);
  const auto low_at = static_cast<__mmask16>(at), high_at = static_cast<__mmask16>(at >> 16);
  const __m512 zero = _mm512_setzero_ps();
  const float second = _mm512_reduce_max_ps(
      _mm512_max_ps(_mm512_mask_mov_ps(low_abs, low_at, zero), _mm512_mask_mov_ps(high_abs, high_at, zero)));
  const bool apart = first > kOutlierRatio * second;
  const float largest = apart ? second : first;
  const bool usable = largest > 1e-30f;
  const float inverse = usable ? 127.0f / largest : 0.0f;
  const float scale = usable ? largest / 127.0f : 0.0f;
  const __m512 factor = _mm512_set1_ps(inverse);
  const auto low_kept = static_cast<__mmask16>(apart ? ~low_at : ~0),
             high_kept = static_cast<__mmask16>(apart ? ~high_at : ~0);
  const __m512i low_codes = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(low_kept, low, factor));
  const __m512i high_codes = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(high_kept, high, factor));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(low_codes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtepi32_epi8(high_codes));
  const int sum = _mm512_reduce_add_epi32(_mm512_add_epi32(low_codes, high_codes));
  const int index = __builtin_ctz(at);
  const float value = apart ? x[index] : 0.0f;
  *meta = {scale, static_cast<int16_t>(sum), static_cast<int16_t>(index), scale * static_cast<float>(sum) + value,
           value};
}

void quantize_q8_avx512(const float* x, int8_t* codes, GroupMeta* meta, int64_t n) {
  for (int64_t g = 0; g < n / kGroup; ++g) quantize_group_avx512(x + g * kGroup, codes + g * kGroup, meta + g);
}

}  // namespace

void fill(KernelTable& table) {
  // Without VNNI the AVX2 integer kernels are the better ones.
  const TileFunction gemm_q4_avx2 = table.gemm_q4, gemm_u8_avx2 = table.gemm_u8;
  table.name = "avx512";
  fill_elementwise(table);
  fill_gemm(table);
  table.gemm_q4 = gemm_q4_avx2;
  table.gemm_u8 = gemm_u8_avx2;
  table.gemm_u8_f32 = gemm_u8_f32_avx512;
  table.quantize_q8 = quantize_q8_avx512;
  table.attention = attention;
}

}  // namespace llmserve::avx512
