// Integer GEMM tiles for AVX-512 with VNNI: vpdpbusd with the weights as the unsigned operand in registers and four
// activations broadcast from memory.
//
// Few rows: codes are unpacked in registers while the tile streams by; four rows share that work, their float
// accumulators of all 64 channels and the integer ones of 32 channels fill the registers. Many rows: the codes were
// unpacked to bytes in L2, and six rows by 32 channels share the loads. Either way nothing is spilled and the
// arithmetic of a row is the same.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::avx512vnni {

namespace {

constexpr int kVectors = 4;  // zmm of 16 channels in a tile
constexpr int kSteps = kGroup / 4;
constexpr int64_t kStepBytes = kTile * 4;

inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline __m512 load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// One or two rows use up lines as fast as memory brings them: the hardware reads ahead well, with a little help.
template <bool kNear>
inline void prefetch(const uint8_t* line) {
  if constexpr (kNear) _mm_prefetch(reinterpret_cast<const char*>(line + 1024), _MM_HINT_T1);
}
// More rows pass over a chunk of the tile several times. Each pass reads its share of what comes next into L2, with
// each code group as many bytes: so memory has the time of all rows to deliver, not of the first ones alone.
struct Ahead {
  const uint8_t* next = nullptr;
  size_t step = 0;

  Ahead() = default;
  Ahead(const uint8_t* chunk, size_t group_bytes, int num_passes)
      : next(chunk), step((group_bytes / static_cast<size_t>(num_passes) + 63) / 64 * 64) {}
  void advance() {
    for (size_t i = 0; i < step; i += 64) _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T1);
    next += step;
  }
};
inline __m512i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

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

// Codes of one group as bytes, 16 channels x 4 k at a time.
template <PackedFormat F>
struct Codes {
  static __m512i finish(__m512i nibbles, const uint8_t* codes, int step, int vector) {
    if constexpr (F.codebook) {
      const __m128i book = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodebook));
      return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(book), nibbles);
    }
    for (int plane = 0; plane < F.bits - 4; ++plane) {
      const uint8_t* bits = codes + kNibbleBytes + static_cast<size_t>(plane) * kPlaneBytes;
      uint64_t mask;
      __builtin_memcpy(&mask, bits + (step * kVectors + vector) * 8, 8);
      nibbles = _mm512_mask_add_epi8(nibbles, mask, nibbles, _mm512_set1_epi8(static_cast<char>(16 << plane)));
    }
    return nibbles;
  }

  // Steps `step` and `step + 4`.
  static void pair(const uint8_t* codes, int step, int vector, __m512i& first, __m512i& second) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i line = load(codes + step * kStepBytes + vector * 64);
    first = finish(_mm512_and_si512(line, low), codes, step, vector);
    second = finish(_mm512_and_si512(_mm512_srli_epi16(line, 4), low), codes, step + kSteps / 2, vector);
  }

  static __m512i one(const uint8_t* codes, int step, int vector) {
    if constexpr (F.bits == 8) return load(codes + step * kStepBytes + vector * 64);
    const __m512i line = load(codes + step % 4 * kStepBytes + vector * 64);
    const __m512i shifted = _mm512_srl_epi16(line, _mm_cvtsi32_si128(step & 4));
    return finish(_mm512_and_si512(shifted, _mm512_set1_epi8(15)), codes, step, vector);
  }
};

// Codes of one step, as what the high parts are multiplied with: 16 times the codes where they have 4 bits.
template <PackedFormat F>
inline __m512i high_line(const uint8_t* codes, int step, int vector) {
  if constexpr (F.bits == 8) {
    const __m512i line = load(codes + step * kStepBytes + vector * 64);
    return F.small_codes ? _mm512_slli_epi16(line, 4) : line;
  } else if constexpr (F.small_codes) {
    const __m512i line = load(codes + step % 4 * kStepBytes + vector * 64);
    const auto is_low = static_cast<__mmask32>((step >> 2) - 1);
    return _mm512_and_si512(_mm512_mask_slli_epi16(line, is_low, line, 4), _mm512_set1_epi8(static_cast<char>(0xF0)));
  } else {
    return Codes<F>::one(codes, step, vector);
  }
}

