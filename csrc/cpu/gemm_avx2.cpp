// Integer GEMM tiles for AVX2.
//
// Codes of up to 6 bits: vpmaddubsw with the weights as the unsigned operand in registers and four activations
// broadcast. Sums of several products fit 16 bits (8 of 4-bit codes, that is a whole group; 4 of 5 bits; 2 of 6), so
// that widening to 32 bits is rare. Codes of 8 bits: their even and odd bytes become 16-bit words and meet vpmaddwd
// with activations widened once for 64 channels, whose words hold the high parts as well. Rows x 16 channels share the
// loads; float accumulators stay in the output, in L1.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::avx2 {

namespace {

constexpr int kVectors = 8;  // ymm of 8 channels in a tile
constexpr int kLanes = 8;
constexpr int kSteps = kGroup / 4;
constexpr int64_t kStepBytes = kTile * 4;
constexpr int64_t kChunk = 8;       // groups whose codes stay in L1 for all rows
constexpr int kWords = kGroup / 2;  // pairs of 16-bit activations in a group
constexpr int kBlockRows = 4;
constexpr size_t kPrefetchBytes = 2048;

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline __m256 load_f16(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i broadcast4(const void* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes), _MM_HINT_T0); }

// Has the compiler finish a sum here: it would rather keep many products for later, more than there are registers.
inline void settle(__m256i& sum) { __asm__("" : "+x"(sum)); }

constexpr int channel_vectors(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }

// What a kernel reads: the packed form and the largest code in it.
struct Kind {
  PackedFormat format;
  int code_bits;

  constexpr bool words() const { return code_bits == 8; }
};
constexpr Kind packed_kind(PackedType type) {
  const PackedFormat format = packed_format(type);
  return {format, format.codebook ? 8 : format.bits};
}
constexpr Kind unpacked_kind(Kind kind) { return {unpacked(kind.format), kind.code_bits}; }

struct Rows {
  const int8_t* x;
  const GroupMeta* meta;
  int64_t x_stride, meta_stride;

  const GroupMeta& at(int row, int64_t group) const { return meta[row * meta_stride + group]; }
};

Rows rows_from(const TileArgs& args, int row) {
  const int64_t stride = padded_columns(args.x.columns);
  return {args.x.q8 + row * stride, args.x.q8_meta + row * (stride / kGroup), stride, stride / kGroup};
}

// Activations of a chunk as 16-bit words: [step] (k 0, k 2), then [step] (k 1, k 3) of each group.
template <int kRows>
struct Words {
  alignas(32) int32_t pairs[kRows][kChunk][kWords];

  static void widen(const int8_t* x, int32_t* out, __m256i even_more, __m256i odd_more) {
    const __m256i bytes = load(x);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
    store(out, _mm256_add_epi16(even, even_more));
    store(out + kSteps, _mm256_add_epi16(_mm256_srai_epi16(bytes, 8), odd_more));
  }

  void set(const Rows& rows, int64_t first, int64_t end) {
    const __m256i steps = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i upper = _mm256_set1_epi16(static_cast<int16_t>(0xFF00));
    for (int r = 0; r < kRows; ++r)
      for (int64_t group = first; group < end; ++group) {
        const GroupMeta& meta = rows.at(r, group);
        const __m256i is_high = _mm256_cmpeq_epi32(steps, _mm256_set1_epi32(meta.high_step));
        const __m256i high = _mm256_and_si256(_mm256_set1_epi32(meta.high), is_high);
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(high, 8), 8 - kHighShift);
        const __m256i odd = _mm256_srai_epi16(_mm256_and_si256(high, upper), 8 - kHighShift);
        widen(rows.x + r * rows.x_stride + group * kGroup, pairs[r][group - first], even, odd);
      }
  }
};

