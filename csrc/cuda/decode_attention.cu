// Decode attention: the keys of a sequence are split into ranges of fixed places, each range and key-value head is an
// item, and the items' states are merged in the order of the tokens by a second kernel. What a row comes to depends on
// its own sequence and the tokens of a split alone.
//
// A block of four warps goes through its items tile by tile. The up to 16 queries of a key-value head are the rows of
// one matrix instruction (more: several items). Warp w has the scores of tokens 16 w to 16 w + 15 of a tile; all
// warps then need all probabilities, of 4 KB at most, and each has a quarter of the columns of the output:
//
//   scores   16 rows x 64 tokens:   | warp 0 | warp 1 | warp 2 | warp 3 |   -> largest of rows -> probabilities
//   output   16 rows x head_dim:    | warp 0 | warp 1 | warp 2 | warp 3 |   += probabilities * values
//
// Copies of tiles run ahead of the products by kStages - 1, also into the block's next item. On sm_90, of 228 KB of
// shared memory and 65,536 registers (no kernel spills):
//
//   head_dim up to   bytes   a tile    stages   registers   blocks of an SM   under way in an SM
//   64               2       16 KB     4        124         3                 144 KB
//   128              2       32 KB     3        118         2                 128 KB
//   256              2       64 KB     2        166         1                 64 KB
//   64               1       8.5 KB    4        95          5                 127 KB
//   128              1       16.5 KB   4        126         3                 148 KB
//   256              1       32.5 KB   3        165         2                 130 KB
#include "cuda/decode_attention.h"

#include "cuda/attention_tile.h"

