// The AVX2 table, vectorized by the compiler where no file of its own has the kernel.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::avx2 {

#include "cpu/elementwise.inl"
#include "cpu/attention.inl"
#include "cpu/gemm_portable.inl"

namespace {

constexpr int kPieces = 4;  // of 8 values, two steps each

// Of each run of four lanes, in all of them.
inline __m256 largest_of_four(__m256 x) {
  const __m256 pairs = _mm256_max_ps(x, _mm256_permute_ps(x, 0xB1));
  return _mm256_max_ps(pairs, _mm256_permute_ps(pairs, 0x4E));
}

inline int32_t sum_of(__m256i x) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

// The largest and the second largest of the eight steps, each step counted once, in all lanes.
inline void two_largest(const __m256 (&steps)[kPieces], __m256& first, __m256& second) {
  const __m256 high01 = _mm256_max_ps(steps[0], steps[1]), low01 = _mm256_min_ps(steps[0], steps[1]);
  const __m256 high23 = _mm256_max_ps(steps[2], steps[3]), low23 = _mm256_min_ps(steps[2], steps[3]);
  first = _mm256_max_ps(high01, high23);
  second = _mm256_max_ps(_mm256_min_ps(high01, high23), _mm256_max_ps(low01, low23));
  const __m256 other = _mm256_permute2f128_ps(first, first, 1);
  second = _mm256_max_ps(second, _mm256_permute2f128_ps(second, second, 1));
  second = _mm256_max_ps(second, _mm256_min_ps(first, other));
  first = _mm256_max_ps(first, other);
}

// The high parts of the step `at`; takes them from the codes.
inline int32_t split_high(int at, __m256i (&codes)[kPieces]) {
  const __m256i half = _mm256_set1_epi32(1 << (kHighBits - 1));
  __m256i step = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), all = _mm256_setzero_si256();
  for (int i = 0; i < kPieces; ++i, step = _mm256_add_epi32(step, _mm256_set1_epi32(2))) {
    const __m256i here = _mm256_cmpeq_epi32(step, _mm256_set1_epi32(at));
    const __m256i upper = _mm256_and_si256(_mm256_srai_epi32(_mm256_add_epi32(codes[i], half), kHighBits), here);
    codes[i] = _mm256_sub_epi32(codes[i], _mm256_slli_epi32(upper, kHighBits));
    all = _mm256_or_si256(all, upper);
  }
  const __m128i upper = _mm_or_si128(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  const __m128i words = _mm_packs_epi32(_mm_slli_epi32(upper, kHighBits - kHighShift), _mm_setzero_si128());
  return _mm_cvtsi128_si32(_mm_packs_epi16(words, words));
}

inline void store_codes(int8_t* place, const __m256i (&codes)[kPieces]) {
  const __m256i words01 = _mm256_packs_epi32(codes[0], codes[1]), words23 = _mm256_packs_epi32(codes[2], codes[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(place),
                      _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words01, words23), order));
}

// The same rule as quantize_group, bit by bit.
inline void quantize_group_avx2(const float* x, int8_t* out, GroupMeta* meta) {
  const __m256 sign = _mm256_set1_ps(-0.0f), limit = _mm256_set1_ps(1e38f);
  __m256 values[kPieces], steps[kPieces], first, second;
  __m256 finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  for (int i = 0; i < kPieces; ++i) {
    values[i] = _mm256_loadu_ps(x + i * 8);
    const __m256 magnitude = _mm256_andnot_ps(sign, values[i]);
    finite = _mm256_and_ps(finite, _mm256_cmp_ps(magnitude, limit, _CMP_LT_OQ));
    steps[i] = largest_of_four(magnitude);
  }
  two_largest(steps, first, second);
  if (_mm256_movemask_ps(finite) != 255 || !(_mm256_cvtss_f32(first) > 1e-28f)) return quantize_group(x, out, meta);
  uint32_t equal = 0;
  for (int i = 0; i < kPieces; ++i)
    equal |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(steps[i], first, _CMP_EQ_OQ))) << (i * 8);
  const int at = __builtin_ctz(equal) / 4;
  const __m256 largest = _mm256_max_ps(second, _mm256_mul_ps(first, _mm256_set1_ps(kLeastShare)));
  const __m256 inverse = _mm256_div_ps(_mm256_set1_ps(127.0f), largest);
  const float scale = _mm256_cvtss_f32(largest) / 127.0f;
  __m256i codes[kPieces];
  for (int i = 0; i < kPieces; ++i) codes[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values[i], inverse));
  const int32_t first_sum = sum_of(_mm256_add_epi32(codes[0], codes[1]));
  const int32_t second_sum = sum_of(_mm256_add_epi32(codes[2], codes[3]));
  meta->scale = scale;
  meta->negative_sum = -(first_sum + second_sum);
  meta->scaled_sum = scale * static_cast<float>(first_sum + second_sum);
  meta->high = split_high(at, codes);
  meta->high_step = at;
  meta->negative_first_sum = -first_sum;
  meta->scaled_first_sum = scale * static_cast<float>(first_sum);
  meta->scaled_second_sum = scale * static_cast<float>(second_sum);
  store_codes(out, codes);
}

void quantize_q8_avx2(const float* x, int8_t* codes, GroupMeta* meta, int64_t n) {
  for (int64_t g = 0; g < n / kGroup; ++g) quantize_group_avx2(x + g * kGroup, codes + g * kGroup, meta + g);
}

}  // namespace

void fill(KernelTable& table) {
  table.name = "avx2";
  fill_elementwise(table);
  fill_gemm(table);
  fill_gemm_int8(table);
  table.quantize_q8 = quantize_q8_avx2;
  table.attention = attention;
}

}  // namespace llmserve::avx2
