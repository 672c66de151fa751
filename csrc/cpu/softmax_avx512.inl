// Rows of scores to bf16 probabilities, for AVX-512 levels with BF16; included after attention.inl.

// 2^x for x <= 0 to a relative error of 3e-6: it is rounded to bf16. Of minus infinity it is 0, of a NaN a NaN.
static inline __m512 exp2_negative(__m512 unbounded) {
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-200.0f), unbounded);  // the second where one is a NaN
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(9.582852944731712e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5906426161527634e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4024099111557007e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931241750717163e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// Scores outside of [first, last] become minus infinity, whose power is zero.
static void mask_row(float* scores, int count, int first, int last) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i from = _mm512_set1_epi32(first), to = _mm512_set1_epi32(last);
  for (int t = 0; t < count; t += 16) {
    if (t >= first && t + 15 <= last) continue;
    const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(t));
    const auto seen = static_cast<__mmask16>(_mm512_cmpge_epi32_mask(at, from) & _mm512_cmple_epi32_mask(at, to));
    _mm512_storeu_ps(scores + t,
                     _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), seen, _mm512_loadu_ps(scores + t)));
  }
}

// `count` is a multiple of 16; what stands behind an odd one is taken as masked.
template <bool kScaled>
static inline float weigh_row(const float* scores, uint16_t* p, int count, float origin, const float* value_scales) {
  const __m512 from = _mm512_set1_ps(origin);
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3F803F80));
  const auto weights = [&](int t) {
    return t < count ? exp2_negative(_mm512_sub_ps(_mm512_loadu_ps(scores + t), from)) : _mm512_setzero_ps();
  };
  const auto scaled = [&](__m512 weight, int t) {
    return t < count ? _mm512_mul_ps(weight, _mm512_loadu_ps(value_scales + t)) : weight;
  };
  __m512 sums = _mm512_setzero_ps();
  for (int t = 0; t < count; t += 32) {
    const __m512 low = weights(t), high = weights(t + 16);
    const __m512bh pair =
        kScaled ? _mm512_cvtne2ps_pbh(scaled(high, t + 16), scaled(low, t)) : _mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(p + t, reinterpret_cast<__m512i>(pair));
    sums = kScaled ? _mm512_add_ps(sums, _mm512_add_ps(low, high)) : _mm512_dpbf16_ps(sums, pair, ones);
  }
  return _mm512_reduce_add_ps(sums);
}

static void softmax_row(float* scores, uint16_t* p, int count, int first, int last, const float* value_scales, float* m,
                        float* l) {
  if (first > 0 || last < count - 1) mask_row(scores, count, first, last);
  __m512 top = _mm512_set1_ps(-__builtin_inff());
  for (int t = 0; t < count; t += 16) top = _mm512_max_ps(_mm512_loadu_ps(scores + t), top);
  *m = _mm512_reduce_max_ps(top);
  const float origin = *m == -__builtin_inff() ? 0.0f : *m;
  *l = value_scales == nullptr ? weigh_row<false>(scores, p, count, origin, nullptr)
                               : weigh_row<true>(scores, p, count, origin, value_scales);
}