// Codes of one group as bytes, 8 channels x 4 k at a time.
template <PackedFormat F>
struct Codes {
  // All bits of byte i where bit i is set.
  static __m256i spread(const uint8_t* bits) {
    const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i places = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(broadcast4(bits), bytes), places), places);
  }

  static __m256i finish(__m256i nibbles, const uint8_t* codes, int step, int vector) {
    if constexpr (F.codebook) {
      const __m128i book = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodebook));
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(book), nibbles);
    }
    for (int plane = 0; plane < F.bits - 4; ++plane) {
      const uint8_t* bits = codes + kNibbleBytes + static_cast<size_t>(plane) * kPlaneBytes;
      const __m256i mask = spread(bits + (step * kVectors + vector) * 4);
      const __m256i place = _mm256_set1_epi8(static_cast<char>(16 << plane));
      nibbles = _mm256_or_si256(nibbles, _mm256_and_si256(mask, place));
    }
    return nibbles;
  }

  // Steps `step` and `step + 4`.
  static void pair(const uint8_t* codes, int step, int vector, __m256i& first, __m256i& second) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i line = load(codes + step * kStepBytes + vector * 32);
    first = finish(_mm256_and_si256(line, low), codes, step, vector);
    second = finish(_mm256_and_si256(_mm256_srli_epi16(line, 4), low), codes, step + kSteps / 2, vector);
  }

  static __m256i one(const uint8_t* codes, int step, int vector) {
    if constexpr (F.bits == 8) return load(codes + step * kStepBytes + vector * 32);
    const __m256i line = load(codes + step % 4 * kStepBytes + vector * 32);
    const __m256i shifted = _mm256_srl_epi16(line, _mm_cvtsi32_si128(step & 4));
    return finish(_mm256_and_si256(shifted, _mm256_set1_epi8(15)), codes, step, vector);
  }
};

// Calls use(step, lines) for every step of a group, or of its half `part` where it has two.
template <PackedFormat F, int kWidth, class Use>
inline void each_step(const uint8_t* codes, int part, int vector, bool streams, Use use) {
  if constexpr (F.bits == 8) {
    constexpr int kCount = kSteps / block_parts(F);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const int step = part * kCount + i;
      __m256i lines[kWidth];
      for (int v = 0; v < kWidth; ++v) {
        const uint8_t* line = codes + step * kStepBytes + (vector + v) * 32;
        if (streams && v % 2 == 0) prefetch(line);
        lines[v] = load(line);
      }
      use(i, step, lines);
    }
  } else {
#pragma GCC unroll 4
    for (int step = 0; step < kSteps / 2; ++step) {
      __m256i first[kWidth], second[kWidth];
      for (int v = 0; v < kWidth; ++v) {
        if (part == 0 && v % 2 == 0) prefetch(codes + step * kStepBytes + (vector + v) * 32);
        Codes<F>::pair(codes, step, vector + v, first[v], second[v]);
      }
      if constexpr (block_parts(F) == 1) {
        use(2 * step, step, first);
        use(2 * step + 1, step + kSteps / 2, second);
      } else {
        use(step, part == 0 ? step : step + kSteps / 2, part == 0 ? first : second);
      }
    }
  }
}

// Dot products of a group of codes of up to 6 bits (or of half of it) with the low parts: `shorts` are to be widened
// and added to `sums`.
template <Kind K, int kRows, int kWidth>
struct ByteDots {
  static constexpr PackedFormat kFormat = K.format;
  static constexpr int kCount = kSteps / block_parts(kFormat);
  static constexpr int kFit = K.code_bits == 4 ? 8 : K.code_bits == 5 ? 4 : 2;  // products of two that 16 bits hold

  __m256i shorts[kRows][kWidth];
  __m256i sums[kRows][kWidth];