// The high parts and the zero point: what the integer sums of a group (or of half of it) start from. Additions and
// shifts compete with the dot products for execution ports, so there is none where the codes have 4 bits.
template <PackedFormat F, int kRows, int kWidth>
inline void start_sums(const Rows& rows, int64_t group, int part, const uint8_t* codes, int vector,
                       __m512i (&sums)[kRows][kWidth]) {
  constexpr int kShift = F.small_codes ? F.zero_shift : F.zero_shift - kHighShift;
  for (int r = 0; r < kRows; ++r) {
    const GroupMeta& meta = rows.at(r, group);
    int32_t high = meta.high, negative_sum = meta.negative_sum;
    if constexpr (F.group == 16) {
      const int32_t second = -(meta.high_step >> 2);  // all bits where the step is one of 4..7
      high &= part == 0 ? ~second : second;
      negative_sum = part == 0 ? meta.negative_first_sum : meta.negative_sum - meta.negative_first_sum;
    }
    __m512i zero = _mm512_setzero_si512();
    if constexpr (!F.minimum) zero = _mm512_slli_epi32(_mm512_set1_epi32(negative_sum), kShift);
    const __m512i four = _mm512_set1_epi32(high);
    for (int v = 0; v < kWidth; ++v) {
      sums[r][v] = _mm512_dpbusd_epi32(zero, high_line<F>(codes, meta.high_step, vector + v), four);
      if constexpr (!F.small_codes) sums[r][v] = _mm512_slli_epi32(sums[r][v], kHighShift);
    }
  }
}

// Adds the dot products of a group; of its steps 0..3 or 4..7 where the format has two parts a group.
template <PackedFormat F, bool kNear, int kRows, int kWidth>
inline void add_dots(const Rows& rows, int64_t group, int part, const uint8_t* codes, int vector,
                     __m512i (&sums)[kRows][kWidth]) {
  const int8_t* x = rows.x + group * kGroup;
  const auto add = [&](int step, const __m512i(&lines)[kWidth]) {
    for (int r = 0; r < kRows; ++r) {
      const __m512i four = broadcast4(x + r * rows.x_stride + step * 4);
      for (int v = 0; v < kWidth; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], lines[v], four);
    }
  };
  if constexpr (F.bits == 8) {
    constexpr int kCount = F.group == 16 ? kSteps / 2 : kSteps;
#pragma GCC unroll 8
    for (int step = part * kCount; step < (part + 1) * kCount; ++step) {
      __m512i lines[kWidth];
      for (int v = 0; v < kWidth; ++v) {
        const uint8_t* line = codes + step * kStepBytes + (vector + v) * 64;
        prefetch<kNear>(line);
        lines[v] = load(line);
      }
      add(step, lines);
    }
  } else {
#pragma GCC unroll 4
    for (int step = 0; step < kSteps / 2; ++step) {
      __m512i first[kWidth], second[kWidth];
      for (int v = 0; v < kWidth; ++v) {
        const uint8_t* line = codes + step * kStepBytes + (vector + v) * 64;
        if (part == 0) prefetch<kNear>(line);
        Codes<F>::pair(codes, step, vector + v, first[v], second[v]);
      }
      if (F.group != 16 || part == 0) add(step, first);
      if (F.group != 16 || part == 1) add(step + kSteps / 2, second);
    }
  }
}

