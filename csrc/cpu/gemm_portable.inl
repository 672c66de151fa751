// GEMM tiles in plain C++, included after elementwise.inl: the scalar twins, and what an ISA without intrinsics of its
// own for a kernel falls back on. `fused` is the ISA's fused multiply-add; every ISA uses the same form.

static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

static inline const GroupMeta* meta_row(const GroupMeta* meta, int64_t columns, int row) {
  return meta + row * (padded_columns(columns) / kGroup);
}

// Adds one group's integer sums to the row's floats: acc += scale_w * scale_x * sum (+ minimum * sum of x).
static void add_group(const int32_t* sums, const uint8_t* tables, bool minimum, const GroupMeta& meta, float* acc) {
  for (int c = 0; c < kTile; ++c) {
    const float w_scale = from_f16(read_u16(tables + 2 * c));
    acc[c] = fused(static_cast<float>(sums[c]), w_scale * meta.scale, acc[c]);
    if (minimum) acc[c] = fused(from_f16(read_u16(tables + kTableBytes + 2 * c)), meta.scaled_sum, acc[c]);
  }
}

static inline void dot_step(const uint8_t* codes, int shift, uint32_t mask, const int8_t* x, int32_t* sums) {
  for (int c = 0; c < kTile; ++c)
    for (int i = 0; i < 4; ++i)
      sums[c] += static_cast<int32_t>((static_cast<uint32_t>(codes[4 * c + i]) >> shift) & mask) * x[i];
}

static void clear(float* acc) {
  for (int c = 0; c < kTile; ++c) acc[c] = 0.0f;
}

// Adds what was kept out of the codes: acc += weight * value for each outlier, groups ascending.
static void add_outliers(const TileArgs& args, bool nibbles, const GroupMeta* meta, float* acc) {
  const size_t codes_bytes_ = nibbles ? kNibbleBytes : kByteBytes;
  const size_t stride = codes_bytes_ + kTableBytes * (args.minimum ? 2 : 1);
  for (int64_t g = 0; g < args.x.columns / kGroup; ++g) {
    if (meta[g].value == 0.0f) continue;
    const int step = meta[g].outlier / 4;
    const uint8_t* group = args.weights + static_cast<size_t>(g) * stride;
    const uint8_t* codes = group + (nibbles ? step % 4 : step) * 256 + meta[g].outlier % 4;
    const int shift = nibbles && step >= 4 ? 4 : 0, mask = nibbles ? 15 : 255;
    for (int c = 0; c < kTile; ++c) {
      const float code = static_cast<float>(((codes[4 * c] >> shift) & mask) - args.zero_point);
      acc[c] = fused(code * from_f16(read_u16(group + codes_bytes_ + 2 * c)), meta[g].value, acc[c]);
    }
  }
}

static void gemm_q4(const TileArgs& args) {
  const int64_t stride = static_cast<int64_t>(kNibbleBytes + kTableBytes * (args.minimum ? 2 : 1));
  for (int row = 0; row < args.rows; ++row) {
    const int8_t* x = args.x.q8 + row * padded_columns(args.x.columns);
    const GroupMeta* meta = meta_row(args.x.q8_meta, args.x.columns, row);
    float* acc = args.out + row * args.out_stride;
    clear(acc);
    for (int64_t g = 0; g < args.x.columns / kGroup; ++g) {
      const uint8_t* group = args.weights + g * stride;
      int32_t sums[kTile];
      for (int c = 0; c < kTile; ++c) sums[c] = -args.zero_point * static_cast<int32_t>(meta[g].sum);
      for (int step = 0; step < 8; ++step)
        dot_step(group + (step % 4) * 256, step < 4 ? 0 : 4, 15, x + g * kGroup + step * 4, sums);
      add_group(sums, group + kNibbleBytes, args.minimum, meta[g], acc);
    }
    add_outliers(args, true, meta, acc);
  }
}