namespace llmserve::cuda {

namespace {

constexpr int kWarps = kChunks, kThreads = kWarps * kWarp;
constexpr int kMergeBatch = 16;  // splits whose loads are under way together

template <typename C, int kDim>
constexpr int kStages = Stage<C, kDim>::kBytes > 48 * 1024   ? 2
                        : Stage<C, kDim>::kBytes > 24 * 1024 ? 3
                                                             : 4;

// What a block is at: an item, and the tile of it.
struct Cursor {
  int item, sequence, split, kv_head, row_tile, first, end, tile, end_tile;
};

// On the device, so that a captured graph follows it.
__device__ int split_tokens(const DecodeAttentionArgs& args) { return args.extent[1]; }

__device__ int first_token(const DecodeAttentionArgs& args, int seq_len) {
  return args.window > 0 ? max(0, seq_len - static_cast<int>(args.window)) : 0;
}

// Goes to the item cursor.item, or the next of this block that has tokens. False behind the last.
__device__ bool enter(const DecodeAttentionArgs& args, int num_items, int of_work, Cursor& cursor) {
  for (; cursor.item < num_items; cursor.item += static_cast<int>(gridDim.x)) {
    const int index = cursor.item / of_work, rest = cursor.item % of_work,
              kv_heads = static_cast<int>(args.cache.kv_heads);
    const int2 work = reinterpret_cast<const int2*>(args.work)[index];
    const int seq_len = args.seq_lens[work.x], start = work.y * split_tokens(args);
    cursor.sequence = work.x, cursor.split = work.y;
    cursor.kv_head = rest % kv_heads, cursor.row_tile = rest / kv_heads;
    cursor.first = max(start, first_token(args, seq_len));
    cursor.end = min(start + split_tokens(args), seq_len);
    cursor.tile = cursor.first / kTileTokens;
    cursor.end_tile = (cursor.end + kTileTokens - 1) / kTileTokens;
    if (cursor.first < cursor.end) return true;
  }
  return false;
}

__device__ bool advance(const DecodeAttentionArgs& args, int num_items, int of_work, Cursor& cursor) {
  if (++cursor.tile < cursor.end_tile) return true;
  cursor.item += static_cast<int>(gridDim.x);
  return enter(args, num_items, of_work, cursor);
}

// What a warp has of an item: two rows of each lane, a quarter of the columns.
template <int kDim>
struct Rows {
  static constexpr int kUnits = kDim / 16 / kWarps;  // of 16 columns
  uint32_t query[kDim / 16][4];
  float output[kUnits][2][4];
  float sums[4];  // of probabilities: [0] of the low row, [2] of the high one
  float maximum[2];
};

// What warps tell each other.
struct Exchange {
  float maxima[kWarps][kRowTile];
  uint4 probabilities[kChunks][kWarp];  // left operands
  uint4 scaled[kChunks][kWarp];         // times the scales of values
};

template <typename C, int kDim>
__device__ void start_item(const DecodeAttentionArgs& args, const Cursor& cursor, Rows<kDim>& rows) {
  const int group = static_cast<int>(args.heads / args.cache.kv_heads),
            head_dim = static_cast<int>(args.cache.head_dim);
  const int low = cursor.row_tile * kRowTile + static_cast<int>(threadIdx.x) % kWarp / 4, high = low + 8;
  const auto* queries = static_cast<const __nv_bfloat16*>(args.q) + cursor.sequence * args.q_stride +
                        static_cast<int64_t>(cursor.kv_head) * group * head_dim;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step)
    load_query<C, kDim>(low < group ? queries + low * head_dim : nullptr,
                        high < group ? queries + high * head_dim : nullptr, head_dim, step, rows.query[step]);
  for (auto& unit : rows.output)
    for (auto& tile : unit)
      for (float& x : tile) x = 0.0f;
  for (float& x : rows.sums) x = 0.0f;
  rows.maximum[0] = rows.maximum[1] = kNothing;
}

// Products of the queries and the warp's 16 tokens: [0] of tokens 0 to 7, [1] of 8 to 15.
template <typename C, int kDim>
__device__ void products(const unsigned char* keys, const Rows<kDim>& rows, float (&s)[2][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, row = static_cast<int>(threadIdx.x) / kWarp * kChunkTokens;
  for (auto& tile : s)
    for (float& x : tile) x = 0.0f;
  if constexpr (kHasScales<C>) {
    const LaneOffset at = Tile<C, kDim>::lane_offset(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < kDim / 16; step += 2) {
      uint32_t words[4], b[2];  // tokens 0 to 7, 8 to 15; the same of the next 16 values
      ldmatrix(words, keys + Tile<C, kDim>::at(at, row, step));
      for (int i = 0; i < 4; ++i) {
        unpack<C>(words[i], b[0], b[1]);
        mma<Operand<C>>(s[i % 2], rows.query[step + i / 2], b);
      }
    }
  } else {
    const LaneOffset at = key_offset<C, kDim>();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t b[2][2];
      load_keys<C, kDim>(keys, at, row, step, b[0], b[1]);
      mma<Operand<C>>(s[0], rows.query[step], b[0]);
      mma<Operand<C>>(s[1], rows.query[step], b[1]);
    }
  }
}

// Adds the tile's values, weighted, to the warp's columns.
template <typename C, int kDim>
__device__ void add_values(const unsigned char* values, const uint4 (&weights)[kChunks][kWarp], Rows<kDim>& rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto left = [&](int chunk, uint32_t (&a)[4]) {
    const uint4 words = weights[chunk][lane];
    a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
  };
  if constexpr (kHasScales<C>) {
    const LaneOffset at = Tile<C, kDim>::lane_offset(lane, 0);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t a[2][4];
      left(chunk, a[0]), left(chunk + 1, a[1]);
#pragma unroll
      for (int u = 0; u < Rows<kDim>::kUnits; ++u) {
        uint32_t words[4];  // of eight tokens each
        ldmatrix_transposed(words, values + Tile<C, kDim>::at(at, chunk * kChunkTokens, warp + kWarps * u));
        for (int i = 0; i < 2; ++i) {
          uint32_t even[2], odd[2];
          for (int half = 0; half < 2; ++half) unpack<C>(words[2 * i + half], even[half], odd[half]);
          mma<Operand<C>>(rows.output[u][0], a[i], even);
          mma<Operand<C>>(rows.output[u][1], a[i], odd);
        }
      }
    }
  } else {
    const LaneOffset at = value_offset<C, kDim>();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint32_t a[4];
      left(chunk, a);
#pragma unroll
      for (int u = 0; u < Rows<kDim>::kUnits; ++u) {
        uint32_t b[2][2];
        load_values<C, kDim>(values, at, chunk * kChunkTokens, warp + kWarps * u, b[0], b[1]);
        mma<Operand<C>>(rows.output[u][0], a, b[0]);
        mma<Operand<C>>(rows.output[u][1], a, b[1]);
      }
    }
  }
}

