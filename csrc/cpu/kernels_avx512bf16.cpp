// GEMM tiles and attention for AVX-512 with BF16: vdpbf16ps with pairs of activations broadcast from memory.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::avx512bf16 {

#include "cpu/elementwise.inl"

inline __m512bh load_pairs(const uint16_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
inline __m512bh broadcast_pair(const uint16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

// Scores of kRows queries against kBlocks K blocks [D/2][16][2]; tokens run along the vector, so there are no
// horizontal sums.
template <int kRows, int kBlocks>
static void score_rows(const uint16_t* q, const uint16_t* const* k, float* scores, int head_dim) {
  __m512 acc[kRows][kBlocks];
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBlocks; ++b) acc[r][b] = _mm512_setzero_ps();
  for (int d = 0; d < head_dim; d += 2) {
    __m512bh keys[kBlocks];
    for (int b = 0; b < kBlocks; ++b) keys[b] = load_pairs(k[b] + d * kKvBlock);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh query = broadcast_pair(q + r * head_dim + d);
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], keys[b], query);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBlocks; ++b) _mm512_storeu_ps(scores + r * kKvTile + b * kKvBlock, acc[r][b]);
}

template <int kBlocks>
static void score_blocks(const uint16_t* q, const uint16_t* const* k, float* scores, int rows, int head_dim) {
  int row = 0;
  for (; row + 6 <= rows; row += 6) score_rows<6, kBlocks>(q + row * head_dim, k, scores + row * kKvTile, head_dim);
  switch (rows - row) {
    case 5: return score_rows<5, kBlocks>(q + row * head_dim, k, scores + row * kKvTile, head_dim);
    case 4: return score_rows<4, kBlocks>(q + row * head_dim, k, scores + row * kKvTile, head_dim);
    case 3: return score_rows<3, kBlocks>(q + row * head_dim, k, scores + row * kKvTile, head_dim);
    case 2: return score_rows<2, kBlocks>(q + row * head_dim, k, scores + row * kKvTile, head_dim);
    case 1: return score_rows<1, kBlocks>(q + row * head_dim, k, scores + row * kKvTile, head_dim);
    default: return;
  }
}

// kRows rows x kVectors zmm of channels, over all blocks of the tile; V is [8][D][2].
template <int kRows, int kVectors>
static void value_rows(const uint16_t* p, const uint16_t* const* v, int num_blocks, int head_dim, int channel,
                       float* out) {
  __m512 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) acc[r][i] = _mm512_setzero_ps();
  for (int block = 0; block < num_blocks; ++block) {
    for (int t = 0; t < kKvBlock; t += 2) {
      __m512bh values[kVectors];
      for (int i = 0; i < kVectors; ++i)
        values[i] = load_pairs(v[block] + (t / 2) * 2 * head_dim + (channel + i * 16) * 2);
      for (int r = 0; r < kRows; ++r) {
        const __m512bh weight = broadcast_pair(p + r * kKvTile + block * kKvBlock + t);
        for (int i = 0; i < kVectors; ++i) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], values[i], weight);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) _mm512_storeu_ps(out + r * head_dim + channel + i * 16, acc[r][i]);
}

template <int kVectors>
static void value_channels(const uint16_t* p, const uint16_t* const* v, int num_blocks, int head_dim, int channel,
                           float* out, int rows) {
  int row = 0;
  for (; row + 6 <= rows; row += 6)
    value_rows<6, kVectors>(p + row * kKvTile, v, num_blocks, head_dim, channel, out + row * head_dim);
  p += row * kKvTile;
  out += row * head_dim;
  switch (rows - row) {
    case 5: return value_rows<5, kVectors>(p, v, num_blocks, head_dim, channel, out);
    case 4: return value_rows<4, kVectors>(p, v, num_blocks, head_dim, channel, out);
    case 3: return value_rows<3, kVectors>(p, v, num_blocks, head_dim, channel, out);
    case 2: return value_rows<2, kVectors>(p, v, num_blocks, head_dim, channel, out);
    case 1: return value_rows<1, kVectors>(p, v, num_blocks, head_dim, channel, out);
    default: return;
  }
}

#define LLMSERVE_OWN_ATTENTION_MICRO
struct AttentionScratch;
static void score_tile(const AttentionArgs& args, const int32_t* table, int num_blocks, const AttentionScratch& s,
                       int rows);
static void value_tile(const AttentionArgs& args, const int32_t* table, int num_blocks, const AttentionScratch& s,
                       int rows);
static void softmax_row(float* scores, uint16_t* p, int count, int first, int last, const float* value_scales, float* m,
                        float* l);
#include "cpu/attention.inl"

static void score_tile(const AttentionArgs& args, const int32_t* table, int num_blocks, const AttentionScratch& s,
                       int rows) {
  const uint16_t* k[kKvTile / kKvBlock];
  for (int block = 0; block < num_blocks; ++block) k[block] = args.kv + table[block] * args.block_stride;
  int block = 0;
  for (; block + 4 <= num_blocks; block += 4)
    score_blocks<4>(s.q, k + block, s.scores + block * kKvBlock, rows, args.head_dim);
  for (; block < num_blocks; ++block) score_blocks<1>(s.q, k + block, s.scores + block * kKvBlock, rows, args.head_dim);
}

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

static void value_tile(const AttentionArgs& args, const int32_t* table, int num_blocks, const AttentionScratch& s,
                       int rows) {
  const uint16_t* v[kKvTile / kKvBlock];
  for (int block = 0; block < num_blocks; ++block)
    v[block] = args.kv + table[block] * args.block_stride + args.head_dim * kKvBlock;
  int channel = 0;
  for (; channel + 64 <= args.head_dim; channel += 64)
    value_channels<4>(s.p, v, num_blocks, args.head_dim, channel, s.tile_o, rows);
  for (; channel < args.head_dim; channel += 16)
    value_channels<1>(s.p, v, num_blocks, args.head_dim, channel, s.tile_o, rows);
}

constexpr int kVectors = 4;

template <int kRows>
static void bf16_rows(const TileArgs& args, int row) {
  const int64_t stride = padded_columns(args.x.columns);
  const uint16_t* x = args.x.bf16 + row * stride;
  const auto* w = reinterpret_cast<const uint16_t*>(args.weights);
  __m512 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < args.x.columns; k += 2, w += 2 * kTile) {
    __m512bh weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      if (kRows == 1) _mm_prefetch(reinterpret_cast<const char*>(w + v * 32 + 1024), _MM_HINT_T0);
      weights[v] = load_pairs(w + v * 32);
    }
    for (int r = 0; r < kRows; ++r) {
      const __m512bh pair = broadcast_pair(x + r * stride + k);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], weights[v], pair);
    }
  }
  float* out = args.out + row * args.out_stride;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + r * args.out_stride + v * 16, acc[r][v]);
}

static void gemm_bf16(const TileArgs& args) {
  int row = 0;
  for (; row + 6 <= args.rows; row += 6) bf16_rows<6>(args, row);
  if (row + 4 <= args.rows) {
    bf16_rows<4>(args, row);
    row += 4;
  }
  for (; row + 2 <= args.rows; row += 2) bf16_rows<2>(args, row);
  for (; row < args.rows; ++row) bf16_rows<1>(args, row);
}

void fill(KernelTable& table) {
  table.gemm_packed[static_cast<size_t>(PackedType::kBF16)] = gemm_bf16;
  table.gemm_unpacked[static_cast<size_t>(PackedType::kBF16)] = gemm_bf16;
  table.attention = attention;
}

}  // namespace llmserve::avx512bf16