static void gemm_u8(const TileArgs& args) {
  const int64_t stride = static_cast<int64_t>(unpacked_group_bytes(args.minimum));
  for (int row = 0; row < args.rows; ++row) {
    const int8_t* x = args.x.q8 + row * padded_columns(args.x.columns);
    const GroupMeta* meta = meta_row(args.x.q8_meta, args.x.columns, row);
    float* acc = args.out + row * args.out_stride;
    clear(acc);
    for (int64_t g = 0; g < args.x.columns / kGroup; ++g) {
      const uint8_t* group = args.weights + g * stride;
      int32_t sums[kTile];
      for (int c = 0; c < kTile; ++c) sums[c] = -args.zero_point * static_cast<int32_t>(meta[g].sum);
      for (int step = 0; step < 8; ++step) dot_step(group + step * 256, 0, 255, x + g * kGroup + step * 4, sums);
      add_group(sums, group + kByteBytes, args.minimum, meta[g], acc);
    }
    add_outliers(args, false, meta, acc);
  }
}

// acc += pairs [k2][64][2] . x, one fused multiply-add per k.
static inline void dot_pairs(const uint16_t* pairs, const uint16_t* x, int64_t steps, float* acc) {
  for (int64_t k2 = 0; k2 < steps; ++k2, pairs += 2 * kTile) {
    const float x0 = from_bf16(x[2 * k2]), x1 = from_bf16(x[2 * k2 + 1]);
    for (int c = 0; c < kTile; ++c)
      acc[c] = fused(from_bf16(pairs[2 * c + 1]), x1, fused(from_bf16(pairs[2 * c]), x0, acc[c]));
  }
}

static void gemm_bf16(const TileArgs& args) {
  for (int row = 0; row < args.rows; ++row) {
    float* acc = args.out + row * args.out_stride;
    clear(acc);
    dot_pairs(reinterpret_cast<const uint16_t*>(args.weights), args.x.bf16 + row * padded_columns(args.x.columns),
              (args.x.columns + 1) / 2, acc);
  }
}

static inline float group_sum(const float* x) {
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = x[j] + x[j + kLanes];
  return reduce_lanes(lanes);
}

static void gemm_u8_f32(const TileArgs& args) {
  const int64_t stride = static_cast<int64_t>(unpacked_group_bytes(args.minimum));
  for (int row = 0; row < args.rows; ++row) {
    const float* x = args.x.f32 + row * args.x.columns;
    float* acc = args.out + row * args.out_stride;
    clear(acc);
    for (int64_t g = 0; g < args.x.columns / kGroup; ++g, x += kGroup) {
      const uint8_t* group = args.weights + g * stride;
      const uint8_t* tables = group + kByteBytes;
      float sums[kTile];
      clear(sums);
      for (int k = 0; k < kGroup; ++k)
        for (int c = 0; c < kTile; ++c)
          sums[c] = fused(static_cast<float>(group[(k / 4) * 256 + 4 * c + k % 4] - args.zero_point), x[k], sums[c]);
      const float x_sum = args.minimum ? group_sum(x) : 0.0f;
      for (int c = 0; c < kTile; ++c) {
        acc[c] = fused(sums[c], from_f16(read_u16(tables + 2 * c)), acc[c]);
        if (args.minimum) acc[c] = fused(from_f16(read_u16(tables + kTableBytes + 2 * c)), x_sum, acc[c]);
      }
    }
  }
}

static void gemm_f32(const TileArgs& args) {
  for (int row = 0; row < args.rows; ++row) {
    const float* x = args.x.f32 + row * args.x.columns;
    const float* w = reinterpret_cast<const float*>(args.weights);
    float* acc = args.out + row * args.out_stride;
    clear(acc);
    for (int64_t k = 0; k < args.x.columns; ++k, w += kTile)
      for (int c = 0; c < kTile; ++c) acc[c] = fused(w[c], x[k], acc[c]);
  }
}

static void unpack_q4(const uint8_t* tile, uint8_t* out, int64_t groups, bool minimum) {
  const size_t tables = kTableBytes * (minimum ? 2 : 1);
  for (int64_t g = 0; g < groups; ++g, tile += kNibbleBytes + tables, out += kByteBytes + tables) {
    for (size_t i = 0; i < kNibbleBytes; ++i) {
      out[i] = tile[i] & 15;
      out[i + kNibbleBytes] = tile[i] >> 4;
    }
    __builtin_memcpy(out + kByteBytes, tile + kNibbleBytes, tables);
  }
}

static void fill_gemm(KernelTable& table) {
  table.gemm_q4 = gemm_q4;
  table.gemm_u8 = gemm_u8;
  table.gemm_bf16 = gemm_bf16;
  table.gemm_f32 = gemm_f32;
  table.gemm_u8_f32 = gemm_u8_f32;
  table.unpack_q4 = unpack_q4;
}
