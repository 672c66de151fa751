// Prefill attention: rows are the queries of one key-value head, token by token and in a token its group of heads, so
// that a chunk of few tokens reads the keys once for all of them:
//
//   row   0           1          ...  group - 1       group       ...
//         token 0,    token 0,        token 0,        token 1,
//         head 0      head 1          last head       head 0
//
// An item is a tile of such rows and a key-value head. Each warp of a block has one or two bands of 16 rows and goes
// with them over all tiles of 64 keys; two bands read each key from shared memory once. Copies are one tile
// ahead. One-byte tiles are made 16-bit ones by the whole block, in the order of values that decode has (see
// attention_tile.h), so that every warp does not do it anew.
//
// With fold_tokens a row's state is put aside at each boundary, merged by the words of decode, and begun anew: all sums
// have then the order of decode, whatever chunk a token came in. What is put aside is in shared memory.
//
// On sm_90 (no kernel spills; one tile of keys and values is under way in each block):
//
//   head_dim up to   bytes   registers   threads   shared, folded    blocks of an SM   under way in an SM
//   64               2       239         128       48 KB, 84 KB      2                 32 KB
//   128              2       255         128       96 KB, 164 KB     2, folded 1       64 KB, folded 32 KB
//   256              2       250         128       160 KB, 226 KB    1                 64 KB
//   64               1       148         256       49 KB, 85 KB      1                 8.5 KB
//   128              1       209         256       97 KB, 165 KB     1                 16.5 KB
//   256              1       254         128       161 KB, 227 KB    1                 32.5 KB
//
// sm_80 and sm_86 have 163 KB and 99 KB of shared memory: there wide heads, folded ones first, are refused at the
// launch.
#include "cuda/prefill_attention.h"

#include "cuda/attention_tile.h"

