#include "tests/blocks.h"

#include <stdexcept>

#include "tests/numbers.h"

namespace llmserve::test {

namespace {

double half_at(const uint8_t* place) { return half_value(static_cast<uint16_t>(place[0] | (place[1] << 8))); }

// `count` bits from bit `first` of the bytes on.
int bits_at(const uint8_t* bytes, int first, int count) {
  int found = 0;
  for (int i = 0; i < count; ++i) found |= ((bytes[(first + i) / 8] >> ((first + i) % 8)) & 1) << i;
  return found;
}

// Nibbles in runs of `run` bytes: low ones first.
int nibble(const uint8_t* bytes, int run, int i) {
  const int within = i % (2 * run);
  return bits_at(bytes, 8 * (i / (2 * run) * run + within % run) + (within < run ? 0 : 4), 4);
}
int pair(const uint8_t* bytes, int i) { return bits_at(bytes, 8 * (i / 128 * 32 + i % 32) + 2 * (i % 128 / 32), 2); }
int plane(const uint8_t* bytes, int i) { return bits_at(bytes, 8 * (i % 32) + i / 32, 1); }

// Scale and minimum `g` of the twelve bytes of q4_k and q5_k.
int k_scale(const uint8_t* bytes, int g) {
  return g < 4 ? bits_at(bytes, 8 * g, 6) : bits_at(bytes, 8 * (g + 4), 4) + 16 * bits_at(bytes, 8 * (g - 4) + 6, 2);
}
int k_minimum(const uint8_t* bytes, int g) {
  return g < 4 ? bits_at(bytes, 8 * (g + 4), 6)
               : bits_at(bytes, 8 * (g + 4) + 4, 4) + 16 * bits_at(bytes, 8 * g + 6, 2);
}
double with_minimum(const uint8_t* block, int code, int i) {
  return half_at(block) * k_scale(block + 4, i / 32) * code - half_at(block + 2) * k_minimum(block + 4, i / 32);
}

double q3_k_value(const uint8_t* block, int i) {
  const int g = i / 16;
  const int scale = nibble(block + 96, 8, g) + 16 * bits_at(block + 104, 8 * (g % 4) + 2 * (g / 4), 2) - 32;
  return half_at(block + 108) * scale * (pair(block + 32, i) + (plane(block, i) != 0 ? 0 : -4));
}

double iq4_xs_value(const uint8_t* block, int i) {
  const int g = i / 32;
  const int scale = bits_at(block + 4, 4 * g, 4) + 16 * bits_at(block + 2, 2 * g, 2) - 32;
  return half_at(block) * scale * codebook_value(nibble(block + 8, 16, i));
}

}  // namespace

int codebook_value(int code) {
  constexpr int kValues[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return kValues[code];
}

double block_value(DType dtype, const uint8_t* block, int i) {
  const double d = half_at(block), m = half_at(block + 2);
  switch (dtype) {
    case DType::kQ4_0: return d * (nibble(block + 2, 16, i) - 8);
    case DType::kQ4_1: return d * nibble(block + 4, 16, i) + m;
    case DType::kQ5_0: return d * (nibble(block + 6, 16, i) + 16 * bits_at(block + 2, i, 1) - 16);
    case DType::kQ5_1: return d * (nibble(block + 8, 16, i) + 16 * bits_at(block + 4, i, 1)) + m;
    case DType::kQ8_0: return d * static_cast<int8_t>(block[2 + i]);
    case DType::kIQ4_NL: return d * codebook_value(nibble(block + 2, 16, i));
    case DType::kQ2_K:
      return half_at(block + 80) * bits_at(block, 8 * (i / 16), 4) * pair(block + 16, i) -
             half_at(block + 82) * bits_at(block, 8 * (i / 16) + 4, 4);
    case DType::kQ3_K: return q3_k_value(block, i);
    case DType::kQ4_K: return with_minimum(block, nibble(block + 16, 32, i), i);
    case DType::kQ5_K: return with_minimum(block, nibble(block + 48, 32, i) + 16 * plane(block + 16, i), i);
    case DType::kQ6_K:
      return half_at(block + 208) * static_cast<int8_t>(block[192 + i / 16]) *
             (nibble(block, 64, i) + 16 * pair(block + 128, i) - 32);
    case DType::kIQ4_XS: return iq4_xs_value(block, i);
    case DType::kI4_G32:
    case DType::kI4_G64:
    case DType::kI4_G128: return d * (nibble(block + 2, 16, i) - 8);
    case DType::kU4_G32:
    case DType::kU4_G64:
    case DType::kU4_G128: return d * nibble(block + 4, 16, i) + m;
    default: throw std::invalid_argument(dtype_name(dtype));
  }
}

std::vector<size_t> half_offsets(DType dtype) {
  switch (dtype) {
    case DType::kQ4_1:
    case DType::kQ5_1:
    case DType::kQ4_K:
    case DType::kQ5_K:
    case DType::kU4_G32:
    case DType::kU4_G64:
    case DType::kU4_G128: return {0, 2};
    case DType::kQ2_K: return {80, 82};
    case DType::kQ3_K: return {108};
    case DType::kQ6_K: return {208};
    default: return {0};
  }
}

}  // namespace llmserve::test
