// GEMM tiles in plain C++, included after elementwise.inl: the scalar twins, and what an ISA without intrinsics of its
// own for a kernel falls back on. `fused` is the ISA's fused multiply-add; every ISA uses the same form.

static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

static inline const GroupMeta* meta_row(const GroupMeta* meta, int64_t columns, int row) {
  return meta + row * (padded_columns(columns) / kGroup);
}

// Codes of a block's groups as bytes [step][channel][k], looked up where the format has a codebook.
static void unpack_codes(PackedFormat format, const uint8_t* codes, uint8_t* out) {
  if (format.bits == 8) {
    __builtin_memcpy(out, codes, kByteBytes);
    return;
  }
  for (size_t i = 0; i < kNibbleBytes; ++i) {
    out[i] = codes[i] & 15;
    out[i + kNibbleBytes] = codes[i] >> 4;
  }
  for (int plane = 0; plane < format.bits - 4; ++plane) {
    const uint8_t* bits = codes + kNibbleBytes + static_cast<size_t>(plane) * kPlaneBytes;
    for (size_t i = 0; i < kByteBytes; ++i)
      out[i] = static_cast<uint8_t>(out[i] | ((bits[i / 8] >> (i % 8)) & 1) << (4 + plane));
  }
  if (format.codebook)
    for (size_t i = 0; i < kByteBytes; ++i) out[i] = kCodebook[out[i]];
}

static void unpack(PackedType type, const uint8_t* block, int64_t num_groups, uint8_t* out) {
  const PackedFormat format = packed_format(type);
  for (int64_t group = 0; group < num_groups; group += block_groups(format)) {
    for (int i = 0; i < block_groups(format); ++i, block += codes_bytes(format.bits), out += kByteBytes)
      unpack_codes(format, block, out);
    __builtin_memcpy(out, block, tables_bytes(format));
    block += tables_bytes(format);
    out += tables_bytes(format);
  }
}

static inline void dot_step(const uint8_t* codes, const int8_t* x, int32_t* sums) {
  for (int c = 0; c < kTile; ++c)
    for (int i = 0; i < 4; ++i) sums[c] += static_cast<int32_t>(codes[4 * c + i]) * x[i];
}

static void clear(float* acc) {
  for (int c = 0; c < kTile; ++c) acc[c] = 0.0f;
}

// Integer sums of the steps [from, to) of one group of codes in bytes: the high parts of one step; the zero
// point; the dot products.
static void group_sums(PackedFormat format, const uint8_t* codes, const GroupMeta& meta, const int8_t* x, int from,
                       int to, int32_t* sums) {
  for (int c = 0; c < kTile; ++c) sums[c] = 0;
  if (meta.high_step >= from && meta.high_step < to) {
    int8_t high[4];
    __builtin_memcpy(high, &meta.high, 4);
    dot_step(codes + meta.high_step * kTile * 4, high, sums);
  }
  int32_t negative_sum = meta.negative_sum;
  if (format.group == 16) negative_sum = from == 0 ? meta.negative_first_sum : negative_sum - meta.negative_first_sum;
  const int32_t zero = format.minimum ? 0 : negative_sum * (1 << format.zero_shift);
  for (int c = 0; c < kTile; ++c) sums[c] = sums[c] * (1 << kHighShift) + zero;
  for (int step = from; step < to; ++step) dot_step(codes + step * kTile * 4, x + step * 4, sums);
}

// Groups of up to 32: acc += scale_w * scale_x * sum (+ minimum * sum of x).
static void add_scaled(PackedFormat format, const int32_t* sums, const uint8_t* tables, int part, const GroupMeta& meta,
                       float* acc) {
  const uint8_t* scales = tables + static_cast<size_t>(part) * kTableBytes;
  const uint8_t* minimums = scales + static_cast<size_t>(block_parts(format)) * kTableBytes;
  const float sum = format.group != 16 ? meta.scaled_sum : part == 0 ? meta.scaled_first_sum : meta.scaled_second_sum;
  for (int c = 0; c < kTile; ++c) {
    acc[c] = fused(static_cast<float>(sums[c]), from_f16(read_u16(scales + 2 * c)) * meta.scale, acc[c]);
    if (format.minimum) acc[c] = fused(from_f16(read_u16(minimums + 2 * c)), sum, acc[c]);
  }
}

// One block of codes in bytes times one row.
static void add_block(PackedFormat format, const uint8_t* block, const GroupMeta* meta, const int8_t* x, float* acc) {
  const uint8_t* tables = block + static_cast<size_t>(block_groups(format)) * kByteBytes;
  const int width = kGroup / 4 / block_parts(format);
  int32_t sums[kTile];
  if (format.group <= kGroup) {
    for (int part = 0; part < block_parts(format); ++part) {
      group_sums(format, block, *meta, x, part * width, (part + 1) * width, sums);
      add_scaled(format, sums, tables, part, *meta, acc);
    }
    return;
  }
  float parts[kTile], sum = 0.0f;
  clear(parts);
  for (int i = 0; i < block_groups(format); ++i) {
    group_sums(format, block + static_cast<size_t>(i) * kByteBytes, meta[i], x + i * kGroup, 0, width, sums);
    for (int c = 0; c < kTile; ++c) parts[c] = fused(static_cast<float>(sums[c]), meta[i].scale, parts[c]);
    sum += meta[i].scaled_sum;
  }
  for (int c = 0; c < kTile; ++c) {
    acc[c] = fused(parts[c], from_f16(read_u16(tables + 2 * c)), acc[c]);
    if (format.minimum) acc[c] = fused(from_f16(read_u16(tables + kTableBytes + 2 * c)), sum, acc[c]);
  }
}