  void set(const Rows& rows, int64_t group, int part, const uint8_t* codes, int vector) {
    const int8_t* x = rows.x + group * kGroup;
    const __m256i ones = _mm256_set1_epi16(1);
    each_step<kFormat, kWidth>(codes, part, vector, kRows <= 2, [&](int i, int step, const __m256i(&lines)[kWidth]) {
      for (int r = 0; r < kRows; ++r) {
        const __m256i four = broadcast4(x + r * rows.x_stride + step * 4);
        for (int v = 0; v < kWidth; ++v) {
          if (i != 0 && i % kFit == 0) {
            const __m256i wide = _mm256_madd_epi16(shorts[r][v], ones);
            sums[r][v] = i == kFit ? wide : _mm256_add_epi32(sums[r][v], wide);
          }
          const __m256i product = _mm256_maddubs_epi16(lines[v], four);
          shorts[r][v] = i % kFit == 0 ? product : _mm256_add_epi16(shorts[r][v], product);
          settle(shorts[r][v]);
        }
      }
    });
  }

  // With the high parts and the zero point.
  void row_sums(const Rows& rows, int r, int64_t group, int part, const uint8_t* codes, int vector,
                __m256i (&out)[kWidth]) const {
    const GroupMeta& meta = rows.at(r, group);
    int32_t high = meta.high, negative_sum = meta.negative_sum;
    if constexpr (kFormat.group == 16) {
      const int32_t second = -(meta.high_step >> 2);  // all bits where the step is one of 4..7
      high &= part == 0 ? ~second : second;
      negative_sum = part == 0 ? meta.negative_first_sum : meta.negative_sum - meta.negative_first_sum;
    }
    const __m256i four = _mm256_set1_epi32(high);
    const __m256i zero = _mm256_slli_epi32(_mm256_set1_epi32(negative_sum), kFormat.zero_shift);
    const __m256i ones = _mm256_set1_epi16(1), times = _mm256_set1_epi16(1 << kHighShift);
    for (int v = 0; v < kWidth; ++v) {
      const __m256i line = Codes<kFormat>::one(codes, meta.high_step, vector + v);
      out[v] = _mm256_madd_epi16(_mm256_maddubs_epi16(line, four), times);
      out[v] = _mm256_add_epi32(out[v], _mm256_madd_epi16(shorts[r][v], ones));
      if constexpr (kCount > kFit) out[v] = _mm256_add_epi32(out[v], sums[r][v]);
      if constexpr (!kFormat.minimum) out[v] = _mm256_add_epi32(out[v], zero);
    }
  }
};

// The same of codes of 8 bits, from activations widened to words, which have the high parts in them.
template <Kind K, int kRows, int kWidth>
struct WordDots {
  __m256i sums[kRows][kWidth];

  void set(const Rows& rows, int64_t group, const int32_t* words, const uint8_t* codes, int vector) {
    constexpr PackedFormat F = K.format;
    static_assert(F.group == kGroup && !F.minimum);
    const __m256i low = _mm256_set1_epi16(255);
    for (int r = 0; r < kRows; ++r) {
      const __m256i zero = _mm256_slli_epi32(_mm256_set1_epi32(rows.at(r, group).negative_sum), F.zero_shift);
      for (int v = 0; v < kWidth; ++v) sums[r][v] = zero;
    }
    each_step<F, kWidth>(codes, 0, vector, kRows <= 2, [&](int, int step, const __m256i(&lines)[kWidth]) {
      __m256i even[kWidth], odd[kWidth];
      for (int v = 0; v < kWidth; ++v) {
        even[v] = _mm256_and_si256(lines[v], low);
        odd[v] = _mm256_srli_epi16(lines[v], 8);
      }
      for (int r = 0; r < kRows; ++r) add_words(words + r * kChunk * kWords + step, even, odd, sums[r]);
    });
  }

  static void add_words(const int32_t* pairs, const __m256i (&even)[kWidth], const __m256i (&odd)[kWidth],
                        __m256i (&row)[kWidth]) {
    const __m256i even_x = broadcast4(pairs), odd_x = broadcast4(pairs + kSteps);
    for (int v = 0; v < kWidth; ++v) {
      row[v] = _mm256_add_epi32(row[v], _mm256_madd_epi16(even[v], even_x));
      settle(row[v]);
      row[v] = _mm256_add_epi32(row[v], _mm256_madd_epi16(odd[v], odd_x));
      settle(row[v]);
    }
  }

