// Conversions between float formats; included into the namespace of each ISA's translation unit.
#pragma once

static inline uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
static inline float bits_float(uint32_t x) { return __builtin_bit_cast(float, x); }

// Round to nearest even; the payload of a NaN is kept non-zero.
static inline uint16_t to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}
static inline float from_bf16(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }

static inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  if ((h & 0x7C00u) == 0x7C00u) return bits_float(sign | magnitude | 0x7F800000u);
  // Scaling by 2^112 moves the exponent bias and normalizes denormals exactly.
  return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));
}

static inline uint16_t read_u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | (p[1] << 8)); }
static inline float read_f16(const uint8_t* p) { return from_f16(read_u16(p)); }