namespace llmserve::cuda {

namespace {

constexpr int kStages = 2;

// Bands of 16 rows of a warp, and warps: together 128 rows, or 64 where outputs of 256 columns take half the registers.
// One-byte types need more registers beside those, so that they have twice the warps.
template <typename C, int kDim>
constexpr int kBands = kHasScales<C> || kDim > 128 ? 1 : 2;
template <typename C, int kDim>
constexpr int kWarps = kHasScales<C> && kDim <= 128 ? 8 : 4;
template <typename C, int kDim>
constexpr int kThreads = kWarps<C, kDim> * kWarp;
template <typename C, int kDim>
constexpr int kRows = kWarps<C, kDim> * kBands<C, kDim> * kRowTile;

// Places in shared memory.
template <typename C, int kDim>
struct Places {
  static constexpr int kConverted = kStages * Stage<C, kDim>::kBytes;  // keys and values of one-byte types, 16 bits
  static constexpr int kQueries = kConverted + (kHasScales<C> ? 2 * Tile<Operand<C>, kDim>::kBytes : 0);
  static constexpr int kFolded = kQueries + kRows<C, kDim> * kDim * 2;
  static constexpr int kFoldedStates = kFolded + kRows<C, kDim> * kDim * 4;
  static constexpr int kEnd = kFoldedStates + kBands<C, kDim> * 4 * kThreads<C, kDim> * 4;
};

// What a block is at: an item, and the tile of keys of it.
struct Cursor {
  int item, sequence, kv_head, first_row, first_query, num_queries, seq_len, first, end, tile, end_tile;
};

struct Span {
  int first, end;  // of visible tokens
};

__device__ Span span_of(const PrefillAttentionArgs& args, int position, int seq_len) {
  const int window = static_cast<int>(args.window);
  const int first = window > 0 ? max(0, position - window + 1) : 0;
  if (args.is_bidirectional == 0) return {first, position + 1};
  return {first, window > 0 ? min(seq_len, position + window) : seq_len};
}

// Goes to the item cursor.item, or the next of this block that has rows. False behind the last.
template <typename C, int kDim>
__device__ bool enter(const PrefillAttentionArgs& args, int num_items, int group, Cursor& cursor) {
  const int kv_heads = static_cast<int>(args.cache.kv_heads);
  for (; cursor.item < num_items; cursor.item += static_cast<int>(gridDim.x)) {
    const int2 work = reinterpret_cast<const int2*>(args.work)[cursor.item / kv_heads];
    cursor.sequence = work.x, cursor.kv_head = cursor.item % kv_heads, cursor.first_row = work.y * kRows<C, kDim>;
    cursor.first_query = args.query_start[work.x];
    cursor.num_queries = args.query_start[work.x + 1] - cursor.first_query;
    cursor.seq_len = args.seq_lens[work.x];
    const int before = cursor.seq_len - cursor.num_queries, low = cursor.first_row / group;
    const int high = min((cursor.first_row + kRows<C, kDim> - 1) / group, cursor.num_queries - 1);
    if (low > high) continue;
    cursor.first = span_of(args, before + low, cursor.seq_len).first;
    cursor.end = span_of(args, before + high, cursor.seq_len).end;
    cursor.tile = cursor.first / kTileTokens;
    cursor.end_tile = (cursor.end + kTileTokens - 1) / kTileTokens;
    return true;
  }
  return false;
}

template <typename C, int kDim>
__device__ bool advance(const PrefillAttentionArgs& args, int num_items, int group, Cursor& cursor) {
  if (++cursor.tile < cursor.end_tile) return true;
  cursor.item += static_cast<int>(gridDim.x);
  return enter<C, kDim>(args, num_items, group, cursor);
}

// What a lane has of an item: two rows of each band.
template <typename C, int kDim>
struct Rows {
  static constexpr int kCount = kBands<C, kDim>, kUnits = kDim / 16;
  float output[kCount][kUnits][2][4];
  float sums[kCount][4];  // of probabilities: [0] of the low row, [2] of the high one
  float maximum[kCount][2];
  int position[kCount][2];
};

// A row of the tile that this lane has.
__device__ inline int row_of(int band, int half, int bands) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  return (warp * bands + band) * kRowTile + lane / 4 + 8 * half;
}

template <typename C, int kDim>
__device__ void clear(Rows<C, kDim>& rows) {
#pragma unroll
  for (int b = 0; b < Rows<C, kDim>::kCount; ++b) {
    for (auto& unit : rows.output[b])
      for (auto& tile : unit)
        for (float& x : tile) x = 0.0f;
    for (float& x : rows.sums[b]) x = 0.0f;
    rows.maximum[b][0] = rows.maximum[b][1] = kNothing;
  }
}

// The left operands of all steps go to shared memory, where each lane reads its own again: registers are for outputs.
template <typename C, int kDim>
__device__ void start_item(const PrefillAttentionArgs& args, const Cursor& cursor, int group, unsigned char* shared,
                           Rows<C, kDim>& rows) {
  const int head_dim = static_cast<int>(args.cache.head_dim), before = cursor.seq_len - cursor.num_queries;
  auto* queries = reinterpret_cast<uint4*>(shared + Places<C, kDim>::kQueries);
#pragma unroll
  for (int b = 0; b < Rows<C, kDim>::kCount; ++b) {
    const __nv_bfloat16* from[2];
    for (int i = 0; i < 2; ++i) {
      const int row = cursor.first_row + row_of(b, i, Rows<C, kDim>::kCount), query = row / group;
      const int64_t head = static_cast<int64_t>(cursor.kv_head) * group + row % group;
      rows.position[b][i] = before + min(query, cursor.num_queries - 1);
      from[i] = query < cursor.num_queries ? static_cast<const __nv_bfloat16*>(args.q) +
                                                 (cursor.first_query + query) * args.q_stride + head * head_dim
                                           : nullptr;
    }
#pragma unroll 4
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[4];
      load_query<C, kDim>(from[0], from[1], head_dim, step, a);
      queries[(b * (kDim / 16) + step) * kThreads<C, kDim> + threadIdx.x] = {a[0], a[1], a[2], a[3]};
    }
  }
  clear<C, kDim>(rows);
  if (args.fold_tokens == 0) return;
  auto* folded = reinterpret_cast<float*>(shared + Places<C, kDim>::kFolded) + threadIdx.x;
  auto* states = reinterpret_cast<RowState*>(shared + Places<C, kDim>::kFoldedStates) + threadIdx.x;
  for (int i = 0; i < Rows<C, kDim>::kCount * Rows<C, kDim>::kUnits * 8; ++i) folded[i * kThreads<C, kDim>] = 0.0f;
  for (int i = 0; i < Rows<C, kDim>::kCount * 2; ++i) states[i * kThreads<C, kDim>] = RowState{};
}

