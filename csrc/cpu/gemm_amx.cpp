// Integer GEMM tiles for AMX: one instruction multiplies 16 rows of activations by 16 channels.
//
// Four groups of weights at a time become signed bytes in the order of the matrix unit, and 16 rows of activations
// beside them; what the unit makes of a group goes through memory to the float accumulators of 16 rows x 16 channels in
// registers. While the matrix unit works, only one of the two vector ports multiplies: so integer sums become floats
// by an addition and a subtraction, on the other one. The sums and the float operations are those of the kernels for
// few rows, bit by bit.
#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llmserve::amx {

namespace {

constexpr int kVectors = 4;  // zmm of 16 channels in a tile
constexpr int kLanes = 16;
constexpr int kSteps = kGroup / 4;
constexpr int64_t kStepBytes = kTile * 4;
constexpr int kUnitRows = 16;       // of the matrix unit, and bytes / 4 of its rows
constexpr int kUnitBytes = 1024;    // of one of its tiles
constexpr int kLeastRows = 24;      // fewer are left to VNNI
constexpr int kMagic = 0x4B400000;  // of the float 1.5 * 2^23: a sum below 2^22 added to it is that float plus the sum

struct alignas(64) UnitConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(UnitConfig) == 64);
static_assert(kUnitRows == kPanelRows && kPanelBytes == kUnitBytes);

// The unit's registers and instructions. The compiler must not move memory accesses across them.
template <int kRegister>
inline void unit_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"n"(kRegister));
}
template <int kRegister>
inline void unit_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "n"(kRegister) : "memory");
}
template <int kRegister>
inline void unit_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "n"(kRegister) : "memory");
}
// sums += signed activations x weights.
template <bool kUnsigned, int kSums, int kX, int kWeights>
inline void unit_multiply() {
  if constexpr (kUnsigned)
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(kSums), "n"(kX), "n"(kWeights));
  else
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(kSums), "n"(kX), "n"(kWeights));
}

// The unit is this thread's for as long as this lives.
class Unit {
 public:
  explicit Unit(const UnitConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
  ~Unit() { __asm__ volatile("tilerelease"); }
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;
};

inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline __m512 load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

constexpr bool is_unsigned(PackedFormat format) { return format.minimum; }
// Codes of which 16 times are bytes too share one multiplication with these, which meet the high parts: rows of the
// unit are steps 0..7 and 0..7 again. Others are multiplied twice.
constexpr bool pairs_codes(PackedFormat format) {
  return format.small_codes && (is_unsigned(format) || zero_point(format) == 8);
}
// Groups whose weights, activations and sums lie in L1 together.
constexpr int chunk_groups(PackedFormat format) { return (pairs_codes(format) ? 4 : 2) / block_parts(format); }
constexpr int chunk_items(PackedFormat format) { return chunk_groups(format) * block_parts(format); }
constexpr size_t unit_codes_bytes(PackedFormat format) { return pairs_codes(format) ? kUnitBytes : kUnitBytes / 2; }

// The weights of a chunk, [vector][item][step][16 channels x 4 k]. An item is a group, or a half of one: then the steps
// of the other half are zero.
template <PackedFormat F>
struct Weights {
  static constexpr int kParts = block_parts(F), kPartSteps = kSteps / kParts;
  alignas(64) uint8_t codes[kVectors][chunk_items(F)][unit_codes_bytes(F)];

  Weights() {
    if constexpr (kParts > 1) __builtin_memset(codes, 0, sizeof(codes));
  }

  // `line` of a step, less the zero point times 2^kShift, into row `row` of the unit's tile.
  template <int kShift>
  static void put(uint8_t (&items)[chunk_items(F)][unit_codes_bytes(F)], int group, int step, __m512i line) {
    if constexpr (!is_unsigned(F))
      line = _mm512_sub_epi8(line, _mm512_set1_epi8(static_cast<char>(zero_point(F) << kShift)));
    const int row = kShift == 0 ? step : kSteps + step;
    _mm512_store_si512(items[group * kParts + step / kPartSteps] + row * 64, line);
  }