// Groups of up to 32: acc += scale_w * scale_x * sum (+ minimum * sum of x).
template <PackedFormat F, int kRows, int kWidth>
inline void add_scaled(const Rows& rows, int64_t group, int part, const uint8_t* tables, int vector,
                       const __m512i (&sums)[kRows][kWidth], __m512 (&acc)[kRows][kWidth]) {
  const uint8_t* scales = tables + static_cast<size_t>(part) * kTableBytes;
  for (int v = 0; v < kWidth; ++v) {
    const __m512 scale = load_f16(scales + (vector + v) * 32);
    const __m512 minimum =
        F.minimum ? load_f16(scales + static_cast<size_t>(block_parts(F)) * kTableBytes + (vector + v) * 32)
                  : _mm512_setzero_ps();
    for (int r = 0; r < kRows; ++r) {
      const GroupMeta& meta = rows.at(r, group);
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(meta.scale));
      acc[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), factor, acc[r][v]);
      if constexpr (F.minimum) {
        const float sum = F.group != 16 ? meta.scaled_sum : part == 0 ? meta.scaled_first_sum : meta.scaled_second_sum;
        acc[r][v] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sum), acc[r][v]);
      }
    }
  }
}

// Larger groups, at the end of a block: out += scale_w * part (+ minimum * sum of x).
template <PackedFormat F, int kRows, int kWidth>
inline void end_block(const Rows& rows, int64_t last_group, const uint8_t* tables, int vector,
                      const __m512 (&parts)[kRows][kWidth], float* out, int64_t out_stride) {
  for (int v = 0; v < kWidth; ++v) {
    const __m512 scale = load_f16(tables + (vector + v) * 32);
    const __m512 minimum = F.minimum ? load_f16(tables + kTableBytes + (vector + v) * 32) : _mm512_setzero_ps();
    for (int r = 0; r < kRows; ++r) {
      float* place = out + r * out_stride + (vector + v) * 16;
      __m512 acc = _mm512_fmadd_ps(parts[r][v], scale, _mm512_loadu_ps(place));
      if constexpr (F.minimum) {
        float sum = 0.0f;
        for (int i = 1 - block_groups(F); i <= 0; ++i) sum += rows.at(r, last_group + i).scaled_sum;
        acc = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sum), acc);
      }
      _mm512_storeu_ps(place, acc);
    }
  }
}

template <int kRows>
inline void clear_rows(const TileArgs& args, float* out) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + r * args.out_stride + v * 16, _mm512_setzero_ps());
}
// kRows x (kWidth vectors from `vector` on) of one code group, into float accumulators.
template <PackedFormat F, bool kNear, int kRows, int kWidth>
inline void one_group(const Rows& rows, int64_t group, const uint8_t* codes, const uint8_t* tables, int vector,
                      __m512 (&acc)[kRows][kWidth]) {
  __m512i sums[kRows][kWidth];
  if constexpr (F.group > kGroup) {
    start_sums<F>(rows, group, 0, codes, vector, sums);
    add_dots<F, kNear>(rows, group, 0, codes, vector, sums);
    for (int r = 0; r < kRows; ++r) {
      const __m512 scale = _mm512_set1_ps(rows.at(r, group).scale);
      for (int v = 0; v < kWidth; ++v) acc[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), scale, acc[r][v]);
    }
  } else {
    for (int part = 0; part < block_parts(F); ++part) {
      start_sums<F>(rows, group, part, codes, vector, sums);
      add_dots<F, kNear>(rows, group, part, codes, vector, sums);
      add_scaled<F>(rows, group, part, tables, vector, sums, acc);
    }
  }
}