// From products to probabilities of the warp's tokens, by way of the largest score of all tokens of the tile.
// `rescale` becomes what the rows' sums so far are multiplied by.
template <typename C, int kDim>
__device__ void to_probabilities(const Cursor& cursor, ScoreRule rule, const unsigned char* stage, float (&s)[2][4],
                                 Rows<kDim>& rows, Exchange& exchange, float (&rescale)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int in_tile = warp * kChunkTokens + lane % 4 * 2, start = cursor.tile * kTileTokens;
  const bool is_edge = start < cursor.first || start + kTileTokens > cursor.end;
  float maxima[2] = {kNothing, kNothing};
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int at = in_tile + 8 * i + j % 2, token = start + at;
      if constexpr (kHasScales<C>)
        s[i][j] = __fmul_rn(s[i][j], reinterpret_cast<const float*>(stage + Stage<C, kDim>::kKeyScales)[at]);
      s[i][j] = score(s[i][j], rule);
      if (is_edge && (token < cursor.first || token >= cursor.end)) s[i][j] = kNothing;
      maxima[j / 2] = fmaxf(maxima[j / 2], s[i][j]);
    }
  }
  for (int i = 0; i < 2; ++i) {
    maxima[i] = largest_of_row(maxima[i]);
    if (lane % 4 == 0) exchange.maxima[warp][lane / 4 + 8 * i] = maxima[i];
  }
  __syncthreads();
  float p[2][4];
  for (int i = 0; i < 2; ++i) {
    float larger = rows.maximum[i];
    for (int w = 0; w < kWarps; ++w) larger = fmaxf(larger, exchange.maxima[w][lane / 4 + 8 * i]);
    rescale[i] = rescaling(rows.maximum[i], larger);
    rows.maximum[i] = larger;
    for (int j = 0; j < 4; ++j) p[j / 2][2 * i + j % 2] = probability(s[j / 2][2 * i + j % 2], finite_maximum(larger));
  }
  using T = Operand<C>;
  exchange.probabilities[warp][lane] = {pack<T>(p[0][0], p[0][1]), pack<T>(p[0][2], p[0][3]), pack<T>(p[1][0], p[1][1]),
                                        pack<T>(p[1][2], p[1][3])};
  if constexpr (kHasScales<C>) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int at = in_tile + 8 * i + j % 2, token = start + at;
        const bool is_seen = !is_edge || (token >= cursor.first && token < cursor.end);
        const float scale = reinterpret_cast<const float*>(stage + Stage<C, kDim>::kValueScales)[at];
        p[i][j] = is_seen ? __fmul_rn(p[i][j], scale) : 0.0f;  // beside the tokens the scale may be anything
      }
    }
    exchange.scaled[warp][lane] = {pack<T>(p[0][0], p[0][1]), pack<T>(p[0][2], p[0][3]), pack<T>(p[1][0], p[1][1]),
                                   pack<T>(p[1][2], p[1][3])};
  }
  __syncthreads();
}