static void gemm_blocks(const TileArgs& args, PackedFormat format) {
  const int64_t stride = padded_columns(args.x.columns), end = args.first_group + args.num_groups;
  const int count = block_groups(format);
  for (int row = 0; row < args.rows; ++row) {
    const GroupMeta* meta = meta_row(args.x.q8_meta, args.x.columns, row);
    const int8_t* x = args.x.q8 + row * stride;
    float* acc = args.out + row * args.out_stride;
    if (args.first_group == 0) clear(acc);
    const uint8_t* block = args.weights;
    for (int64_t group = args.first_group; group < end; group += count, block += packed_block_bytes(format))
      add_block(format, block, meta + group, x + group * kGroup, acc);
  }
}

template <PackedType kType>
static void gemm_unpacked(const TileArgs& args) {
  gemm_blocks(args, unpacked(packed_format(kType)));
}

// The same on packed codes, block by block.
template <PackedType kType>
static void gemm_packed(const TileArgs& args) {
  constexpr PackedFormat kFormat = packed_format(kType);
  constexpr int kCount = block_groups(kFormat);
  alignas(64) uint8_t bytes[packed_block_bytes(unpacked(kFormat))];
  TileArgs one = args;
  one.weights = bytes;
  one.num_groups = kCount;
  const uint8_t* block = args.weights;
  for (int64_t group = 0; group < args.num_groups; group += kCount, block += packed_block_bytes(kFormat)) {
    unpack(kType, block, kCount, bytes);
    one.first_group = args.first_group + group;
    gemm_blocks(one, unpacked(kFormat));
  }
}

static void gemm_i8(const TileArgs& args) {
  const int64_t stride = padded_columns(args.x.columns), steps = (args.x.columns + 3) / 4;
  for (int row = 0; row < args.rows; ++row) {
    const RowMeta& meta = args.x.i8_meta[row];
    int32_t sums[kTile];
    for (int c = 0; c < kTile; ++c) sums[c] = meta.negative_sum * 128;
    for (int64_t step = 0; step < steps; ++step)
      dot_step(args.weights + step * kTile * 4, args.x.i8 + row * stride + step * 4, sums);
    const uint8_t* scales = args.weights + steps * kTile * 4;
    for (int c = 0; c < kTile; ++c) {
      float scale_;
      __builtin_memcpy(&scale_, scales + 4 * c, 4);
      args.out[row * args.out_stride + c] = static_cast<float>(sums[c]) * (scale_ * meta.scale);
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

static void gemm_f32(const TileArgs& args) {
  const int64_t first = args.first_group * kGroup;
  const int64_t left = args.x.columns - first,
                count = args.num_groups * kGroup < left ? args.num_groups * kGroup : left;
  for (int row = 0; row < args.rows; ++row) {
    const float* x = args.x.f32 + row * args.x.columns + first;
    const float* w = reinterpret_cast<const float*>(args.weights);
    float* acc = args.out + row * args.out_stride;
    if (first == 0) clear(acc);
    for (int64_t k = 0; k < count; ++k, w += kTile)
      for (int c = 0; c < kTile; ++c) acc[c] = fused(w[c], x[k], acc[c]);
  }
}

// scale * (code - zero point) + minimum, [k][64].
static void dequantize_tile(PackedType type, const uint8_t* block, int64_t num_groups, float* out) {
  const PackedFormat format = packed_format(type);
  const float zero = static_cast<float>(zero_point(format));
  const int parts = block_parts(format);
  uint8_t codes[kByteBytes];
  for (int64_t group = 0; group < num_groups; group += block_groups(format), block += packed_block_bytes(format)) {
    const uint8_t* tables = block + static_cast<size_t>(block_groups(format)) * codes_bytes(format.bits);
    for (int i = 0; i < block_groups(format); ++i) {
      unpack_codes(format, block + static_cast<size_t>(i) * codes_bytes(format.bits), codes);
      for (int k = 0; k < kGroup; ++k, out += kTile) {
        const uint8_t* scales = tables + static_cast<size_t>(k * parts / kGroup) * kTableBytes;
        const uint8_t* minimums = scales + static_cast<size_t>(parts) * kTableBytes;
        for (int c = 0; c < kTile; ++c) {
          const float code = static_cast<float>(codes[k / 4 * kTile * 4 + 4 * c + k % 4]) - zero;
          const float scaled = code * from_f16(read_u16(scales + 2 * c));
          out[c] = format.minimum ? scaled + from_f16(read_u16(minimums + 2 * c)) : scaled;
        }
      }
    }
  }
}

template <PackedType kType>
static void fill_type(KernelTable& table) {
  constexpr int kBits = packed_format(kType).bits;
  table.direct_rows[static_cast<size_t>(kType)] = kBits == 4 ? 32 : kBits == 6 ? 2 : 8;
  table.gemm_packed[static_cast<size_t>(kType)] = gemm_packed<kType>;
  table.gemm_unpacked[static_cast<size_t>(kType)] = gemm_unpacked<kType>;
}

static void fill_plain(KernelTable& table, PackedType type, TileFunction gemm) {
  table.gemm_packed[static_cast<size_t>(type)] = gemm;
  table.gemm_unpacked[static_cast<size_t>(type)] = gemm;
}

static void fill_gemm(KernelTable& table) {
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
  fill_plain(table, PackedType::kI8, gemm_i8);
  fill_plain(table, PackedType::kBF16, gemm_bf16);
  fill_plain(table, PackedType::kF32, gemm_f32);
  table.unpack = unpack;
  table.dequantize_tile = dequantize_tile;
}