  void row_sums(const Rows&, int r, int64_t, int, const uint8_t*, int, __m256i (&out)[kWidth]) const {
    for (int v = 0; v < kWidth; ++v) out[v] = sums[r][v];
  }
};

// Groups of up to 32: out += scale_w * scale_x * sum (+ minimum * sum of x).
template <PackedFormat F, int kRows, int kWidth, class Dots>
inline void add_scaled(const Rows& rows, int64_t group, int part, const uint8_t* codes, int vector, const Dots& dots,
                       float* out, int64_t out_stride) {
  const uint8_t* scales = codes + codes_bytes(F.bits) + static_cast<size_t>(part) * kTableBytes;
  const uint8_t* minimums = scales + static_cast<size_t>(block_parts(F)) * kTableBytes;
  __m256 scale[kWidth], minimum[kWidth];
  for (int v = 0; v < kWidth; ++v) {
    scale[v] = load_f16(scales + (vector + v) * 16);
    if constexpr (F.minimum) minimum[v] = load_f16(minimums + (vector + v) * 16);
  }
  for (int r = 0; r < kRows; ++r) {
    const GroupMeta& meta = rows.at(r, group);
    const float sum = F.group != 16 ? meta.scaled_sum : part == 0 ? meta.scaled_first_sum : meta.scaled_second_sum;
    __m256i sums[kWidth];
    dots.row_sums(rows, r, group, part, codes, vector, sums);
    for (int v = 0; v < kWidth; ++v) {
      float* place = out + r * out_stride + (vector + v) * kLanes;
      const __m256 factor = _mm256_mul_ps(scale[v], _mm256_set1_ps(meta.scale));
      __m256 acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[v]), factor, _mm256_loadu_ps(place));
      if constexpr (F.minimum) acc = _mm256_fmadd_ps(minimum[v], _mm256_set1_ps(sum), acc);
      _mm256_storeu_ps(place, acc);
    }
  }
}

// Larger groups, at the end of a block: out += scale_w * part (+ minimum * sum of x).
template <PackedFormat F, int kRows, int kWidth>
inline void end_block(const Rows& rows, int64_t group, const uint8_t* tables, int vector,
                      const __m256 (&parts)[kRows][kWidth], float* out, int64_t out_stride) {
  for (int v = 0; v < kWidth; ++v) {
    const __m256 scale = load_f16(tables + (vector + v) * 16);
    const __m256 minimum = F.minimum ? load_f16(tables + kTableBytes + (vector + v) * 16) : _mm256_setzero_ps();
    for (int r = 0; r < kRows; ++r) {
      float* place = out + r * out_stride + (vector + v) * kLanes;
      __m256 acc = _mm256_fmadd_ps(parts[r][v], scale, _mm256_loadu_ps(place));
      if constexpr (F.minimum) {
        float sum = 0.0f;
        for (int i = 0; i < block_groups(F); ++i) sum += rows.at(r, group + i).scaled_sum;
        acc = _mm256_fmadd_ps(minimum, _mm256_set1_ps(sum), acc);
      }
      _mm256_storeu_ps(place, acc);
    }
  }
}

// One block that has one scale for several code groups.
template <Kind K, int kRows, int kWidth>
inline void wide_block(const Rows& rows, int64_t group, const uint8_t* block, int vector, float* out,
                       int64_t out_stride) {
  constexpr PackedFormat F = K.format;
  __m256 parts[kRows][kWidth];
  for (int i = 0; i < block_groups(F); ++i, block += codes_bytes(F.bits)) {
    ByteDots<K, kRows, kWidth> dots;
    dots.set(rows, group + i, 0, block, vector);
    for (int r = 0; r < kRows; ++r) {
      const __m256 scale = _mm256_set1_ps(rows.at(r, group + i).scale);
      __m256i sums[kWidth];
      dots.row_sums(rows, r, group + i, 0, block, vector, sums);
      for (int v = 0; v < kWidth; ++v)
        parts[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[v]), scale, i == 0 ? _mm256_setzero_ps() : parts[r][v]);
    }
  }
  end_block<F>(rows, group, block, vector, parts, out, out_stride);
}

