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

// kRows rows times 32 channels of float32 weights [k][64].
template <int kRows>
void f32_rows(const TileArgs& args, int row) {
  constexpr int kWidth = 2;
  const int64_t first = args.first_group * kGroup, left = args.x.columns - first;
  const int64_t count = args.num_groups * kGroup < left ? args.num_groups * kGroup : left;
  const float* x = args.x.f32 + row * args.x.columns + first;
  for (int vector = 0; vector < kVectors; vector += kWidth) {
    float* out = args.out + row * args.out_stride + vector * 16;
    const float* w = reinterpret_cast<const float*>(args.weights) + vector * 16;
    __m512 acc[kRows][kWidth];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kWidth; ++v)
        acc[r][v] = first == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * args.out_stride + v * 16);
    for (int64_t k = 0; k < count; ++k, w += kTile) {
      __m512 weights[kWidth];
      for (int v = 0; v < kWidth; ++v) weights[v] = _mm512_loadu_ps(w + v * 16);
      for (int r = 0; r < kRows; ++r) {
        const __m512 value = _mm512_set1_ps(x[r * args.x.columns + k]);
        for (int v = 0; v < kWidth; ++v) acc[r][v] = _mm512_fmadd_ps(weights[v], value, acc[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kWidth; ++v) _mm512_storeu_ps(out + r * args.out_stride + v * 16, acc[r][v]);
  }
}

void gemm_f32_avx512(const TileArgs& args) {
  int row = 0;
  for (; row + 6 <= args.rows; row += 6) f32_rows<6>(args, row);
  for (; row + 2 <= args.rows; row += 2) f32_rows<2>(args, row);
  if (row < args.rows) f32_rows<1>(args, row);
}

inline __m512 load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The same values as dequantize_tile, 16 channels x 4 k at a time.
void dequantize_tile_avx512(PackedType type, const uint8_t* block, int64_t num_groups, float* out) {
  const PackedFormat format = packed_format(type);
  const __m512 zero = _mm512_set1_ps(static_cast<float>(zero_point(format)));
  const int parts = block_parts(format);
  alignas(64) uint8_t codes[kByteBytes];
  for (int64_t group = 0; group < num_groups; group += block_groups(format), block += packed_block_bytes(format)) {
    const uint8_t* tables = block + static_cast<size_t>(block_groups(format)) * codes_bytes(format.bits);
    for (int i = 0; i < block_groups(format); ++i) {
      unpack_codes(format, block + static_cast<size_t>(i) * codes_bytes(format.bits), codes);
      for (int step = 0; step < kGroup / 4; ++step, out += 4 * kTile) {
        const uint8_t* scales = tables + static_cast<size_t>(step * parts * 4 / kGroup) * kTableBytes;
        for (int v = 0; v < kVectors; ++v) {
          const __m512i four = _mm512_load_si512(codes + step * kTile * 4 + v * 64);
          const __m512 scale = load_f16(scales + v * 32);
          for (int k = 0; k < 4; ++k) {
            const __m512i bytes =
                _mm512_and_si512(_mm512_srl_epi32(four, _mm_cvtsi32_si128(8 * k)), _mm512_set1_epi32(255));
            __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(bytes), zero), scale);
            if (format.minimum)
              value = _mm512_add_ps(value, load_f16(scales + static_cast<size_t>(parts) * kTableBytes + v * 32));
            _mm512_storeu_ps(out + k * kTile + v * 16, value);
          }
        }
      }
    }
  }
}

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
  fill_plain(table, PackedType::kF32, gemm_f32_avx512);
  table.dequantize_tile = dequantize_tile_avx512;
  table.attention = attention;
}

}  // namespace llmserve::avx512