  // One group of the tile.
  void set(int group, const uint8_t* from) {
    for (int v = 0; v < kVectors; ++v)
      F.bits == 4 ? set_nibbles(codes[v], group, from + v * 64) : set_bytes(codes[v], group, from + v * 64);
  }
  static void set_bytes(uint8_t (&items)[chunk_items(F)][unit_codes_bytes(F)], int group, const uint8_t* from) {
    for (int step = 0; step < kSteps; ++step) {
      const __m512i line = load(from + step * kStepBytes);
      put<0>(items, group, step, line);
      if constexpr (pairs_codes(F)) put<4>(items, group, step, _mm512_slli_epi16(line, 4));
    }
  }
  static void set_nibbles(uint8_t (&items)[chunk_items(F)][unit_codes_bytes(F)], int group, const uint8_t* from) {
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(static_cast<char>(0xF0));
    for (int step = 0; step < kSteps / 2; ++step) {
      const __m512i line = load(from + step * kStepBytes);
      put<0>(items, group, step, _mm512_and_si512(line, low));
      put<0>(items, group, step + kSteps / 2, _mm512_and_si512(_mm512_srli_epi16(line, 4), low));
      if constexpr (pairs_codes(F)) {
        put<4>(items, group, step, _mm512_and_si512(_mm512_slli_epi16(line, 4), high));
        put<4>(items, group, step + kSteps / 2, _mm512_and_si512(line, high));
      }
    }
  }
};

// What the unit makes of an item, that is a group or a half of one, before it becomes float.
template <PackedFormat F>
struct Sums {
  static constexpr int kKinds = pairs_codes(F) ? 1 : 2;  // of the codes, and of the high parts
  alignas(64) int32_t sums[kKinds][kUnitRows][kLanes];

  __m512 row(int r) const {
    __m512i sum = _mm512_load_si512(sums[0][r]);
    if constexpr (!pairs_codes(F))
      sum = _mm512_add_epi32(sum, _mm512_slli_epi32(_mm512_load_si512(sums[kKinds - 1][r]), kHighShift));
    return _mm512_cvtepi32_ps(sum);
  }
};

// The unit's registers: sums in 0 and 1, weights in 2 and 3, the activations of a chunk's items in 4 to 7.
template <PackedFormat F, int kGroupIndex>
inline void load_activations(const int8_t* x) {
  if constexpr (pairs_codes(F)) {
    unit_load<4 + kGroupIndex>(x, kPanelRowBytes);
  } else {
    unit_load<4 + 2 * kGroupIndex>(x, kPanelRowBytes);
    unit_load<5 + 2 * kGroupIndex>(x + kGroup, kPanelRowBytes);
  }
}
template <PackedFormat F, int kItem>
inline void start_item(const uint8_t* weights) {
  constexpr int kWeights = 2 + kItem % 2, kGroupIndex = kItem / block_parts(F);
  unit_load<kWeights>(weights, 64);
  if constexpr (pairs_codes(F)) {
    unit_zero<kItem % 2>();
    unit_multiply<is_unsigned(F), kItem % 2, 4 + kGroupIndex, kWeights>();
  } else {
    unit_zero<0>();
    unit_zero<1>();
    unit_multiply<is_unsigned(F), 0, 4 + 2 * kGroupIndex, kWeights>();
    unit_multiply<is_unsigned(F), 1, 5 + 2 * kGroupIndex, kWeights>();
  }
}
template <PackedFormat F, int kItem>
inline void store_item(Sums<F>& sums) {
  unit_store<pairs_codes(F) ? kItem % 2 : 0>(sums.sums[0], 64);
  if constexpr (!pairs_codes(F)) unit_store<1>(sums.sums[1], 64);
}

template <PackedFormat F>
UnitConfig grouped_config() {
  UnitConfig config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = (i == 2 || i == 3) && !pairs_codes(F) ? kSteps : kUnitRows;
    config.row_bytes[i] = i >= 4 && !pairs_codes(F) ? 32 : 64;
  }
  return config;
}

// A chunk of groups times up to 16 rows.
template <PackedFormat F>
struct Chunk {
  const Weights<F>& weights;
  Sums<F> (&sums)[2][chunk_items(F)];
  const int8_t* panels;
  const int8_t* next_panels;  // of the rows that follow, null: none
  const PanelMeta* meta;
  const uint8_t* block;  // packed, for the tables
  int num_items;
  bool first;  // of the chunks

  const uint8_t* tables(int group) const {
    constexpr int kCount = block_groups(F);
    return block + static_cast<size_t>(group / kCount) * packed_block_bytes(F) +
           static_cast<size_t>(kCount) * codes_bytes(F.bits);
  }

  // Has the unit work at an item. After the last use of a group's activations those of the next rows take their place.
  template <int kItem>
  void start(int vector) const {
    constexpr int kParts = block_parts(F), kIndex = kItem / kParts;
    start_item<F, kItem>(weights.codes[vector][kItem]);
    if (kItem % kParts == kParts - 1 && vector + 1 == kVectors && next_panels != nullptr)
      load_activations<F, kIndex>(next_panels + kIndex * kPanelBytes);
  }
  // Before the first rows of a chunk; the others are begun while those before them end.
  void begin() const {
    load_panels<0>();
    start<0>(0);
    store_item<F, 0>(sums[0][0]);
    start<1>(0);
  }

