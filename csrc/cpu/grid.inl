// Blocks of every quantized type into codes, scales and minimums (grid.h).
//
// `d` and `m` are little-endian float16. Blocks of 32:
//   q4_0    d | 16 bytes of nibbles               q5_0    d | 4 bytes of fifth bits | 16 bytes of nibbles
//   q4_1    d | m | 16 bytes of nibbles           q5_1    d | m | 4 bytes of fifth bits | 16 bytes of nibbles
//   q8_0    d | 32 signed bytes                   iq4_nl  d | 16 bytes of nibbles, which index the codebook
//   i4_g32, g64, g128  d | nibbles, 16 bytes for each 32 values
//   u4_g32, g64, g128  d | m | the same
// Blocks of 256; their groups have integer scales (and minimums, times m) of 4, 6 or 8 bits that d multiplies:
//   q2_k    16 bytes: low nibble scale, high nibble minimum | 64 bytes of 2 bits | d | m
//   q3_k    32 bytes of third bits | 64 bytes of 2 bits | 12 bytes of scales + 32 | d
//   q4_k    d | m | 12 bytes of scales and minimums | 128 bytes of nibbles
//   q5_k    d | m | 12 bytes of scales and minimums | 32 bytes of fifth bits | 128 bytes of nibbles
//   q6_k    128 bytes of nibbles | 64 bytes of 2 bits | 16 signed bytes: scales | d
//   iq4_xs  d | 8 x 2 high bits of scales + 32 | 8 x 4 low bits | 128 bytes of nibbles, which index the codebook

// `n` bytes: the low nibbles are the first n codes, the high nibbles the next n.
static inline void read_nibbles(const uint8_t* packed, int n, uint8_t* codes) {
  for (int i = 0; i < n; ++i) {
    codes[i] = packed[i] & 15;
    codes[i + n] = packed[i] >> 4;
  }
}

// 64 bytes: each half of the block has 32 of them, whose four pairs of bits belong to 32 consecutive codes each.
static inline void add_pairs(const uint8_t* packed, uint8_t* codes, int shift) {
  for (int half = 0; half < 2; ++half, packed += 32)
    for (int pair = 0; pair < 4; ++pair, codes += 32)
      for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(codes[i] | ((packed[i] >> (2 * pair)) & 3) << shift);
}

// 32 bytes: bit j of byte i belongs to code 32 * j + i.
static inline void add_planes(const uint8_t* packed, uint8_t* codes, int shift) {
  for (int j = 0; j < 8; ++j, codes += 32)
    for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(codes[i] | ((packed[i] >> j) & 1) << shift);
}

// 4 bytes, the fifth bit of 32 codes.
static inline void add_fifth_bits(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(codes[i] | ((packed[i / 8] >> (i % 8)) & 1) << 4);
}

// The codebook of IQ4, plus 128.
static inline void look_up(uint8_t* codes, int n) {
  constexpr uint8_t kBook[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
  for (int i = 0; i < n; ++i) codes[i] = kBook[codes[i]];
}

static inline void fill_zero(uint8_t* codes, int n) {
  for (int i = 0; i < n; ++i) codes[i] = 0;
}

static inline void read_q5(const uint8_t* block, int header, uint8_t* codes) {
  read_nibbles(block + header + 4, 16, codes);
  add_fifth_bits(block + header, codes);
}

static inline void read_q8_0(const uint8_t* block, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] = block[2 + i] ^ 0x80;
}

static inline void read_q2_k(const uint8_t* block, uint8_t* codes, float* scales, float* minimums) {
  const float d = read_f16(block + 80), m = read_f16(block + 82);
  for (int g = 0; g < 16; ++g) {
    scales[g] = d * static_cast<float>(block[g] & 15);
    minimums[g] = -(m * static_cast<float>(block[g] >> 4));
  }
  fill_zero(codes, 256);
  add_pairs(block + 16, codes, 0);
}

// Scales: low nibbles as ever (8 of low nibbles, 8 of high), then bits 4 and 5 of scale g in pair g / 4 of byte g % 4.
static inline void read_q3_k(const uint8_t* block, uint8_t* codes, float* scales) {
  const uint8_t* low = block + 96;
  const uint8_t* high = block + 104;
  const float d = read_f16(block + 108);
  uint8_t nibbles[16];
  read_nibbles(low, 8, nibbles);
  for (int g = 0; g < 16; ++g) {
    const int scale = nibbles[g] | ((high[g % 4] >> (2 * (g / 4))) & 3) << 4;
    scales[g] = d * static_cast<float>(scale - 32);
  }
  fill_zero(codes, 256);
  add_pairs(block + 32, codes, 0);
  add_planes(block, codes, 2);
}

