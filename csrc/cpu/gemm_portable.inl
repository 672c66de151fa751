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
      for (int c = 0; c < kTile; ++c) sums[c] = -args.zero_point * meta[g].sum;
      for (int step = 0; step < 8; ++step)
        dot_step(group + (step % 4) * 256, step < 4 ? 0 : 4, 15, x + g * kGroup + step * 4, sums);
      add_group(sums, group + kNibbleBytes, args.minimum, meta[g], acc);
    }
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
      for (int c = 0; c < kTile; ++c) sums[c] = -args.zero_point * meta[g].sum;
      for (int step = 0; step < 8; ++step) dot_step(group + step * 256, 0, 255, x + g * kGroup + step * 4, sums);
      add_group(sums, group + kByteBytes, args.minimum, meta[g], acc);
    }
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

static void gemm_codes_bf16(const TileArgs& args) {
  for (int row = 0; row < args.rows; ++row) {
    const uint16_t* x = args.x.bf16 + row * padded_columns(args.x.columns);
    const GroupMeta* meta = meta_row(args.x.bf16_meta, args.x.columns, row);
    float* acc = args.out + row * args.out_stride;
    clear(acc);
    for (int64_t g = 0; g < args.x.columns / kGroup; ++g) {
      const uint8_t* tables = args.tables + g * args.table_stride;
      float sums[kTile];
      clear(sums);
      dot_pairs(reinterpret_cast<const uint16_t*>(args.weights) + g * kTile * kGroup, x + g * kGroup, kGroup / 2, sums);
      for (int c = 0; c < kTile; ++c) {
        acc[c] = fused(sums[c], from_f16(read_u16(tables + 2 * c)), acc[c]);
        if (args.minimum)
          acc[c] = fused(from_f16(read_u16(tables + kTableBytes + 2 * c)), meta[g].scaled_sum, acc[c]);
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

// Codes minus zero point are at most 8 bits wide, so bf16 holds them exactly.
static void unpack_codes_bf16(const uint8_t* tile, uint16_t* out, int64_t groups, PackedType type) {
  const int zero = zero_point(type);
  for (int64_t g = 0; g < groups; ++g, tile += group_bytes(type), out += kTile * kGroup) {
    for (int k = 0; k < kGroup; ++k) {
      const int step = k / 4, byte = k % 4;
      const bool nibbles = type != PackedType::kQ8_0;
      const uint8_t* codes = tile + (nibbles ? step % 4 : step) * 256 + byte;
      for (int c = 0; c < kTile; ++c) {
        const int raw = codes[4 * c];
        const int code = !nibbles ? raw : step < 4 ? raw & 15 : raw >> 4;
        out[(k / 2) * 2 * kTile + 2 * c + k % 2] = to_bf16(static_cast<float>(code - zero));
      }
    }
  }
}

static void fill_gemm(KernelTable& table) {
  table.gemm_q4 = gemm_q4;
  table.gemm_u8 = gemm_u8;
  table.gemm_bf16 = gemm_bf16;
  table.gemm_f32 = gemm_f32;
  table.gemm_codes_bf16 = gemm_codes_bf16;
  table.unpack_q4 = unpack_q4;
  table.unpack_codes_bf16 = unpack_codes_bf16;
}