 private:
  template <int kIndex>
  void load_panels() const {
    load_activations<F, kIndex>(panels + kIndex * kPanelBytes);
    if constexpr (kIndex + 1 < chunk_groups(F))
      if ((kIndex + 1) * block_parts(F) < num_items) load_panels<kIndex + 1>();
  }
};

template <PackedFormat F, int kRows>
inline void add_scaled(const Chunk<F>& chunk, const Sums<F>& sums, int item, int vector, __m512 (&acc)[kRows]) {
  constexpr int kParts = block_parts(F);
  const int group = item / kParts, part = item % kParts;
  const PanelMeta& meta = chunk.meta[group];
  if constexpr (F.group > kGroup) {
    for (int r = 0; r < kRows; ++r) acc[r] = _mm512_fmadd_ps(sums.row(r), _mm512_set1_ps(meta.scales[r]), acc[r]);
  } else {
    const uint8_t* tables = chunk.tables(group) + static_cast<size_t>(part) * kTableBytes + vector * 32;
    const __m512 scale = load_f16(tables);
    const __m512 minimum =
        F.minimum ? load_f16(tables + static_cast<size_t>(kParts) * kTableBytes) : _mm512_setzero_ps();
    const float* scaled_sums = kParts == 1 ? meta.scaled_sums
                               : part == 0 ? meta.scaled_first_sums
                                           : meta.scaled_second_sums;
    for (int r = 0; r < kRows; ++r) {
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(meta.scales[r]));
      acc[r] = _mm512_fmadd_ps(sums.row(r), factor, acc[r]);
      if constexpr (F.minimum) acc[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(scaled_sums[r]), acc[r]);
    }
  }
}

// The end of a block with one scale for several groups: out += scale_w * part (+ minimum * sum of x).
template <PackedFormat F, int kRows>
inline void end_block(const Chunk<F>& chunk, int last_group, int vector, int num_rows, __m512 (&parts)[kRows],
                      float* out, int64_t out_stride) {
  const uint8_t* tables = chunk.tables(last_group) + vector * 32;
  const __m512 scale = load_f16(tables);
  const __m512 minimum = F.minimum ? load_f16(tables + kTableBytes) : _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r >= num_rows) break;
    float* place = out + r * out_stride;
    __m512 acc = _mm512_fmadd_ps(parts[r], scale, _mm512_loadu_ps(place));
    if constexpr (F.minimum) {
      float sum = 0.0f;
      for (int i = 1 - block_groups(F); i <= 0; ++i) sum += chunk.meta[last_group + i].scaled_sums[r];
      acc = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sum), acc);
    }
    _mm512_storeu_ps(place, acc);
  }
}

// Item kItem of the chunk for the channels of a vector. What is scaled now has been stored before, the next is stored
// now, and the unit starts at the one after: so nothing waits for anything.
template <PackedFormat F, int kRows, int kItem>
inline void multiply_items(const Chunk<F>& chunk, int vector, int num_rows, __m512 (&acc)[kRows], float* out,
                           int64_t out_stride) {
  constexpr int kCount = block_groups(F), kItems = chunk_items(F);
  constexpr int kNext = (kItem + 1) % kItems, kSecond = (kItem + 2) % kItems;
  const bool goes_on = kItem + 1 < kItems && kItem + 1 < chunk.num_items;
  const bool next_goes_on = kItem + 2 < kItems && kItem + 2 < chunk.num_items;
  const bool another = vector + 1 < kVectors || chunk.next_panels != nullptr;  // vector
  const int half = vector % 2, next_vector = (vector + 1) % kVectors;
  if (goes_on)
    store_item<F, kNext>(chunk.sums[half][kNext]);
  else if (another)
    store_item<F, 0>(chunk.sums[1 - half][0]);
  if (next_goes_on)
    chunk.template start<kSecond>(vector);
  else if (another)
    goes_on ? chunk.template start<0>(next_vector) : chunk.template start<1>(next_vector);
  add_scaled<F, kRows>(chunk, chunk.sums[half][kItem], kItem, vector, acc);
  if constexpr (kCount > 1 && kItem % kCount == kCount - 1) {
    end_block<F, kRows>(chunk, kItem, vector, num_rows, acc, out, out_stride);
    for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_ps();
  }
  if constexpr (kItem + 1 < kItems)
    if (goes_on) multiply_items<F, kRows, kNext>(chunk, vector, num_rows, acc, out, out_stride);
}