template <typename C, int kDim>
__device__ void add_tile(const Cursor& cursor, ScoreRule rule, const unsigned char* stage, Rows<kDim>& rows,
                         Exchange& exchange) {
  float s[2][4], rescale[2];
  products<C, kDim>(stage + Stage<C, kDim>::kKeys, rows, s);
  to_probabilities<C, kDim>(cursor, rule, stage, s, rows, exchange, rescale);
  for (auto& unit : rows.output)
    for (auto& tile : unit)
      for (int i = 0; i < 4; ++i) tile[i] = __fmul_rn(tile[i], rescale[i / 2]);
  if (threadIdx.x < kWarp) {
    for (int i = 0; i < 4; ++i) rows.sums[i] = __fmul_rn(rows.sums[i], rescale[i / 2]);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint4 words = exchange.probabilities[chunk][threadIdx.x];
      const uint32_t a[4] = {words.x, words.y, words.z, words.w}, ones[2] = {kOnes<Operand<C>>, kOnes<Operand<C>>};
      mma<Operand<C>>(rows.sums, a, ones);
    }
  }
  const auto& weights = kHasScales<C> ? exchange.scaled : exchange.probabilities;
  add_values<C, kDim>(stage + Stage<C, kDim>::kValues, weights, rows);
}

// The item's state goes to the workspace.
template <typename C, int kDim>
__device__ void finish_item(const DecodeAttentionArgs& args, const Cursor& cursor, const Rows<kDim>& rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int group = static_cast<int>(args.heads / args.cache.kv_heads),
            head_dim = static_cast<int>(args.cache.head_dim);
  const int before = first_token(args, args.seq_lens[cursor.sequence]) / split_tokens(args);
  const int64_t partial = args.partial_start[cursor.sequence] + cursor.split - before;
  for (int i = 0; i < 2; ++i) {
    const int row = cursor.row_tile * kRowTile + lane / 4 + 8 * i;
    if (row >= group) continue;
    const int64_t head = partial * args.heads + static_cast<int64_t>(cursor.kv_head) * group + row;
    if (warp == 0 && lane % 4 == 0)
      reinterpret_cast<float2*>(args.partial_state)[head] = {rows.maximum[i], rows.sums[2 * i]};
    float* out = args.partial_out + head * head_dim;
#pragma unroll
    for (int u = 0; u < Rows<kDim>::kUnits; ++u) {
      const int column = (warp + kWarps * u) * 16;
      const auto& x = rows.output[u];
      if constexpr (kHasScales<C>) {
        if (column < head_dim)
          *reinterpret_cast<float4*>(out + column + lane % 4 * 4) = {x[0][2 * i], x[1][2 * i], x[0][2 * i + 1],
                                                                     x[1][2 * i + 1]};
      } else {
        for (int t = 0; t < 2; ++t)
          if (column + 8 * t < head_dim)
            *reinterpret_cast<float2*>(out + column + 8 * t + lane % 4 * 2) = {x[t][2 * i], x[t][2 * i + 1]};
      }
    }
  }
}

template <typename C, int kDim>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(DecodeAttentionArgs args, ScoreRule rule) {
  constexpr int kCount = kStages<C, kDim>, kBytes = Stage<C, kDim>::kBytes;
  __shared__ Exchange exchange;
  auto* stages = dynamic_shared<unsigned char>();
  const int group = static_cast<int>(args.heads / args.cache.kv_heads);
  const int of_work = static_cast<int>(args.cache.kv_heads) * ((group + kRowTile - 1) / kRowTile);
  const int num_items = args.extent[0] * of_work;
  Cursor now, ahead;
  now.item = static_cast<int>(blockIdx.x);
  bool is_now = enter(args, num_items, of_work, now), is_ahead = is_now;
  ahead = now;
  const auto copy_ahead = [&](int stage) {
    if (is_ahead) {
      const int32_t* table = args.block_tables + ahead.sequence * args.table_stride;
      load_tile<C, kDim, kThreads>(args.cache, table, ahead.kv_head, {ahead.tile * kTileTokens, ahead.first, ahead.end},
                                   stages + stage * kBytes);
      is_ahead = advance(args, num_items, of_work, ahead);
    }
    cp_async_commit();
  };
  for (int stage = 0; stage < kCount - 1; ++stage) copy_ahead(stage);
  Rows<kDim> rows;
  bool is_fresh = true;
  for (int stage = 0; is_now; stage = stage + 1 == kCount ? 0 : stage + 1) {
    cp_async_wait<kCount - 2>();
    __syncthreads();  // the tile is there, and all are done with the one before it, whose place is filled next
    copy_ahead(stage == 0 ? kCount - 1 : stage - 1);
    if (is_fresh) start_item<C, kDim>(args, now, rows);
    add_tile<C, kDim>(now, rule, stages + stage * kBytes, rows, exchange);
    is_fresh = now.tile + 1 == now.end_tile;
    if (is_fresh) finish_item<C, kDim>(args, now, rows);
    is_now = advance(args, num_items, of_work, now);
  }
  cp_async_wait<0>();
}