// Groups [first, end) of kRows rows and kWidth vectors from `vector` on; `block` is at `first`.
template <PackedFormat F, bool kNear, int kRows, int kWidth>
inline void multiply_band(const TileArgs& args, const Rows& rows, const uint8_t* block, int64_t first, int64_t end,
                          int vector, Ahead& ahead, float* out) {
  constexpr int kCount = block_groups(F);
  __m512 acc[kRows][kWidth];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kWidth; ++v)
      acc[r][v] = kCount == 1 && first > 0 ? _mm512_loadu_ps(out + r * args.out_stride + (vector + v) * 16)
                                           : _mm512_setzero_ps();
  for (int64_t group = first; group < end; group += kCount, block += packed_block_bytes(F)) {
    const uint8_t* tables = block + static_cast<size_t>(kCount) * codes_bytes(F.bits);
    for (int i = 0; i < kCount; ++i) {
      ahead.advance();
      one_group<F, kNear>(rows, group + i, block + static_cast<size_t>(i) * codes_bytes(F.bits), tables, vector, acc);
    }
    if constexpr (kCount > 1) {
      end_block<F>(rows, group + kCount - 1, tables, vector, acc, out, args.out_stride);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kWidth; ++v) acc[r][v] = _mm512_setzero_ps();
    }
  }
  if constexpr (kCount == 1)
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kWidth; ++v) _mm512_storeu_ps(out + r * args.out_stride + (vector + v) * 16, acc[r][v]);
}

// What all rows do to some groups before the next ones.
struct Chunk {
  const uint8_t* block;
  int64_t first, end;
};

template <PackedFormat F, bool kNear, int kRows, int kWidth>
void multiply_rows(const TileArgs& args, const Chunk& chunk, int row, Ahead& ahead) {
  float* out = args.out + row * args.out_stride;
  if (block_groups(F) > 1 && chunk.first == 0) clear_rows<kRows>(args, out);
  const Rows rows = rows_from(args, row);
  for (int vector = 0; vector < kVectors; vector += kWidth)
    multiply_band<F, kNear, kRows, kWidth>(args, rows, chunk.block, chunk.first, chunk.end, vector, ahead, out);
}

// One or two rows take all channels at once, and so do three or four alone whose codes are to be unpacked.
constexpr int kNearRows = 2;
constexpr int rows_of_all_channels(bool unpacks) { return unpacks ? 4 : kNearRows; }

template <PackedFormat F>
void multiply_chunk(const TileArgs& args, const Chunk& chunk, Ahead ahead) {
  constexpr int kRest = rows_of_all_channels(F.bits < 8) >= 3 ? kVectors : 2;
  int row = 0;
  for (; row + 6 <= args.rows; row += 6) multiply_rows<F, false, 6, 2>(args, chunk, row, ahead);
  switch (args.rows - row) {
    case 5: return multiply_rows<F, false, 5, 2>(args, chunk, row, ahead);
    case 4: return multiply_rows<F, false, 4, kRest>(args, chunk, row, ahead);
    case 3: return multiply_rows<F, false, 3, kRest>(args, chunk, row, ahead);
    case 2: return multiply_rows<F, false, 2, kVectors>(args, chunk, row, ahead);
    case 1: return multiply_rows<F, false, 1, kVectors>(args, chunk, row, ahead);
    default: return;
  }
}
constexpr int num_passes(int rows, bool unpacks) {
  const int rest = rows % 6;
  return rows / 6 * 2 + (rest == 0 ? 0 : rest <= rows_of_all_channels(unpacks) ? 1 : 2);
}

constexpr size_t group_bytes(PackedFormat format) {
  return packed_block_bytes(format) / static_cast<size_t>(block_groups(format));
}

// A tile that streams from memory, in chunks of about `target` groups.
template <PackedFormat F>
void multiply_streamed(const TileArgs& args, int64_t target) {
  constexpr int64_t kCount = block_groups(F);
  const int64_t num_chunks = (args.num_groups + target - 1) / target;
  const int64_t width = (args.num_groups + num_chunks * kCount - 1) / (num_chunks * kCount) * kCount;
  const auto bytes = static_cast<size_t>(width / kCount) * packed_block_bytes(F);
  const int64_t end = args.first_group + args.num_groups;
  Chunk chunk{args.weights, args.first_group, 0};
  for (; chunk.first < end; chunk.first += width, chunk.block += bytes) {
    chunk.end = chunk.first + width < end ? chunk.first + width : end;
    multiply_chunk<F>(args, chunk, {chunk.block + bytes, group_bytes(F), num_passes(args.rows, F.bits < 8)});
  }
}

