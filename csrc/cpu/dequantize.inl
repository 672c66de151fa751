// A row of any stored type as float32: plain types converted, quantized types through their grid (grid.inl).

static inline void dequantize_group(const uint8_t* codes, const GridSpec& spec, float scale, float minimum,
                                    float* out) {
  for (int i = 0; i < spec.group; ++i) out[i] = scale * static_cast<float>(codes[i] - spec.zero_point);
  if (spec.minimum)  // adding 0 would lose the sign of -0
    for (int i = 0; i < spec.group; ++i) out[i] += minimum;
}

static void dequantize_blocks(DType type, const uint8_t* row, float* out, int64_t n) {
  const GridSpec spec = grid_spec(type);
  const int values = block_values(type);
  uint8_t codes[kMaxBlockValues];
  float scales[kMaxBlockGroups], minimums[kMaxBlockGroups] = {};
  for (int64_t b = 0; b < n / values; ++b, row += block_bytes(type)) {
    read_block(type, row, codes, scales, minimums);
    for (int at = 0; at < values; at += spec.group, out += spec.group)
      dequantize_group(codes + at, spec, scales[at / spec.group], minimums[at / spec.group], out);
  }
}

static void dequantize(DType type, const uint8_t* row, float* out, int64_t n) {
  switch (type) {
    case DType::kF32: __builtin_memcpy(out, row, static_cast<size_t>(n) * 4); return;
    case DType::kF16:
      for (int64_t i = 0; i < n; ++i) out[i] = read_f16(row + 2 * i);
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(read_u16(row + 2 * i));
      return;
    case DType::kI8: {
      float channel_scale;
      __builtin_memcpy(&channel_scale, row + n, 4);
      for (int64_t i = 0; i < n; ++i) out[i] = channel_scale * static_cast<float>(static_cast<int8_t>(row[i]));
      return;
    }
    default: dequantize_blocks(type, row, out, n); return;
  }
}