// Groups [first, end) of kRows rows and the channels from `vector` on; `block` is at `first`.
template <Kind K, int kRows>
inline void multiply_band(const Rows& rows, const int32_t* words, const uint8_t* block, int64_t first, int64_t end,
                          int vector, float* out, int64_t out_stride) {
  constexpr PackedFormat F = K.format;
  constexpr int kWidth = channel_vectors(kRows);
  for (int64_t group = first; group < end; group += block_groups(F), block += packed_block_bytes(F)) {
    if constexpr (F.group > kGroup) {
      wide_block<K, kRows, kWidth>(rows, group, block, vector, out, out_stride);
    } else if constexpr (K.words()) {
      WordDots<K, kRows, kWidth> dots;
      dots.set(rows, group, words + (group - first) * kWords, block, vector);
      add_scaled<F, kRows, kWidth>(rows, group, 0, block, vector, dots, out, out_stride);
    } else {
      for (int part = 0; part < block_parts(F); ++part) {
        ByteDots<K, kRows, kWidth> dots;
        dots.set(rows, group, part, block, vector);
        add_scaled<F, kRows, kWidth>(rows, group, part, block, vector, dots, out, out_stride);
      }
    }
  }
}

// Groups [first, end), at most a chunk.
template <Kind K, int kRows>
void multiply_rows(const TileArgs& args, int row, const uint8_t* block, int64_t first, int64_t end) {
  const Rows rows = rows_from(args, row);
  float* out = args.out + row * args.out_stride;
  Words<K.words() ? kRows : 1> words;
  if constexpr (K.words()) words.set(rows, first, end);
  for (int vector = 0; vector < kVectors; vector += channel_vectors(kRows))
    multiply_band<K, kRows>(rows, words.pairs[0][0], block, first, end, vector, out, args.out_stride);
}

template <Kind K>
void multiply_chunk(const TileArgs& args, const uint8_t* block, int64_t first, int64_t end) {
  int row = 0;
  for (; row + kBlockRows <= args.rows; row += kBlockRows) multiply_rows<K, kBlockRows>(args, row, block, first, end);
  switch (args.rows - row) {
    case 3: return multiply_rows<K, 3>(args, row, block, first, end);
    case 2: return multiply_rows<K, 2>(args, row, block, first, end);
    case 1: return multiply_rows<K, 1>(args, row, block, first, end);
    default: return;
  }
}

template <PackedFormat F>
void unpack_format(const uint8_t* block, int64_t num_groups, uint8_t* out) {
  for (int64_t group = 0; group < num_groups; group += block_groups(F)) {
    for (int i = 0; i < block_groups(F); ++i, block += codes_bytes(F.bits), out += kByteBytes)
      for (int step = 0; step < kSteps / 2; ++step)
        for (int v = 0; v < kVectors; ++v) {
          __m256i first, second;
          Codes<F>::pair(block, step, v, first, second);
          store(out + step * kStepBytes + v * 32, first);
          store(out + (step + kSteps / 2) * kStepBytes + v * 32, second);
        }
    for (size_t i = 0; i < tables_bytes(F); i += 32) store(out + i, load(block + i));
    block += tables_bytes(F);
    out += tables_bytes(F);
  }
}

void clear_out(const TileArgs& args) {
  if (args.first_group != 0) return;
  for (int r = 0; r < args.rows; ++r)
    for (int v = 0; v < kVectors; ++v)
      _mm256_storeu_ps(args.out + r * args.out_stride + v * kLanes, _mm256_setzero_ps());
}

// Calls use(first group, its end, its block) chunk by chunk.
template <PackedFormat F, class Use>
inline void each_chunk(const TileArgs& args, Use use) {
  const uint8_t* block = args.weights;
  const int64_t end = args.first_group + args.num_groups;
  for (int64_t group = args.first_group; group < end; group += kChunk) {
    use(group, group + kChunk < end ? group + kChunk : end, block);
    block += static_cast<size_t>(kChunk / block_groups(F)) * packed_block_bytes(F);
  }
}

