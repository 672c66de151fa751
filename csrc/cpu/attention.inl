// Paged attention for mixed prefill and decode, included by each ISA's translation unit after elementwise.inl.
//
// KV is walked in tiles of 256 tokens aligned to absolute position 0, ascending. A tile yields a state (m, l, o) of its
// own, which is merged into the running one; masked positions add exact zeros. So a query's result does not depend on
// how many queries are computed together, nor on how the prompt was cut into chunks.
//
// The including file gives three micro-kernels (the portable ones below, or its own with LLMSERVE_OWN_ATTENTION_MICRO):
//   score_tile:  scores of `rows` queries against the K blocks of a tile
//   softmax_row: a row of scores to bf16 probabilities, with the tile's m and l
//   value_tile:  out[row][0..D) = sum over blocks of P[row] . V

constexpr float kLog2E = 1.44269504088896341f;  // powers of two stand for those of e

struct AttentionScratch {
  uint16_t* q;    // [rows][D] bf16, scaled by scale * log2(e)
  float* scores;  // [rows][256]
  uint16_t* p;    // [rows][256] bf16
  float* o;       // [rows][D] running
  float* tile_o;  // [rows][D]
  float* m;       // [rows]
  float* l;       // [rows]
  float* tile_m;  // [rows]
  float* tile_l;  // [rows]
  // Where the cache is int8: the codes of the tile's blocks as bf16, which holds them exactly, and the tokens' scales.
  uint16_t* kv;
  float* key_scales;    // [256]
  float* value_scales;  // [256]
};

static AttentionScratch carve(uint8_t* base, int head_dim) {
  const size_t rows = kMaxQueryRows, d = static_cast<size_t>(head_dim);
  AttentionScratch s;
  s.scores = reinterpret_cast<float*>(base);
  s.o = s.scores + rows * kKvTile;
  s.tile_o = s.o + rows * d;
  s.m = s.tile_o + rows * d;
  s.l = s.m + rows;
  s.tile_m = s.l + rows;
  s.tile_l = s.tile_m + rows;
  s.key_scales = s.tile_l + rows;
  s.value_scales = s.key_scales + kKvTile;
  s.p = reinterpret_cast<uint16_t*>(s.value_scales + kKvTile);
  s.q = s.p + rows * kKvTile;
  s.kv = s.q + rows * d;
  return s;
}

#ifndef LLMSERVE_OWN_ATTENTION_MICRO
static void score_block(const uint16_t* q, const uint16_t* k, float* scores, int rows, int head_dim) {
  for (int row = 0; row < rows; ++row) {
    float lanes[kKvBlock] = {};
    const uint16_t* query = q + static_cast<int64_t>(row) * head_dim;
    for (int d = 0; d < head_dim; d += 2) {
      const float q0 = from_bf16(query[d]), q1 = from_bf16(query[d + 1]);
      const uint16_t* pairs = k + d * kKvBlock;
      for (int t = 0; t < kKvBlock; ++t)
        lanes[t] = (lanes[t] + q0 * from_bf16(pairs[2 * t])) + q1 * from_bf16(pairs[2 * t + 1]);
    }
    float* out = scores + static_cast<int64_t>(row) * kKvTile;
    for (int t = 0; t < kKvBlock; ++t) out[t] = lanes[t];
  }
}

static void value_tile(const AttentionArgs& args, const int32_t* table, int num_blocks, const AttentionScratch& s,
                       int rows) {
  const int d_count = args.head_dim;
  for (int row = 0; row < rows; ++row) {
    float* out = s.tile_o + static_cast<int64_t>(row) * d_count;
    for (int d = 0; d < d_count; ++d) out[d] = 0.0f;
    for (int block = 0; block < num_blocks; ++block) {
      const uint16_t* v = args.kv + table[block] * args.block_stride + d_count * kKvBlock;
      const uint16_t* p = s.p + static_cast<int64_t>(row) * kKvTile + block * kKvBlock;
      for (int t = 0; t < kKvBlock; t += 2) {
        const float p0 = from_bf16(p[t]), p1 = from_bf16(p[t + 1]);
        const uint16_t* pairs = v + t * d_count;
        for (int d = 0; d < d_count; ++d)
          out[d] = (out[d] + p0 * from_bf16(pairs[2 * d])) + p1 * from_bf16(pairs[2 * d + 1]);
      }
    }
  }
}