// kRows accumulators for `num_rows` rows: what the others hold is never stored.
template <PackedFormat F, int kRows>
void multiply_rows(const Chunk<F>& chunk, int num_rows, float* out, int64_t out_stride) {
  constexpr bool kInOut = block_groups(F) > 1;
  for (int vector = 0; vector < kVectors; ++vector, out += kLanes) {
    __m512 acc[kRows];
    for (int r = 0; r < kRows; ++r)
      acc[r] = kInOut || chunk.first || r >= num_rows ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * out_stride);
    multiply_items<F, kRows, 0>(chunk, vector, num_rows, acc, out, out_stride);
    if constexpr (!kInOut) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
        if (r < num_rows) _mm512_storeu_ps(out + r * out_stride, acc[r]);
    }
  }
}

template <PackedFormat F>
void multiply_block(const Chunk<F>& chunk, int num_rows, float* out, int64_t out_stride) {
  if (num_rows > 12) return multiply_rows<F, 16>(chunk, num_rows, out, out_stride);
  if (num_rows > 8) return multiply_rows<F, 12>(chunk, num_rows, out, out_stride);
  if (num_rows > 4) return multiply_rows<F, 8>(chunk, num_rows, out, out_stride);
  multiply_rows<F, 4>(chunk, num_rows, out, out_stride);
}

const KernelTable& few_rows() {
  static const KernelTable table = [] {
    KernelTable vnni{};
    avx512vnni::fill(vnni);
    return vnni;
  }();
  return table;
}

// All groups, a chunk at a time, but a last item that has no other beside it.
template <PackedFormat F>
void multiply(const TileArgs& args, TileFunction rest) {
  constexpr int kCount = block_groups(F);
  const UnitConfig config = grouped_config<F>();
  const Unit unit(config);
  if (kCount > 1 && args.first_group == 0)
    for (int r = 0; r < args.rows; ++r)
      for (int v = 0; v < kVectors; ++v)
        _mm512_storeu_ps(args.out + r * args.out_stride + v * kLanes, _mm512_setzero_ps());
  struct {
    Weights<F> weights;
    Sums<F> sums[2][chunk_items(F)];
  } made;  // in this order the unit never loads what shares its place in a page with what it has just stored
  const int64_t panel_groups = padded_columns(args.x.columns) / kGroup;
  const uint8_t* block = args.weights;
  int64_t group = args.first_group;
  const int64_t end = group + (args.num_groups + kCount - 1) / kCount * kCount;
  while (group < end) {
    const int num_groups = static_cast<int>(end - group < chunk_groups(F) ? end - group : chunk_groups(F));
    const int num_items = num_groups * block_parts(F);
    if (num_items == 1) break;
    for (int g = 0; g < num_groups; ++g)
      made.weights.set(g, block + static_cast<size_t>(g / kCount) * packed_block_bytes(F) +
                              static_cast<size_t>(g % kCount) * codes_bytes(F.bits));
    for (int row = 0; row < args.rows; row += kUnitRows) {
      const int num_rows = args.rows - row < kUnitRows ? args.rows - row : kUnitRows;
      const int64_t at = row / kPanelRows * panel_groups + group;
      const int8_t* panels = args.x.panels + at * kPanelBytes;
      const int8_t* next = row + kUnitRows < args.rows ? panels + panel_groups * kPanelBytes : nullptr;
      const Chunk<F> chunk{made.weights, made.sums, panels, next, args.x.panel_meta + at, block, num_items, group == 0};
      if (row == 0) chunk.begin();
      multiply_block<F>(chunk, num_rows, args.out + row * args.out_stride, args.out_stride);
    }
    block += static_cast<size_t>(num_groups / kCount) * packed_block_bytes(F);
    group += num_groups;
  }
  if (group == end) return;
  TileArgs last = args;
  last.weights = last.next = block;
  last.first_group = group;
  last.num_groups = end - group;
  rest(last);
}