// One block for a head of a sequence, two columns of a thread.
__global__ void merge_splits_kernel(DecodeAttentionArgs args) {
  const int sequence = static_cast<int>(blockIdx.x / args.heads), head = static_cast<int>(blockIdx.x % args.heads);
  const int column = static_cast<int>(threadIdx.x) * 2, head_dim = static_cast<int>(args.cache.head_dim);
  if (column >= head_dim) return;
  const int seq_len = args.seq_lens[sequence], split = split_tokens(args);
  const int count = (seq_len + split - 1) / split - first_token(args, seq_len) / split;
  const int64_t first = args.partial_start[sequence];
  RowState state;
  float2 out{0.0f, 0.0f};
  for (int done = 0; done < count; done += kMergeBatch) {
    float2 states[kMergeBatch], outputs[kMergeBatch];
#pragma unroll
    for (int i = 0; i < kMergeBatch; ++i) {
      const int64_t at = (first + min(done + i, count - 1)) * args.heads + head;
      states[i] = reinterpret_cast<const float2*>(args.partial_state)[at];
      outputs[i] = *reinterpret_cast<const float2*>(args.partial_out + at * head_dim + column);
    }
#pragma unroll
    for (int i = 0; i < kMergeBatch; ++i) {
      if (done + i >= count) break;
      const MergeWeights weights = merge(state, {states[i].x, states[i].y});
      out = {merged(out.x, outputs[i].x, weights), merged(out.y, outputs[i].y, weights)};
    }
  }
  const float by = count > 0 ? normalization(state, args.sinks == nullptr ? nullptr : args.sinks + head) : 0.0f;
  auto* to = static_cast<__nv_bfloat16*>(args.out) + sequence * args.out_stride + static_cast<int64_t>(head) * head_dim;
  *reinterpret_cast<uint32_t*>(to + column) = pack<__nv_bfloat16>(__fmul_rn(out.x, by), __fmul_rn(out.y, by));
}

template <typename C, int kDim>
cudaError_t launch_splits(const DecodeAttentionArgs& args, cudaStream_t stream) {
  return launch(decode_attention_kernel<C, kDim>, static_cast<unsigned>(args.num_ctas), kThreads,
                static_cast<size_t>(kStages<C, kDim>) * Stage<C, kDim>::kBytes, stream, args,
                score_rule(args.scale, args.softcap));
}

template <typename C>
cudaError_t launch_type(const DecodeAttentionArgs& args, cudaStream_t stream) {
  const int64_t head_dim = args.cache.head_dim;
  const cudaError_t status = head_dim <= 64    ? launch_splits<C, 64>(args, stream)
                             : head_dim <= 128 ? launch_splits<C, 128>(args, stream)
                                               : launch_splits<C, 256>(args, stream);
  if (status != cudaSuccess) return status;
  const auto threads = static_cast<unsigned>((head_dim / 2 + kWarp - 1) / kWarp * kWarp);
  return launch(merge_splits_kernel, static_cast<unsigned>(args.sequences * args.heads), threads, 0, stream, args);
}

}  // namespace

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_decode_attention(const llmserve::cuda::DecodeAttentionArgs* args,
                                                         void* stream) {
  using namespace llmserve::cuda;
  if (args->sequences == 0) return cudaSuccess;
  const int64_t head_dim = args->cache.head_dim;
  if (args->sequences < 0 || head_dim <= 0 || head_dim > 256 || head_dim % 8 != 0 || args->num_ctas <= 0)
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