template <PackedType kType>
void gemm_unpacked(const TileArgs& args) {
  constexpr Kind K = unpacked_kind(packed_kind(kType));
  clear_out(args);
  each_chunk<K.format>(
      args, [&](int64_t first, int64_t end, const uint8_t* block) { multiply_chunk<K>(args, block, first, end); });
}

// Up to this many rows unpacking codes in registers, band by band, costs less than storing them in L1.
constexpr int register_rows(PackedFormat format) {
  return format.bits == 8 ? kRangeRows : format.bits > 4 ? 0 : format.group == 16 ? 1 : kBlockRows;
}

template <PackedType kType>
void gemm_packed(const TileArgs& args) {
  constexpr Kind K = packed_kind(kType);
  clear_out(args);
  each_chunk<K.format>(args, [&](int64_t first, int64_t end, const uint8_t* block) {
    if constexpr (register_rows(K.format) > 0) {
      if (args.rows <= register_rows(K.format)) return multiply_chunk<K>(args, block, first, end);
    }
    if constexpr (K.format.bits != 8) {
      constexpr Kind U = unpacked_kind(K);
      alignas(64) uint8_t bytes[static_cast<size_t>(kChunk / block_groups(U.format)) * packed_block_bytes(U.format)];
      unpack_format<K.format>(block, end - first, bytes);
      multiply_chunk<U>(args, bytes, first, end);
    }
  });
}

// INT8 per channel with activations scaled per token: integer sums over all of K, kept in the output meanwhile. Steps
// [first, end) of a chunk.
template <int kRows>
void i8_rows(const TileArgs& args, int row, const uint8_t* lines, int64_t first, int64_t end) {
  constexpr int kWidth = channel_vectors(kRows);
  const int64_t stride = padded_columns(args.x.columns);
  Words<kRows> words;
  for (int r = 0; r < kRows; ++r)
    for (int64_t step = first; step < end; step += kSteps)
      Words<kRows>::widen(args.x.i8 + (row + r) * stride + step * 4, words.pairs[r][(step - first) / kSteps],
                          _mm256_setzero_si256(), _mm256_setzero_si256());
  const __m256i low = _mm256_set1_epi16(255);
  for (int vector = 0; vector < kVectors; vector += kWidth) {
    float* out = args.out + row * args.out_stride + vector * kLanes;
    __m256i sums[kRows][kWidth];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kWidth; ++v)
        sums[r][v] = first == 0 ? _mm256_set1_epi32(args.x.i8_meta[row + r].negative_sum * 128)
                                : load(out + r * args.out_stride + v * kLanes);
    for (int64_t step = 0; step < end - first; ++step) {
      __m256i even[kWidth], odd[kWidth];
      for (int v = 0; v < kWidth; ++v) {
        const uint8_t* line = lines + step * kStepBytes + (vector + v) * 32;
        if (kRows <= 2 && v % 2 == 0) prefetch(line);
        even[v] = _mm256_and_si256(load(line), low);
        odd[v] = _mm256_srli_epi16(load(line), 8);
      }
      const int64_t at = step / kSteps * kWords + step % kSteps;
      for (int r = 0; r < kRows; ++r) {
        const int32_t* pairs = words.pairs[r][0] + at;
        const __m256i even_x = broadcast4(pairs), odd_x = broadcast4(pairs + kSteps);
        for (int v = 0; v < kWidth; ++v) {
          sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(even[v], even_x));
          settle(sums[r][v]);
          sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(odd[v], odd_x));
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kWidth; ++v) store(out + r * args.out_stride + v * kLanes, sums[r][v]);
  }
}

void finish_i8(const TileArgs& args, const uint8_t* scales) {
  for (int r = 0; r < args.rows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* place = args.out + r * args.out_stride + v * kLanes;
      const __m256 scale = _mm256_loadu_ps(reinterpret_cast<const float*>(scales) + v * kLanes);
      const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(args.x.i8_meta[r].scale));
      _mm256_storeu_ps(place, _mm256_mul_ps(_mm256_cvtepi32_ps(load(place)), factor));
    }
}