// INT8 per channel: 16 or 32 rows by 32 channels, sums in the unit over all of K.
template <int kBlocks>
void i8_block(const TileArgs& args, int row, int num_rows, int vector) {
  const int64_t stride = padded_columns(args.x.columns), steps = (args.x.columns + 3) / 4;
  const int8_t* x = args.x.i8 + row * stride;
  const uint8_t* weights = args.weights + vector * 64;
  unit_zero<0>();
  unit_zero<1>();
  if constexpr (kBlocks == 2) {
    unit_zero<2>();
    unit_zero<3>();
  }
  const auto add = [&](const uint8_t* lines, int64_t line_stride) {
    unit_load<6>(lines, line_stride);
    unit_load<7>(lines + 64, line_stride);
    unit_load<4>(x, stride);
    unit_multiply<true, 0, 4, 6>();
    unit_multiply<true, 1, 4, 7>();
    if constexpr (kBlocks == 2) {
      unit_load<5>(x + kUnitRows * stride, stride);
      unit_multiply<true, 2, 5, 6>();
      unit_multiply<true, 3, 5, 7>();
    }
  };
  int64_t step = 0;
  for (; step + kUnitRows <= steps; step += kUnitRows, x += 64, weights += kUnitRows * kStepBytes)
    add(weights, kStepBytes);
  if (step < steps) {  // what lies behind the last step is not to be read
    alignas(64) uint8_t lines[kUnitRows][128] = {};
    for (int64_t i = 0; step + i < steps; ++i) __builtin_memcpy(lines[i], weights + i * kStepBytes, 128);
    add(lines[0], 128);
  }
  alignas(64) int32_t sums[2 * kUnitRows][2 * kLanes];
  unit_store<0>(sums[0], sizeof(sums[0]));
  unit_store<1>(sums[0] + kLanes, sizeof(sums[0]));
  if constexpr (kBlocks == 2) {
    unit_store<2>(sums[kUnitRows], sizeof(sums[0]));
    unit_store<3>(sums[kUnitRows] + kLanes, sizeof(sums[0]));
  }
  const uint8_t* scales = args.weights + steps * kStepBytes + vector * 64;
  for (int v = 0; v < 2; ++v)
    for (int r = 0; r < num_rows; ++r) {
      const RowMeta& meta = args.x.i8_meta[row + r];
      const __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(scales + v * 64), _mm512_set1_ps(meta.scale));
      const __m512i zero = _mm512_slli_epi32(_mm512_set1_epi32(meta.negative_sum), 7);
      const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums[r] + v * kLanes), zero);
      _mm512_storeu_ps(args.out + (row + r) * args.out_stride + (vector + v) * kLanes,
                       _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor));
    }
}

void gemm_i8(const TileArgs& args) {
  if (args.rows < kUnitRows) return few_rows().gemm_packed[static_cast<size_t>(PackedType::kI8)](args);
  UnitConfig config;
  for (int i = 0; i < 8; ++i) config.rows[i] = kUnitRows, config.row_bytes[i] = 64;
  const int rest = args.rows % kUnitRows;
  {
    const Unit unit(config);
    for (int vector = 0; vector < kVectors; vector += 2) {
      int row = 0;
      for (; row + 2 * kUnitRows <= args.rows; row += 2 * kUnitRows) i8_block<2>(args, row, 2 * kUnitRows, vector);
      if (row + kUnitRows <= args.rows) i8_block<1>(args, row, kUnitRows, vector);
    }
  }
  if (rest == 0) return;
  // Rows that are not there are not to be read either.
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(rest);
  const Unit unit(config);
  for (int vector = 0; vector < kVectors; vector += 2) i8_block<1>(args, args.rows - rest, rest, vector);
}

bool is_for_few_rows(const TileArgs& args) { return args.rows < kLeastRows || args.x.panels == nullptr; }

template <PackedType kType>
void gemm_packed(const TileArgs& args) {
  const TileFunction few = few_rows().gemm_packed[static_cast<size_t>(kType)];
  is_for_few_rows(args) ? few(args) : multiply<packed_format(kType)>(args, few);
}

template <PackedType kType>
void gemm_unpacked(const TileArgs& args) {
  const TileFunction few = few_rows().gemm_unpacked[static_cast<size_t>(kType)];
  is_for_few_rows(args) ? few(args) : multiply<unpacked(packed_format(kType))>(args, few);
}

template <PackedType kType>
void fill_type(KernelTable& table) {
  constexpr PackedFormat F = packed_format(kType);
  constexpr bool kTakesPacked = F.bits == 8 || (F.bits == 4 && !F.codebook);
  if constexpr (kTakesPacked) {
    table.direct_rows[static_cast<size_t>(kType)] = kRangeRows;
    table.gemm_packed[static_cast<size_t>(kType)] = gemm_packed<kType>;
  }
  table.gemm_unpacked[static_cast<size_t>(kType)] = gemm_unpacked<kType>;
}

}  // namespace

void fill_gemm(KernelTable& table) {
  table.name = "amx";
  table.reads_panels = true;
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
}

}  // namespace llmserve::amx
