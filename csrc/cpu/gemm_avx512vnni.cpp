// Integer GEMM tiles for AVX-512 with VNNI: vpdpbusd with the weights as the unsigned operand in registers and four
// activations broadcast from memory.
//
// Few rows: 4-bit codes are unpacked in registers while the tile streams by. Many rows: the tile was unpacked to bytes
// in L2, six rows share its loads, and the float accumulators live in the output (L1).
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::avx512vnni {

namespace {

constexpr int kVectors = 4;  // zmm of 16 channels in a tile
constexpr size_t kPrefetchBytes = 2048;

inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline __m512 load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

struct Rows {
  const int8_t* x;
  const GroupMeta* meta;
  int64_t x_stride, meta_stride;
};

Rows rows_from(const TileArgs& args, int row) {
  const int64_t stride = padded_columns(args.x.columns);
  return {args.x.q8 + row * stride, args.x.q8_meta + row * (stride / kGroup), stride, stride / kGroup};
}

// Adds what was kept out of the codes: out += weight * value for each outlier of the row, groups ascending.
template <bool kNibbles, bool kMinimum>
void add_outliers(const TileArgs& args, const GroupMeta* meta, float* out) {
  constexpr size_t kCodes = kNibbles ? kNibbleBytes : kByteBytes;
  constexpr size_t kStride = kCodes + kTableBytes * (kMinimum ? 2 : 1);
  const __m512i mask = _mm512_set1_epi32(kNibbles ? 15 : 255);
  const __m512 zero = _mm512_set1_ps(static_cast<float>(args.zero_point));
  for (int64_t g = 0; g < args.x.columns / kGroup; ++g) {
    if (meta[g].value == 0.0f) continue;
    const uint8_t* group = args.weights + static_cast<size_t>(g) * kStride;
    const int step = meta[g].outlier / 4, byte = meta[g].outlier % 4;
    const uint8_t* line = group + (kNibbles ? step % 4 : step) * 256;
    const __m128i shift = _mm_cvtsi32_si128(byte * 8 + (kNibbles && step >= 4 ? 4 : 0));
    const __m512 value = _mm512_set1_ps(meta[g].value);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i codes = _mm512_and_si512(_mm512_srl_epi32(load(line + v * 64), shift), mask);
      const __m512 weight =
          _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(codes), zero), load_f16(group + kCodes + v * 32));
      _mm512_storeu_ps(out + v * 16, _mm512_fmadd_ps(weight, value, _mm512_loadu_ps(out + v * 16)));
    }
  }
}

template <int kRows, bool kMinimum>
void q4_rows(const TileArgs& args, int row) {
  constexpr size_t kStride = kNibbleBytes + kTableBytes * (kMinimum ? 2 : 1);
  const Rows rows = rows_from(args, row);
  const __m512i low = _mm512_set1_epi8(15);
  __m512 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_ps();
  const uint8_t* group = args.weights;
  for (int64_t g = 0; g < args.x.columns / kGroup; ++g, group += kStride) {
    __m512i sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      const __m512i start = _mm512_set1_epi32(-args.zero_point * rows.meta[r * rows.meta_stride + g].sum);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = start;
    }
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      __m512i first[kVectors], second[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* line = group + (step * kVectors + v) * 64;
        _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
        const __m512i codes = load(line);
        first[v] = _mm512_and_si512(codes, low);
        second[v] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
      }
      for (int r = 0; r < kRows; ++r) {
        const int8_t* x = rows.x + r * rows.x_stride + g * kGroup + step * 4;
        const __m512i x0 = broadcast4(x), x1 = broadcast4(x + 16);
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], first[v], x0);
          sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], second[v], x1);
        }
      }
    }
    const uint8_t* tables = group + kNibbleBytes;
    for (int v = 0; v < kVectors; ++v) {
      const __m512 scale = load_f16(tables + v * 32);
      const __m512 minimum = kMinimum ? load_f16(tables + kTableBytes + v * 32) : _mm512_setzero_ps();
      for (int r = 0; r < kRows; ++r) {
        const GroupMeta& meta = rows.meta[r * rows.meta_stride + g];
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(meta.scale));
        acc[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), factor, acc[r][v]);
        if (kMinimum) acc[r][v] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(meta.scaled_sum), acc[r][v]);
      }
    }
  }
  float* out = args.out + row * args.out_stride;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + r * args.out_stride + v * 16, acc[r][v]);
    add_outliers<true, kMinimum>(args, rows.meta + r * rows.meta_stride, out + r * args.out_stride);
  }
}