void gemm_i8(const TileArgs& args) {
  const int64_t steps = (args.x.columns + 3) / 4;
  const uint8_t* lines = args.weights;
  for (int64_t first = 0; first < steps; first += kChunk * kSteps, lines += kChunk * kSteps * kStepBytes) {
    const int64_t end = first + kChunk * kSteps < steps ? first + kChunk * kSteps : steps;
    int row = 0;
    for (; row + kBlockRows <= args.rows; row += kBlockRows) i8_rows<kBlockRows>(args, row, lines, first, end);
    for (; row + 2 <= args.rows; row += 2) i8_rows<2>(args, row, lines, first, end);
    if (row < args.rows) i8_rows<1>(args, row, lines, first, end);
  }
  finish_i8(args, args.weights + steps * kStepBytes);
}

template <PackedType kType>
void unpack_type(const uint8_t* groups, int64_t num_groups, uint8_t* out) {
  unpack_format<packed_format(kType)>(groups, num_groups, out);
}

void unpack(PackedType type, const uint8_t* groups, int64_t num_groups, uint8_t* out) {
  switch (type) {
    case PackedType::kQ4_0: return unpack_type<PackedType::kQ4_0>(groups, num_groups, out);
    case PackedType::kQ4_1: return unpack_type<PackedType::kQ4_1>(groups, num_groups, out);
    case PackedType::kQ4_G64: return unpack_type<PackedType::kQ4_G64>(groups, num_groups, out);
    case PackedType::kQ4_G64M: return unpack_type<PackedType::kQ4_G64M>(groups, num_groups, out);
    case PackedType::kQ4_G128: return unpack_type<PackedType::kQ4_G128>(groups, num_groups, out);
    case PackedType::kQ4_G128M: return unpack_type<PackedType::kQ4_G128M>(groups, num_groups, out);
    case PackedType::kQ4_NL: return unpack_type<PackedType::kQ4_NL>(groups, num_groups, out);
    case PackedType::kQ5_0: return unpack_type<PackedType::kQ5_0>(groups, num_groups, out);
    case PackedType::kQ5_1: return unpack_type<PackedType::kQ5_1>(groups, num_groups, out);
    case PackedType::kQ2_K: return unpack_type<PackedType::kQ2_K>(groups, num_groups, out);
    case PackedType::kQ3_K: return unpack_type<PackedType::kQ3_K>(groups, num_groups, out);
    case PackedType::kQ6_K: return unpack_type<PackedType::kQ6_K>(groups, num_groups, out);
    default: return;  // bytes already
  }
}

template <PackedType kType>
void fill_type(KernelTable& table) {
  table.gemm_packed[static_cast<size_t>(kType)] = gemm_packed<kType>;
  table.gemm_unpacked[static_cast<size_t>(kType)] = gemm_unpacked<kType>;
}

}  // namespace

void fill_gemm_int8(KernelTable& table) {
  fill_type<PackedType::kQ4_0>(table);
  fill_type<PackedType::kQ4_1>(table);
  fill_type<PackedType::kQ4_G64>(table);
  fill_type<PackedType::kQ4_G64M>(table);
  fill_type<PackedType::kQ4_G128>(table);
  fill_type<PackedType::kQ4_G128M>(table);
  fill_type<PackedType::kQ4_NL>(table);
  fill_type<PackedType::kQ5_0>(table);
  fill_type<PackedType::kQ5_1>(table);
  fill_type<PackedType::kQ2_K>(table);
  fill_type<PackedType::kQ3_K>(table);
  fill_type<PackedType::kQ6_K>(table);
  fill_type<PackedType::kQ8_0>(table);
  table.gemm_packed[static_cast<size_t>(PackedType::kI8)] = gemm_i8;
  table.gemm_unpacked[static_cast<size_t>(PackedType::kI8)] = gemm_i8;
  table.unpack = unpack;
}

}  // namespace llmserve::avx2