// One-byte keys and values of a tile to bfloat16.
template <typename C, int kDim>
__device__ void convert(const unsigned char* stage, unsigned char* converted) {
  using From = Tile<C, kDim>;
  using To = Tile<__nv_bfloat16, kDim>;
#pragma unroll 4
  for (int i = 0; i < 2 * kTileTokens * From::kPieces / kThreads<C, kDim>; ++i) {
    const int index = i * kThreads<C, kDim> + static_cast<int>(threadIdx.x), row = index / From::kPieces % kTileTokens;
    const int piece = index % From::kPieces, which = index / (kTileTokens * From::kPieces);
    const uint4 words = *reinterpret_cast<const uint4*>(stage + which * From::kBytes + From::at(row, piece));
    uint4 even, odd;
    unpack<C>(words.x, even.x, odd.x);
    unpack<C>(words.y, even.y, odd.y);
    unpack<C>(words.z, even.z, odd.z);
    unpack<C>(words.w, even.w, odd.w);
    *reinterpret_cast<uint4*>(converted + which * To::kBytes + To::at(row, 2 * piece)) = even;
    *reinterpret_cast<uint4*>(converted + which * To::kBytes + To::at(row, 2 * piece + 1)) = odd;
  }
}

// Products of the warp's rows and the 64 keys.
template <typename C, int kDim>
__device__ void products(const unsigned char* keys, const uint4* queries, float (&s)[kBands<C, kDim>][8][4]) {
  using T = Operand<C>;
  constexpr int kCount = kBands<C, kDim>;
#pragma unroll
  for (auto& band : s)
    for (auto& tile : band)
      for (float& x : tile) x = 0.0f;
  const LaneOffset at = key_offset<T, kDim>();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[kCount][4];
    for (int band = 0; band < kCount; ++band) {
      const uint4 words = queries[(band * (kDim / 16) + step) * kThreads<C, kDim> + threadIdx.x];
      a[band][0] = words.x, a[band][1] = words.y, a[band][2] = words.z, a[band][3] = words.w;
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint32_t b[2][2];
      load_keys<T, kDim>(keys, at, chunk * kChunkTokens, step, b[0], b[1]);
      for (int band = 0; band < kCount; ++band) {
        mma<T>(s[band][2 * chunk], a[band], b[0]);
        mma<T>(s[band][2 * chunk + 1], a[band], b[1]);
      }
    }
  }
}

// From the products of a band to the left operands of its output; its sums and what it has of outputs are rescaled.
template <typename C, int kDim, bool kIsEdge>
__device__ void to_probabilities(const PrefillAttentionArgs& args, const Cursor& cursor, ScoreRule rule, int band,
                                 const float* key_scales, float (&s)[8][4], Rows<C, kDim>& rows,
                                 uint32_t (&a)[kChunks][4]) {
  using T = Operand<C>;
  const int in_tile = static_cast<int>(threadIdx.x) % 4 * 2, start = cursor.tile * kTileTokens;
  const float* value_scales = key_scales + kTileTokens;
  const Span spans[2] = {span_of(args, rows.position[band][0], cursor.seq_len),
                         span_of(args, rows.position[band][1], cursor.seq_len)};
  const auto is_seen = [&](int i, int at) { return start + at >= spans[i].first && start + at < spans[i].end; };
  float maxima[2] = {kNothing, kNothing};
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    float2 scales{1.0f, 1.0f};
    if constexpr (kHasScales<C>) scales = *reinterpret_cast<const float2*>(key_scales + in_tile + 8 * n);
    for (int j = 0; j < 4; ++j) {
      if constexpr (kHasScales<C>) s[n][j] = __fmul_rn(s[n][j], j % 2 == 0 ? scales.x : scales.y);
      s[n][j] = score(s[n][j], rule);
      if constexpr (kIsEdge)
        if (!is_seen(j / 2, in_tile + 8 * n + j % 2)) s[n][j] = kNothing;
      maxima[j / 2] = fmaxf(maxima[j / 2], s[n][j]);
    }
  }
  float rescale[2], finite[2];
  for (int i = 0; i < 2; ++i) {
    const float larger = fmaxf(rows.maximum[band][i], largest_of_row(maxima[i]));
    rescale[i] = rescaling(rows.maximum[band][i], larger);
    finite[i] = finite_maximum(larger);
    rows.maximum[band][i] = larger;
  }
  for (int j = 0; j < 4; ++j) rows.sums[band][j] = __fmul_rn(rows.sums[band][j], rescale[j / 2]);
