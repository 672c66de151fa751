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

#include "cpu/softmax_avx512.inl"

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