// The 12 bytes of q4_k and q5_k: eight scales and eight minimums of 6 bits. The first four of each are the low 6 bits
// of bytes 0..3 and 4..7, whose top 2 bits are the top bits of the last four; bytes 8..11 hold the latter's low
// nibbles.
static inline void read_k_scales(const uint8_t* block, float* scales, float* minimums) {
  const float d = read_f16(block), m = read_f16(block + 2);
  const uint8_t* packed = block + 4;
  for (int g = 0; g < 4; ++g) {
    const int late_scale = (packed[g + 8] & 15) | (packed[g] >> 6) << 4;
    const int late_minimum = packed[g + 8] >> 4 | (packed[g + 4] >> 6) << 4;
    scales[g] = d * static_cast<float>(packed[g] & 63);
    scales[g + 4] = d * static_cast<float>(late_scale);
    minimums[g] = -(m * static_cast<float>(packed[g + 4] & 63));
    minimums[g + 4] = -(m * static_cast<float>(late_minimum));
  }
}

static inline void read_q4_k(const uint8_t* block, uint8_t* codes, float* scales, float* minimums) {
  read_k_scales(block, scales, minimums);
  for (int i = 0; i < 4; ++i) read_nibbles(block + 16 + 32 * i, 32, codes + 64 * i);
}

static inline void read_q5_k(const uint8_t* block, uint8_t* codes, float* scales, float* minimums) {
  read_k_scales(block, scales, minimums);
  for (int i = 0; i < 4; ++i) read_nibbles(block + 48 + 32 * i, 32, codes + 64 * i);
  add_planes(block + 16, codes, 4);
}

static inline void read_q6_k(const uint8_t* block, uint8_t* codes, float* scales) {
  const float d = read_f16(block + 208);
  for (int g = 0; g < 16; ++g) scales[g] = d * static_cast<float>(static_cast<int8_t>(block[192 + g]));
  for (int half = 0; half < 2; ++half) read_nibbles(block + 64 * half, 64, codes + 128 * half);
  add_pairs(block + 128, codes, 4);
}

static inline void read_iq4_xs(const uint8_t* block, uint8_t* codes, float* scales) {
  const float d = read_f16(block);
  const uint16_t high = read_u16(block + 2);
  for (int g = 0; g < 8; ++g) {
    const int low = (block[4 + g / 2] >> (4 * (g % 2))) & 15;
    scales[g] = d * static_cast<float>((low | ((high >> (2 * g)) & 3) << 4) - 32);
    read_nibbles(block + 8 + 16 * g, 16, codes + 32 * g);
  }
  look_up(codes, 256);
}

static inline void read_int4(const uint8_t* packed, int n, uint8_t* codes) {
  for (int i = 0; i < n / 32; ++i) read_nibbles(packed + 16 * i, 16, codes + 32 * i);
}

// One block; minimums are written for types that have them.
static inline void read_block(DType type, const uint8_t* block, uint8_t* codes, float* scales, float* minimums) {
  if (block_values(type) < 256) scales[0] = read_f16(block);
  switch (type) {
    case DType::kQ4_0: read_nibbles(block + 2, 16, codes); return;
    case DType::kQ4_1:
      read_nibbles(block + 4, 16, codes);
      minimums[0] = read_f16(block + 2);
      return;
    case DType::kQ5_0: read_q5(block, 2, codes); return;
    case DType::kQ5_1:
      read_q5(block, 4, codes);
      minimums[0] = read_f16(block + 2);
      return;
    case DType::kQ8_0: read_q8_0(block, codes); return;
    case DType::kIQ4_NL:
      read_nibbles(block + 2, 16, codes);
      look_up(codes, 32);
      return;
    case DType::kI4_G32:
    case DType::kI4_G64:
    case DType::kI4_G128: read_int4(block + 2, block_values(type), codes); return;
    case DType::kU4_G32:
    case DType::kU4_G64:
    case DType::kU4_G128:
      read_int4(block + 4, block_values(type), codes);
      minimums[0] = read_f16(block + 2);
      return;
    case DType::kQ2_K: read_q2_k(block, codes, scales, minimums); return;
    case DType::kQ3_K: read_q3_k(block, codes, scales); return;
    case DType::kQ4_K: read_q4_k(block, codes, scales, minimums); return;
    case DType::kQ5_K: read_q5_k(block, codes, scales, minimums); return;
    case DType::kQ6_K: read_q6_k(block, codes, scales); return;
    case DType::kIQ4_XS: read_iq4_xs(block, codes, scales); return;
    default: return;
  }
}
