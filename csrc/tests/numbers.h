// Number formats by definition, in double: the tests' own, sharing nothing with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace llmserve::test {

inline double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 31) return fraction != 0 ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

inline float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline bool bf16_is_denormal(uint16_t bits) { return (bits & 0x7F80) == 0 && (bits & 0x7F) != 0; }

// Nearest, ties to even, by comparing the two neighbours.
inline uint16_t nearest_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto below = static_cast<uint16_t>(bits >> 16);
  if ((bits & 0xFFFF) == 0 || !std::isfinite(value)) return below;
  const auto above = static_cast<uint16_t>(below + 1);
  const uint32_t rest = bits & 0xFFFF;
  if (rest != 0x8000) return rest < 0x8000 ? below : above;
  return below % 2 == 0 ? below : above;
}

// Nearest, ties to even; what is too large becomes the largest half.
inline double nearest_half(double value) {
  if (std::fabs(value) >= 65504.0) return std::copysign(65504.0, value);
  int exponent;
  std::frexp(value, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
  return std::nearbyint(value / unit) * unit;
}

constexpr double kEpsilon = 0x1p-24;    // half a unit in the last place of float, relative
constexpr double kSmallest = 0x1p-126;  // smallest normal float

}  // namespace llmserve::test
