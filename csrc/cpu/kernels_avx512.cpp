// The AVX-512 table without VNNI and BF16: the portable kernels, vectorized by the compiler for this ISA.
// The integer and bf16 kernels of machines that have those features replace entries of it.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::avx512 {

#include "cpu/elementwise.inl"
#include "cpu/attention.inl"
#include "cpu/gemm_portable.inl"

namespace {

// Of each run of four lanes, in all of them.
inline __m512 largest_of_four(__m512 x) {
  const __m512 pairs = _mm512_max_ps(x, _mm512_permute_ps(x, 0xB1));
  return _mm512_max_ps(pairs, _mm512_permute_ps(pairs, 0x4E));
}

// The same rule as quantize_group, bit by bit: the group is two registers of four steps each.
inline void quantize_group_avx512(const float* x, int8_t* codes, GroupMeta* meta) {
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  const __m512 low_abs = _mm512_abs_ps(low), high_abs = _mm512_abs_ps(high);
  const __m512 limit = _mm512_set1_ps(1e38f);
  const __m512 low_max = largest_of_four(low_abs), high_max = largest_of_four(high_abs);
  // The largest and the second largest of the eight steps, each step counted once.
  __m512 first = _mm512_max_ps(low_max, high_max), second = _mm512_min_ps(low_max, high_max);
  const auto merge = [&](__m512 other_first, __m512 other_second) {
    second = _mm512_max_ps(_mm512_min_ps(first, other_first), _mm512_max_ps(second, other_second));
    first = _mm512_max_ps(first, other_first);
  };
  merge(_mm512_shuffle_f32x4(first, first, 0x4E), _mm512_shuffle_f32x4(second, second, 0x4E));
  merge(_mm512_shuffle_f32x4(first, first, 0xB1), _mm512_shuffle_f32x4(second, second, 0xB1));
  const float peak = _mm512_cvtss_f32(first);
  const auto finite = static_cast<uint32_t>(_mm512_cmp_ps_mask(low_abs, limit, _CMP_LT_OQ)) &
                      static_cast<uint32_t>(_mm512_cmp_ps_mask(high_abs, limit, _CMP_LT_OQ));
  if (finite != 0xFFFFu || !(peak > 1e-28f)) return quantize_group(x, codes, meta);
  const uint32_t equal = static_cast<uint32_t>(_mm512_cmpeq_ps_mask(low_max, first)) |
                         static_cast<uint32_t>(_mm512_cmpeq_ps_mask(high_max, first)) << 16;
  const int at = __builtin_ctz(equal) / 4;
  const __m512 largest = _mm512_max_ps(second, _mm512_mul_ps(first, _mm512_set1_ps(kLeastShare)));
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(127.0f), largest);
  const float scale = _mm512_cvtss_f32(largest) / 127.0f;
  const __m512i low_codes = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
  const __m512i high_codes = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
  const __m512i half = _mm512_set1_epi32(1 << (kHighBits - 1));
  const uint32_t lanes = 15u << (at * 4);
  const __m512i low_upper =
      _mm512_maskz_srai_epi32(static_cast<__mmask16>(lanes), _mm512_add_epi32(low_codes, half), kHighBits);
  const __m512i high_upper =
      _mm512_maskz_srai_epi32(static_cast<__mmask16>(lanes >> 16), _mm512_add_epi32(high_codes, half), kHighBits);
  const auto store = [&](int8_t* place, __m512i all, __m512i upper) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(place),
                     _mm512_cvtepi32_epi8(_mm512_sub_epi32(all, _mm512_slli_epi32(upper, kHighBits))));
  };
  store(codes, low_codes, low_upper);
  store(codes + 16, high_codes, high_upper);
  alignas(64) int32_t upper[16];
  _mm512_store_si512(upper, _mm512_slli_epi32(at < 4 ? low_upper : high_upper, kHighBits - kHighShift));
  const int sum_low = _mm512_reduce_add_epi32(low_codes), sum_high = _mm512_reduce_add_epi32(high_codes);
  const int32_t* four = upper + at % 4 * 4;
  meta->scale = scale;
  meta->negative_sum = -(sum_low + sum_high);
  meta->scaled_sum = scale * static_cast<float>(sum_low + sum_high);
  meta->high = (four[0] & 255) | (four[1] & 255) << 8 | (four[2] & 255) << 16 |
               static_cast<int32_t>(static_cast<uint32_t>(four[3]) << 24);
  meta->high_step = at;
  meta->negative_first_sum = -sum_low;
  meta->scaled_first_sum = scale * static_cast<float>(sum_low);
  meta->scaled_second_sum = scale * static_cast<float>(sum_high);
}

void quantize_q8_avx512(const float* x, int8_t* codes, GroupMeta* meta, int64_t n) {
  for (int64_t g = 0; g < n / kGroup; ++g) quantize_group_avx512(x + g * kGroup, codes + g * kGroup, meta + g);
}

}  // namespace

void fill(KernelTable& table) {
  table.name = "avx512";
  // Without VNNI the AVX2 integer kernels are the better ones.
  const KernelTable avx2 = table;
  fill_elementwise(table);
  fill_gemm(table);
  for (int type = 0; type < kNumPackedTypes; ++type) {
    if (!is_quantized(static_cast<PackedType>(type))) continue;
    table.gemm_packed[type] = avx2.gemm_packed[type];
    table.gemm_unpacked[type] = avx2.gemm_unpacked[type];
  }
  table.unpack = avx2.unpack;
  table.quantize_q8 = quantize_q8_avx512;
  table.attention = attention;
}

}  // namespace llmserve::avx512