#pragma unroll
  for (auto& unit : rows.output[band])
    for (auto& tile : unit)
      for (int j = 0; j < 4; ++j) tile[j] = __fmul_rn(tile[j], rescale[j / 2]);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const uint32_t ones[2] = {kOnes<T>, kOnes<T>};
#pragma unroll
    for (int n = 2 * chunk; n < 2 * chunk + 2; ++n) {
      for (int j = 0; j < 4; ++j) s[n][j] = probability(s[n][j], finite[j / 2]);
      for (int i = 0; i < 2; ++i) a[chunk][n % 2 * 2 + i] = pack<T>(s[n][2 * i], s[n][2 * i + 1]);
    }
    mma<T>(rows.sums[band], a[chunk], ones);
    if constexpr (kHasScales<C>) {
#pragma unroll
      for (int n = 2 * chunk; n < 2 * chunk + 2; ++n) {
        const float2 scales = *reinterpret_cast<const float2*>(value_scales + in_tile + 8 * n);
        for (int j = 0; j < 4; ++j) {
          s[n][j] = __fmul_rn(s[n][j], j % 2 == 0 ? scales.x : scales.y);
          if constexpr (kIsEdge)  // beside the tokens the scale may be anything
            if (!is_seen(j / 2, in_tile + 8 * n + j % 2)) s[n][j] = 0.0f;
        }
        for (int i = 0; i < 2; ++i) a[chunk][n % 2 * 2 + i] = pack<T>(s[n][2 * i], s[n][2 * i + 1]);
      }
    }
  }
}

template <typename C, int kDim>
__device__ void add_tile(const PrefillAttentionArgs& args, const Cursor& cursor, ScoreRule rule, const uint4* queries,
                         const unsigned char* keys, const unsigned char* values, const float* key_scales,
                         Rows<C, kDim>& rows) {
  using T = Operand<C>;
  constexpr int kCount = Rows<C, kDim>::kCount;
  // The warp's first and last row have its first and last position.
  const int low = __shfl_sync(kAllLanes, rows.position[0][0], 0);
  const int high = __shfl_sync(kAllLanes, rows.position[kCount - 1][1], kWarp - 1);
  const Span widest{span_of(args, low, cursor.seq_len).first, span_of(args, high, cursor.seq_len).end};
  const Span common{span_of(args, high, cursor.seq_len).first, span_of(args, low, cursor.seq_len).end};
  const int start = cursor.tile * kTileTokens, end = start + kTileTokens;
  if (start >= widest.end || end <= widest.first) return;
  const bool is_edge = start < common.first || end > common.end;
  uint32_t a[kCount][kChunks][4];
  float s[kCount][8][4];
  products<C, kDim>(keys, queries, s);
#pragma unroll
  for (int band = 0; band < kCount; ++band) {
    if (is_edge)
      to_probabilities<C, kDim, true>(args, cursor, rule, band, key_scales, s[band], rows, a[band]);
    else
      to_probabilities<C, kDim, false>(args, cursor, rule, band, key_scales, s[band], rows, a[band]);
  }
  const LaneOffset at = value_offset<T, kDim>();
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int unit = 0; unit < Rows<C, kDim>::kUnits; ++unit) {
      uint32_t b[2][2];
      load_values<T, kDim>(values, at, chunk * kChunkTokens, unit, b[0], b[1]);
      for (int band = 0; band < kCount; ++band) {
        mma<T>(rows.output[band][unit][0], a[band][chunk], b[0]);
        mma<T>(rows.output[band][unit][1], a[band][chunk], b[1]);
      }
    }
  }
}