constexpr int64_t kFewRowsGroups = 24;
constexpr int kFewRows = 32;

template <PackedType kType>
void gemm_packed(const TileArgs& args) {
  constexpr PackedFormat F = packed_format(kType);
  if (args.rows > kNearRows) return multiply_streamed<F>(args, kFewRowsGroups);
  const Chunk all{args.weights, args.first_group, args.first_group + args.num_groups};
  Ahead none;
  args.rows == 1 ? multiply_rows<F, true, 1, kVectors>(args, all, 0, none)
                 : multiply_rows<F, true, 2, kVectors>(args, all, 0, none);
}

// Codes unpacked to bytes lie in L2, and what is unpacked next is read meanwhile; packed bytes stream.
template <PackedType kType>
void gemm_unpacked(const TileArgs& args) {
  constexpr PackedFormat F = unpacked(packed_format(kType));
  if constexpr (packed_format(kType).bits == 8)
    multiply_streamed<F>(args, args.rows <= kFewRows ? kFewRowsGroups : int64_t{kSlabGroups});
  else
    multiply_chunk<F>(args, {args.weights, args.first_group, args.first_group + args.num_groups},
                      {args.next, group_bytes(packed_format(kType)), num_passes(args.rows, false)});
}

template <PackedFormat F>
void unpack_format(const uint8_t* block, int64_t num_groups, uint8_t* out) {
  for (int64_t group = 0; group < num_groups; group += block_groups(F)) {
    for (int i = 0; i < block_groups(F); ++i, block += codes_bytes(F.bits), out += kByteBytes)
      for (int step = 0; step < kSteps / 2; ++step)
        for (int v = 0; v < kVectors; ++v) {
          __m512i first, second;
          Codes<F>::pair(block, step, v, first, second);
          _mm512_storeu_si512(out + step * kStepBytes + v * 64, first);
          _mm512_storeu_si512(out + (step + kSteps / 2) * kStepBytes + v * 64, second);
        }
    for (size_t i = 0; i < tables_bytes(F); i += 64) _mm512_storeu_si512(out + i, load(block + i));
    block += tables_bytes(F);
    out += tables_bytes(F);
  }
}

// INT8 per channel: steps [first, end) of kRows rows. There are no float sums beside the integer ones, so six rows by
// all channels fit the registers; what is still a sum lies in `out`.
template <bool kNear, int kRows>
void i8_rows(const TileArgs& args, int row, int64_t first, int64_t end, Ahead& ahead) {
  const int64_t stride = padded_columns(args.x.columns), steps = (args.x.columns + 3) / 4;
  const int8_t* x = args.x.i8 + row * stride;
  const auto place = [&](int r, int v) { return args.out + (row + r) * args.out_stride + v * 16; };
  __m512i sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    const __m512i zero = _mm512_slli_epi32(_mm512_set1_epi32(args.x.i8_meta[row + r].negative_sum), 7);
    for (int v = 0; v < kVectors; ++v) sums[r][v] = first == 0 ? zero : _mm512_loadu_si512(place(r, v));
  }
  const uint8_t* line = args.weights + first * kStepBytes;
  for (int64_t block = first; block < end; block += kSteps) {
    ahead.advance();
    const int64_t last = block + kSteps < end ? block + kSteps : end;
    for (int64_t step = block; step < last; ++step, line += kStepBytes) {
      __m512i codes[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        prefetch<kNear>(line + v * 64);
        codes[v] = load(line + v * 64);
      }
      for (int r = 0; r < kRows; ++r) {
        const __m512i four = broadcast4(x + r * stride + step * 4);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], codes[v], four);
      }
    }
  }
  const uint8_t* scales = args.weights + steps * kStepBytes;
  for (int v = 0; v < kVectors; ++v)
    for (int r = 0; r < kRows; ++r) {
      const __m512 factor =
          _mm512_mul_ps(_mm512_loadu_ps(scales + v * 64), _mm512_set1_ps(args.x.i8_meta[row + r].scale));
      if (end == steps)
        _mm512_storeu_ps(place(r, v), _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][v]), factor));
      else
        _mm512_storeu_si512(place(r, v), sums[r][v]);
    }
}