static void score_tile(const AttentionArgs& args, const int32_t* table, int num_blocks, const AttentionScratch& s,
                       int rows) {
  for (int block = 0; block < num_blocks; ++block)
    score_block(s.q, args.kv + table[block] * args.block_stride, s.scores + block * kKvBlock, rows, args.head_dim);
}

// One row of a tile: scores, masked to [first, last], become bf16 probabilities (times the values' scales, where they
// are not null); also the tile's m and l.
static void softmax_row(float* scores, uint16_t* p, int count, int first, int last, const float* value_scales, float* m,
                        float* l) {
  const float minus_infinity = -__builtin_inff();
  for (int t = 0; t < count; ++t) scores[t] = t < first || t > last ? minus_infinity : scores[t];
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = minus_infinity;
  for (int t = 0; t < count; t += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] = scores[t + j] > lanes[j] ? scores[t + j] : lanes[j];
  float largest = minus_infinity;
  for (int j = 0; j < kLanes; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  *m = largest;
  const float origin = largest == minus_infinity ? 0.0f : largest;
  for (int j = 0; j < kLanes; ++j) lanes[j] = 0.0f;
  for (int t = 0; t < count; t += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float weight = exp2_poly(scores[t + j] - origin);
      p[t + j] = to_bf16(value_scales == nullptr ? weight : weight * value_scales[t + j]);
      lanes[j] += value_scales == nullptr ? from_bf16(p[t + j]) : weight;
    }
  }
  *l = reduce_lanes(lanes);
}
#endif

static void load_queries(const AttentionArgs& args, const AttentionScratch& s) {
  const float factor = args.scale * kLog2E;
  uint16_t* out = s.q;
  for (int token = 0; token < args.num_tokens; ++token) {
    const float* q = args.q + token * args.q_stride;
    for (int i = 0; i < args.heads * args.head_dim; ++i) *out++ = to_bf16(q[i] * factor);
  }
}

static void merge_row(const AttentionScratch& s, int row, int head_dim) {
  if (s.tile_l[row] == 0.0f) return;  // masked from end to end; with scores that are NaN the sum is NaN
  const float m = s.tile_m[row] > s.m[row] ? s.tile_m[row] : s.m[row];
  const float keep = exp2_poly(s.m[row] - m), take = exp2_poly(s.tile_m[row] - m);
  float* o = s.o + static_cast<int64_t>(row) * head_dim;
  const float* tile_o = s.tile_o + static_cast<int64_t>(row) * head_dim;
  for (int d = 0; d < head_dim; ++d) o[d] = o[d] * keep + tile_o[d] * take;
  s.l[row] = s.l[row] * keep + s.tile_l[row] * take;
  s.m[row] = m;
}

// The tile's blocks of an int8 cache, one after the other.
static void expand_blocks(const AttentionArgs& args, const int32_t* table, int num_blocks, const AttentionScratch& s) {
  const int64_t count = int64_t{2} * kKvBlock * args.head_dim;
  uint16_t* out = s.kv;
  for (int block = 0; block < num_blocks; ++block, out += count) {
    const auto* codes = reinterpret_cast<const int8_t*>(args.kv + table[block] * args.block_stride);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(float_bits(static_cast<float>(codes[i])) >> 16);
    __builtin_memcpy(s.key_scales + block * kKvBlock, codes + count, kKvBlock * sizeof(float));
    __builtin_memcpy(s.value_scales + block * kKvBlock, codes + count + kKvBlock * sizeof(float),
                     kKvBlock * sizeof(float));
  }
}