// Puts the state of the tokens since the last boundary to those before it.
template <typename C, int kDim>
__device__ void fold(unsigned char* shared, Rows<C, kDim>& rows) {
  auto* folded = reinterpret_cast<float*>(shared + Places<C, kDim>::kFolded) + threadIdx.x;
  auto* states = reinterpret_cast<RowState*>(shared + Places<C, kDim>::kFoldedStates) + threadIdx.x;
#pragma unroll
  for (int band = 0; band < Rows<C, kDim>::kCount; ++band) {
    MergeWeights weights[2];
    for (int i = 0; i < 2; ++i) {
      RowState& state = states[(2 * band + i) * kThreads<C, kDim>];
      weights[i] = merge(state, {rows.maximum[band][i], rows.sums[band][2 * i]});
    }
#pragma unroll
    for (int unit = 0; unit < Rows<C, kDim>::kUnits; ++unit) {
      for (int j = 0; j < 8; ++j) {
        float& before = folded[((band * Rows<C, kDim>::kUnits + unit) * 8 + j) * kThreads<C, kDim>];
        before = merged(before, rows.output[band][unit][j / 4][j % 4], weights[j % 4 / 2]);
      }
    }
  }
  clear<C, kDim>(rows);
}

// Writes the outputs, of what was put aside where kIsFolded.
template <typename C, int kDim, bool kIsFolded>
__device__ void finish_item(const PrefillAttentionArgs& args, const Cursor& cursor, int group,
                            const unsigned char* shared, const Rows<C, kDim>& rows) {
  const int head_dim = static_cast<int>(args.cache.head_dim), quad = static_cast<int>(threadIdx.x) % 4;
  const auto* folded = reinterpret_cast<const float*>(shared + Places<C, kDim>::kFolded) + threadIdx.x;
  const auto* states = reinterpret_cast<const RowState*>(shared + Places<C, kDim>::kFoldedStates) + threadIdx.x;
#pragma unroll
  for (int b = 0; b < Rows<C, kDim>::kCount; ++b) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = cursor.first_row + row_of(b, i, Rows<C, kDim>::kCount), query = row / group;
      if (query >= cursor.num_queries) continue;
      const int64_t head = static_cast<int64_t>(cursor.kv_head) * group + row % group;
      const RowState state =
          kIsFolded ? states[(2 * b + i) * kThreads<C, kDim>] : RowState{rows.maximum[b][i], rows.sums[b][2 * i]};
      const float by = normalization(state, args.sinks == nullptr ? nullptr : args.sinks + head);
      auto* out =
          static_cast<__nv_bfloat16*>(args.out) + (cursor.first_query + query) * args.out_stride + head * head_dim;
#pragma unroll
      for (int unit = 0; unit < Rows<C, kDim>::kUnits; ++unit) {
        float x[2][2];
        for (int t = 0; t < 2; ++t) {
          for (int j = 0; j < 2; ++j) {
            const int at = ((b * Rows<C, kDim>::kUnits + unit) * 2 + t) * 4 + 2 * i + j;
            x[t][j] = __fmul_rn(kIsFolded ? folded[at * kThreads<C, kDim>] : rows.output[b][unit][t][2 * i + j], by);
          }
        }
        if constexpr (kHasScales<C>) {
          if (16 * unit < head_dim)
            *reinterpret_cast<uint2*>(out + 16 * unit + 4 * quad) = {pack<__nv_bfloat16>(x[0][0], x[1][0]),
                                                                     pack<__nv_bfloat16>(x[0][1], x[1][1])};
        } else {
          for (int t = 0; t < 2; ++t)
            if (16 * unit + 8 * t < head_dim)
              *reinterpret_cast<uint32_t*>(out + 16 * unit + 8 * t + 2 * quad) = pack<__nv_bfloat16>(x[t][0], x[t][1]);
        }
      }
    }
  }
}

