// The AVX2 table: integer GEMM by intrinsics, the rest vectorized by the compiler.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::avx2 {

#include "cpu/elementwise.inl"
#include "cpu/attention.inl"
#include "cpu/gemm_portable.inl"

namespace {

constexpr int kWidth = 8;  // channels of a ymm of int32
constexpr int kMaxRows = 4;

inline __m256 load_f16(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// 8 channels x 4 k. Codes up to 15: u8 x s8 pairs stay far below the int16 limit.
inline __m256i dot_small(__m256i sums, __m256i codes, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(codes, x);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Codes up to 255 would saturate: move the sign to the activations, |code - 128| <= 128 and 2 * 128 * 127 fits.
inline __m256i dot_bytes(__m256i sums, __m256i signed_codes, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signed_codes), _mm256_sign_epi8(x, signed_codes));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline __m256 add_group_vector(__m256i sums, const uint8_t* tables, bool minimum, const GroupMeta& meta, __m256 acc) {
  const __m256 factor = _mm256_mul_ps(load_f16(tables), _mm256_set1_ps(meta.scale));
  acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), factor, acc);
  if (minimum) acc = _mm256_fmadd_ps(load_f16(tables + kTableBytes), _mm256_set1_ps(meta.scaled_sum), acc);
  return acc;
}

struct Rows {
  const int8_t* x;
  const GroupMeta* meta;
  int64_t x_stride, meta_stride;
};

template <int kRows>
void q4_columns(const TileArgs& args, const Rows& rows, int channel, float* out) {
  const size_t stride = kNibbleBytes + kTableBytes * (args.minimum ? 2 : 1);
  const __m256i low = _mm256_set1_epi8(15);
  __m256 acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = _mm256_setzero_ps();
  const uint8_t* group = args.weights;
  for (int64_t g = 0; g < args.x.columns / kGroup; ++g, group += stride) {
    __m256i sums[kRows];
    for (int r = 0; r < kRows; ++r)
      sums[r] = _mm256_set1_epi32(-args.zero_point * rows.meta[r * rows.meta_stride + g].sum);
    for (int step = 0; step < 4; ++step) {
      const __m256i codes = load_codes(group + step * 256 + channel * 4);
      const __m256i first = _mm256_and_si256(codes, low);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
      for (int r = 0; r < kRows; ++r) {
        const int8_t* x = rows.x + r * rows.x_stride + g * kGroup + step * 4;
        sums[r] = dot_small(sums[r], first, broadcast4(x));
        sums[r] = dot_small(sums[r], second, broadcast4(x + 16));
      }
    }
    for (int r = 0; r < kRows; ++r)
      acc[r] = add_group_vector(sums[r], group + kNibbleBytes + 2 * channel, args.minimum,
                                rows.meta[r * rows.meta_stride + g], acc[r]);
  }
  for (int r = 0; r < kRows; ++r) _mm256_storeu_ps(out + r * args.out_stride + channel, acc[r]);
}

template <int kRows>
void u8_columns(const TileArgs& args, const Rows& rows, int channel, float* out) {
  // Unpacked 4-bit codes need no sign trick; both ways give the same integers.
  const bool bytes = args.zero_point == 128;
  const size_t stride = unpacked_group_bytes(args.minimum);
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  __m256 acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = _mm256_setzero_ps();
  const uint8_t* group = args.weights;
  for (int64_t g = 0; g < args.x.columns / kGroup; ++g, group += stride) {
    __m256i sums[kRows];
    for (int r = 0; r < kRows; ++r)
      sums[r] = _mm256_set1_epi32(bytes ? 0 : -args.zero_point * rows.meta[r * rows.meta_stride + g].sum);
    for (int step = 0; step < 8; ++step) {
      __m256i codes = load_codes(group + step * 256 + channel * 4);
      if (bytes) codes = _mm256_xor_si256(codes, flip);
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = broadcast4(rows.x + r * rows.x_stride + g * kGroup + step * 4);
        sums[r] = bytes ? dot_bytes(sums[r], codes, x) : dot_small(sums[r], codes, x);
      }
    }
    for (int r = 0; r < kRows; ++r)
      acc[r] = add_group_vector(sums[r], group + kByteBytes + 2 * channel, args.minimum,
                                rows.meta[r * rows.meta_stride + g], acc[r]);
  }
  for (int r = 0; r < kRows; ++r) _mm256_storeu_ps(out + r * args.out_stride + channel, acc[r]);
}

template <int kRows>
void row_block(const TileArgs& args, int row, bool nibbles) {
  Rows rows;
  rows.x_stride = padded_columns(args.x.columns);
  rows.meta_stride = rows.x_stride / kGroup;
  rows.x = args.x.q8 + row * rows.x_stride;
  rows.meta = args.x.q8_meta + row * rows.meta_stride;
  float* out = args.out + row * args.out_stride;
  for (int channel = 0; channel < kTile; channel += kWidth) {
    if (nibbles)
      q4_columns<kRows>(args, rows, channel, out);
    else
      u8_columns<kRows>(args, rows, channel, out);
  }
  for (int r = 0; r < kRows; ++r)
    add_outliers(args, nibbles, rows.meta + r * rows.meta_stride, out + r * args.out_stride);
}

void gemm_int8(const TileArgs& args, bool nibbles) {
  int row = 0;
  for (; row + kMaxRows <= args.rows; row += kMaxRows) row_block<kMaxRows>(args, row, nibbles);
  for (; row < args.rows; ++row) row_block<1>(args, row, nibbles);
}

void gemm_q4_avx2(const TileArgs& args) { gemm_int8(args, true); }
void gemm_u8_avx2(const TileArgs& args) { gemm_int8(args, false); }

}  // namespace

void fill(KernelTable& table) {
  table.name = "avx2";
  fill_elementwise(table);
  fill_gemm(table);
  table.gemm_q4 = gemm_q4_avx2;
  table.gemm_u8 = gemm_u8_avx2;
  table.attention = attention;
}

}  // namespace llmserve::avx2