template <int kRows, bool kMinimum>
void u8_rows(const TileArgs& args, int row) {
  constexpr size_t kStride = unpacked_group_bytes(kMinimum);
  const Rows rows = rows_from(args, row);
  float* out = args.out + row * args.out_stride;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + r * args.out_stride + v * 16, _mm512_setzero_ps());
  const uint8_t* group = args.weights;
  for (int64_t g = 0; g < args.x.columns / kGroup; ++g, group += kStride) {
    __m512i sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      const __m512i start = _mm512_set1_epi32(-args.zero_point * rows.meta[r * rows.meta_stride + g].sum);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = start;
    }
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      __m512i codes[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* line = group + (step * kVectors + v) * 64;
        if (kRows == 1) _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
        codes[v] = load(line);
      }
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = broadcast4(rows.x + r * rows.x_stride + g * kGroup + step * 4);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], codes[v], x);
      }
    }
    const uint8_t* tables = group + kByteBytes;
    for (int v = 0; v < kVectors; ++v) {
      const __m512 scale = load_f16(tables + v * 32);
      const __m512 minimum = kMinimum ? load_f16(tables + kTableBytes + v * 32) : _mm512_setzero_ps();
      for (int r = 0; r < kRows; ++r) {
        const GroupMeta& meta = rows.meta[r * rows.meta_stride + g];
        float* place = out + r * args.out_stride + v * 16;
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(meta.scale));
        __m512 acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), factor, _mm512_loadu_ps(place));
        if (kMinimum) acc = _mm512_fmadd_ps(minimum, _mm512_set1_ps(meta.scaled_sum), acc);
        _mm512_storeu_ps(place, acc);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    add_outliers<false, kMinimum>(args, rows.meta + r * rows.meta_stride, out + r * args.out_stride);
}

template <bool kMinimum>
void q4_tile(const TileArgs& args) {
  int row = 0;
  for (; row + 4 <= args.rows; row += 4) q4_rows<4, kMinimum>(args, row);
  switch (args.rows - row) {
    case 3: return q4_rows<3, kMinimum>(args, row);
    case 2: return q4_rows<2, kMinimum>(args, row);
    case 1: return q4_rows<1, kMinimum>(args, row);
    default: return;
  }
}

template <bool kMinimum>
void u8_tile(const TileArgs& args) {
  int row = 0;
  for (; row + 6 <= args.rows; row += 6) u8_rows<6, kMinimum>(args, row);
  switch (args.rows - row) {
    case 5: return u8_rows<5, kMinimum>(args, row);
    case 4: return u8_rows<4, kMinimum>(args, row);
    case 3: return u8_rows<3, kMinimum>(args, row);
    case 2: return u8_rows<2, kMinimum>(args, row);
    case 1: return u8_rows<1, kMinimum>(args, row);
    default: return;
  }
}

void gemm_q4(const TileArgs& args) { args.minimum ? q4_tile<true>(args) : q4_tile<false>(args); }
void gemm_u8(const TileArgs& args) { args.minimum ? u8_tile<true>(args) : u8_tile<false>(args); }

void unpack_q4(const uint8_t* tile, uint8_t* out, int64_t groups, bool minimum) {
  const size_t tables = kTableBytes * (minimum ? 2 : 1);
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < groups; ++g, tile += kNibbleBytes + tables, out += kByteBytes + tables) {
    for (size_t i = 0; i < kNibbleBytes; i += 64) {
      const __m512i codes = load(tile + i);
      _mm512_storeu_si512(out + i, _mm512_and_si512(codes, low));
      _mm512_storeu_si512(out + i + kNibbleBytes, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low));
    }
    for (size_t i = 0; i < tables; i += 64) _mm512_storeu_si512(out + kByteBytes + i, load(tile + kNibbleBytes + i));
  }
}

}  // namespace

void fill(KernelTable& table) {
  table.gemm_q4 = gemm_q4;
  table.gemm_u8 = gemm_u8;
  table.unpack_q4 = unpack_q4;
}

}  // namespace llmserve::avx512vnni