// What a query at `position` sees: [first, last].
struct Sight {
  int first, last;
};
static Sight sight_of(const AttentionArgs& args, int position) {
  const int oldest = position - args.window + 1, newest = position + args.window - 1;
  Sight sight{0, position};
  if (args.num_keys > 0) sight.last = args.window > 0 && newest < args.num_keys ? newest : args.num_keys - 1;
  if (args.window > 0 && oldest > 0) sight.first = oldest;
  return sight;
}

// Scores before they are masked: whole numbers times the keys' scales, then the soft cap.
static void adjust_scores(const AttentionArgs& args, float* scores, int count, const float* key_scales) {
  if (args.int8)
    for (int t = 0; t < count; ++t) scores[t] *= key_scales[t];
  if (args.softcap == 0.0f) return;
  const float cap = args.softcap * kLog2E, twice_inverse = 2.0f / cap;
  for (int t = 0; t < count; ++t) scores[t] = cap - 2.0f * cap / (1.0f + exp_poly(scores[t] * twice_inverse));
}

static void attend_tile(const AttentionArgs& args, const AttentionScratch& s, int rows, int tile_start, int last_key) {
  const int in_tile = last_key - tile_start + 1 < kKvTile ? last_key - tile_start + 1 : kKvTile;
  const int num_blocks = (in_tile + kKvBlock - 1) / kKvBlock;
  const int32_t* table = args.table + tile_start / kKvBlock;
  AttentionArgs plain = args;
  int32_t expanded[kKvTile / kKvBlock];
  if (args.int8) {
    expand_blocks(args, table, num_blocks, s);
    plain.kv = s.kv;
    plain.block_stride = int64_t{2} * kKvBlock * args.head_dim;
    for (int block = 0; block < num_blocks; ++block) expanded[block] = block;
    table = expanded;
  }
  score_tile(plain, table, num_blocks, s, rows);
  for (int row = 0; row < rows; ++row) {
    const Sight sight = sight_of(args, args.first_position + row / args.heads);
    float* scores = s.scores + static_cast<int64_t>(row) * kKvTile;
    adjust_scores(args, scores, num_blocks * kKvBlock, s.key_scales);
    softmax_row(scores, s.p + static_cast<int64_t>(row) * kKvTile, num_blocks * kKvBlock, sight.first - tile_start,
                sight.last - tile_start, args.int8 ? s.value_scales : nullptr, &s.tile_m[row], &s.tile_l[row]);
  }
  value_tile(plain, table, num_blocks, s, rows);
  for (int row = 0; row < rows; ++row) merge_row(s, row, args.head_dim);
}

static void attention(const AttentionArgs& args) {
  const AttentionScratch s = carve(args.scratch, args.head_dim);
  const int rows = args.num_tokens * args.heads;
  load_queries(args, s);
  for (int row = 0; row < rows; ++row) {  // a sink has weight 1 from the start
    s.m[row] = args.sinks == nullptr ? -__builtin_inff() : args.sinks[row % args.heads] * kLog2E;
    s.l[row] = args.sinks == nullptr ? 0.0f : 1.0f;
  }
  __builtin_memset(s.o, 0, static_cast<size_t>(rows) * static_cast<size_t>(args.head_dim) * sizeof(float));
  const int first_key = sight_of(args, args.first_position).first;
  const int last_key = sight_of(args, args.first_position + args.num_tokens - 1).last;
  for (int tile = first_key / kKvTile * kKvTile; tile <= last_key; tile += kKvTile)
    attend_tile(args, s, rows, tile, last_key);
  for (int row = 0; row < rows; ++row) {
    const float factor = 1.0f / s.l[row];
    const float* o = s.o + static_cast<int64_t>(row) * args.head_dim;
    float* out = args.out + (row / args.heads) * args.out_stride + (row % args.heads) * args.head_dim;
    for (int d = 0; d < args.head_dim; ++d) out[d] = o[d] * factor;
  }
}
