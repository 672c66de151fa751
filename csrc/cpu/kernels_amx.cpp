// Attention for processors with AMX: they take twice as long for vdpbf16ps as for the two fused multiply-adds that it
// stands for. So keys and values become float32 in registers, shared by four rows.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::amx {

#include "cpu/elementwise.inl"

constexpr int kBandRows = 4;

// The first and the second of each pair of bf16 values.
struct Halves {
  __m512 first, second;
};
static inline Halves load_pairs(const uint16_t* p) {
  const __m512i pairs = _mm512_loadu_si512(p);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(_mm512_and_si512(pairs, upper))};
}

static inline void widen(const uint16_t* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = from_bf16(from[i]);
}

// Scores of kRows queries against kBlocks K blocks [D/2][16][2].
template <int kRows, int kBlocks>
static void score_rows(const float* q, const uint16_t* const* k, float* scores, int head_dim) {
  __m512 acc[kRows][kBlocks];
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBlocks; ++b) acc[r][b] = _mm512_setzero_ps();
  for (int d = 0; d < head_dim; d += 2) {
    for (int b = 0; b < kBlocks; ++b) {
      const Halves keys = load_pairs(k[b] + d * kKvBlock);
      for (int r = 0; r < kRows; ++r) {
        const float* query = q + r * kMaxHeadDim + d;
        acc[r][b] = _mm512_fmadd_ps(keys.first, _mm512_set1_ps(query[0]), acc[r][b]);
        acc[r][b] = _mm512_fmadd_ps(keys.second, _mm512_set1_ps(query[1]), acc[r][b]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBlocks; ++b) _mm512_storeu_ps(scores + r * kKvTile + b * kKvBlock, acc[r][b]);
}

template <int kRows>
static void score_band(const float* q, const uint16_t* const* k, int num_blocks, float* scores, int head_dim) {
  int block = 0;
  for (; block + 4 <= num_blocks; block += 4) score_rows<kRows, 4>(q, k + block, scores + block * kKvBlock, head_dim);
  for (; block < num_blocks; ++block) score_rows<kRows, 1>(q, k + block, scores + block * kKvBlock, head_dim);
}

// kRows rows x kVectors zmm of channels, over all blocks of the tile; V is [8][D][2].
template <int kRows, int kVectors>
static void value_rows(const float* p, const uint16_t* const* v, int num_blocks, int head_dim, int channel,
                       float* out) {
  __m512 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) acc[r][i] = _mm512_setzero_ps();
  for (int block = 0; block < num_blocks; ++block) {
    for (int t = 0; t < kKvBlock; t += 2) {
      for (int i = 0; i < kVectors; ++i) {
        const Halves values = load_pairs(v[block] + (t / 2) * 2 * head_dim + (channel + i * 16) * 2);
        for (int r = 0; r < kRows; ++r) {
          const float* weight = p + r * kKvTile + block * kKvBlock + t;
          acc[r][i] = _mm512_fmadd_ps(values.first, _mm512_set1_ps(weight[0]), acc[r][i]);
          acc[r][i] = _mm512_fmadd_ps(values.second, _mm512_set1_ps(weight[1]), acc[r][i]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) _mm512_storeu_ps(out + r * head_dim + channel + i * 16, acc[r][i]);
}

template <int kRows>
static void value_band(const float* p, const uint16_t* const* v, int num_blocks, int head_dim, float* out) {
  int channel = 0;
  for (; channel + 64 <= head_dim; channel += 64) value_rows<kRows, 4>(p, v, num_blocks, head_dim, channel, out);
  for (; channel < head_dim; channel += 16) value_rows<kRows, 1>(p, v, num_blocks, head_dim, channel, out);
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
  float q[kBandRows * kMaxHeadDim];
  for (int row = 0; row < rows; row += kBandRows) {
    const int count = rows - row < kBandRows ? rows - row : kBandRows;
    for (int r = 0; r < count; ++r) widen(s.q + (row + r) * args.head_dim, q + r * kMaxHeadDim, args.head_dim);
    float* scores = s.scores + row * kKvTile;
    switch (count) {
      case 4: score_band<4>(q, k, num_blocks, scores, args.head_dim); break;
      case 3: score_band<3>(q, k, num_blocks, scores, args.head_dim); break;
      case 2: score_band<2>(q, k, num_blocks, scores, args.head_dim); break;
      default: score_band<1>(q, k, num_blocks, scores, args.head_dim); break;
    }
  }
}

#include "cpu/softmax_avx512.inl"

static void value_tile(const AttentionArgs& args, const int32_t* table, int num_blocks, const AttentionScratch& s,
                       int rows) {
  const uint16_t* v[kKvTile / kKvBlock];
  for (int block = 0; block < num_blocks; ++block)
    v[block] = args.kv + table[block] * args.block_stride + args.head_dim * kKvBlock;
  float p[kBandRows * kKvTile];
  for (int row = 0; row < rows; row += kBandRows) {
    const int count = rows - row < kBandRows ? rows - row : kBandRows;
    for (int r = 0; r < count; ++r) widen(s.p + (row + r) * kKvTile, p + r * kKvTile, num_blocks * kKvBlock);
    float* out = s.tile_o + row * args.head_dim;
    switch (count) {
      case 4: value_band<4>(p, v, num_blocks, args.head_dim, out); break;
      case 3: value_band<3>(p, v, num_blocks, args.head_dim, out); break;
      case 2: value_band<2>(p, v, num_blocks, args.head_dim, out); break;
      default: value_band<1>(p, v, num_blocks, args.head_dim, out); break;
    }
  }
}

void fill(KernelTable& table) {
  fill_gemm(table);
  table.attention = attention;
}

}  // namespace llmserve::amx