template <typename C, int kDim>
__global__ void __launch_bounds__(kThreads<C, kDim>)
    prefill_attention_kernel(PrefillAttentionArgs args, ScoreRule rule) {
  using At = Places<C, kDim>;
  constexpr int kBytes = Stage<C, kDim>::kBytes;
  auto* shared = dynamic_shared<unsigned char>();
  const int group = static_cast<int>(args.heads / args.cache.kv_heads),
            fold_tokens = static_cast<int>(args.fold_tokens);
  const int num_items = *args.num_work * static_cast<int>(args.cache.kv_heads);
  const auto* queries = reinterpret_cast<const uint4*>(shared + At::kQueries);
  Cursor now, ahead;
  now.item = static_cast<int>(blockIdx.x);
  bool is_now = enter<C, kDim>(args, num_items, group, now), is_ahead = is_now;
  ahead = now;
  const auto copy_ahead = [&](int stage) {
    if (is_ahead) {
      const int32_t* table = args.block_tables + ahead.sequence * args.table_stride;
      load_tile<C, kDim, kThreads<C, kDim>>(args.cache, table, ahead.kv_head,
                                            {ahead.tile * kTileTokens, ahead.first, ahead.end},
                                            shared + stage * kBytes);
      is_ahead = advance<C, kDim>(args, num_items, group, ahead);
    }
    cp_async_commit();
  };
  copy_ahead(0);
  Rows<C, kDim> rows;
  bool is_fresh = true, has_rows = true;
  for (int stage = 0; is_now; stage = 1 - stage) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and all are done with the one before it
    copy_ahead(1 - stage);
    if (is_fresh) {
      start_item<C, kDim>(args, now, group, shared, rows);
      has_rows = (now.first_row + static_cast<int>(threadIdx.x) / kWarp * (kRowTile * kBands<C, kDim>)) / group <
                 now.num_queries;
    }
    const unsigned char* keys = shared + stage * kBytes;
    const auto* scales = reinterpret_cast<const float*>(keys + Stage<C, kDim>::kKeyScales);
    if constexpr (kHasScales<C>) {
      convert<C, kDim>(keys, shared + At::kConverted);
      __syncthreads();
      keys = shared + At::kConverted;
    }
    const unsigned char* values = keys + Tile<Operand<C>, kDim>::kBytes;
    if (has_rows) add_tile<C, kDim>(args, now, rule, queries, keys, values, scales, rows);
    is_fresh = now.tile + 1 == now.end_tile;
    if (fold_tokens == 0) {
      if (is_fresh) finish_item<C, kDim, false>(args, now, group, shared, rows);
    } else if (is_fresh || (now.tile + 1) * kTileTokens % fold_tokens == 0) {
      fold<C, kDim>(shared, rows);
      __syncwarp();  // what it stored is loaded again, and not kept in registers
      if (is_fresh) finish_item<C, kDim, true>(args, now, group, shared, rows);
    }
    is_now = advance<C, kDim>(args, num_items, group, now);
  }
  cp_async_wait<0>();
}

template <typename C, int kDim>
cudaError_t launch_tiles(const PrefillAttentionArgs& args, cudaStream_t stream) {
  const int bytes = args.fold_tokens != 0 ? Places<C, kDim>::kEnd : Places<C, kDim>::kFolded;
  return launch(prefill_attention_kernel<C, kDim>, static_cast<unsigned>(args.num_ctas), kThreads<C, kDim>,
                static_cast<size_t>(bytes), stream, args, score_rule(args.scale, args.softcap));
}

template <typename C>
cudaError_t launch_type(const PrefillAttentionArgs& args, cudaStream_t stream) {
  if (args.cache.head_dim <= 64) return launch_tiles<C, 64>(args, stream);
  if (args.cache.head_dim <= 128) return launch_tiles<C, 128>(args, stream);
  return launch_tiles<C, 256>(args, stream);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_prefill_attention(const llmserve::cuda::PrefillAttentionArgs* args,
                                                          void* stream) {
  using namespace llmserve::cuda;
  const int64_t head_dim = args->cache.head_dim;
  if (head_dim <= 0 || head_dim > 256 || head_dim % 8 != 0 || args->fold_tokens < 0 ||
      args->fold_tokens % kTileTokens != 0 || args->num_ctas <= 0)
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args->cache.type) {
    case Type::kBF16: return launch_type<__nv_bfloat16>(*args, on);
    case Type::kF16: return launch_type<__half>(*args, on);
    case Type::kF8E4M3: return launch_type<__nv_fp8_e4m3>(*args, on);
    case Type::kI8: return launch_type<int8_t>(*args, on);
    default: return cudaErrorInvalidValue;
  }
}