void i8_chunk(const TileArgs& args, int64_t first, int64_t end, Ahead ahead) {
  int row = 0;
  for (; row + 6 <= args.rows; row += 6) i8_rows<false, 6>(args, row, first, end, ahead);
  switch (args.rows - row) {
    case 5: return i8_rows<false, 5>(args, row, first, end, ahead);
    case 4: return i8_rows<false, 4>(args, row, first, end, ahead);
    case 3: return i8_rows<false, 3>(args, row, first, end, ahead);
    case 2: return i8_rows<false, 2>(args, row, first, end, ahead);
    case 1: return i8_rows<false, 1>(args, row, first, end, ahead);
    default: return;
  }
}

void gemm_i8(const TileArgs& args) {
  const int64_t steps = (args.x.columns + 3) / 4,
                width = (args.rows <= kFewRows ? kFewRowsGroups : kSlabGroups) * kSteps;
  Ahead none;
  switch (args.rows) {
    case 4: return i8_rows<true, 4>(args, 0, 0, steps, none);
    case 3: return i8_rows<true, 3>(args, 0, 0, steps, none);
    case 2: return i8_rows<true, 2>(args, 0, 0, steps, none);
    case 1: return i8_rows<true, 1>(args, 0, 0, steps, none);
    default: break;
  }
  for (int64_t first = 0; first < steps; first += width) {
    const int64_t end = first + width < steps ? first + width : steps;
    i8_chunk(args, first, end, {args.weights + end * kStepBytes, kSteps * kStepBytes, (args.rows + 5) / 6});
  }
}

template <PackedType kType>
void fill_type(KernelTable& table) {
  table.gemm_packed[static_cast<size_t>(kType)] = gemm_packed<kType>;
  table.gemm_unpacked[static_cast<size_t>(kType)] = gemm_unpacked<kType>;
}

void unpack(PackedType type, const uint8_t* groups, int64_t num_groups, uint8_t* out) {
  switch (packed_format(type).bits) {
    case 5:
      return packed_format(type).minimum ? unpack_format<packed_format(PackedType::kQ5_1)>(groups, num_groups, out)
                                         : unpack_format<packed_format(PackedType::kQ5_0)>(groups, num_groups, out);
    case 6: return unpack_format<packed_format(PackedType::kQ6_K)>(groups, num_groups, out);
    default: break;
  }
  switch (type) {
    case PackedType::kQ4_0: return unpack_format<packed_format(PackedType::kQ4_0)>(groups, num_groups, out);
    case PackedType::kQ4_1: return unpack_format<packed_format(PackedType::kQ4_1)>(groups, num_groups, out);
    case PackedType::kQ4_G64: return unpack_format<packed_format(PackedType::kQ4_G64)>(groups, num_groups, out);
    case PackedType::kQ4_G64M: return unpack_format<packed_format(PackedType::kQ4_G64M)>(groups, num_groups, out);
    case PackedType::kQ4_G128: return unpack_format<packed_format(PackedType::kQ4_G128)>(groups, num_groups, out);
    case PackedType::kQ4_G128M: return unpack_format<packed_format(PackedType::kQ4_G128M)>(groups, num_groups, out);
    case PackedType::kQ4_NL: return unpack_format<packed_format(PackedType::kQ4_NL)>(groups, num_groups, out);
    case PackedType::kQ2_K: return unpack_format<packed_format(PackedType::kQ2_K)>(groups, num_groups, out);
    case PackedType::kQ3_K: return unpack_format<packed_format(PackedType::kQ3_K)>(groups, num_groups, out);
    default: return;
  }
}

}  // namespace

void fill(KernelTable& table) {
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

}  // namespace llmserve::avx512vnni
