// SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, 2012): a hash that nobody without the key can steer.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace llmserve {

struct Hash128 {
  uint64_t low = 0, high = 0;
  friend bool operator==(const Hash128&, const Hash128&) = default;
};

// For tables: every bit of a hash is as good as any other.
struct LowBits {
  size_t operator()(const Hash128& hash) const { return hash.low; }
};

class SipHash {
 public:
  explicit SipHash(const Hash128& key)
      : v_{0x736f6d6570736575 ^ key.low, 0x646f72616e646f6d ^ key.high ^ 0xee, 0x6c7967656e657261 ^ key.low,
           0x7465646279746573 ^ key.high} {}

  Hash128 hash(const void* data, size_t num_bytes) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i + 8 <= num_bytes; i += 8) absorb(word(bytes + i, 8));
    absorb(word(bytes + num_bytes / 8 * 8, num_bytes % 8) | uint64_t{num_bytes} << 56);
    v_[2] ^= 0xee;
    const uint64_t low = squeeze();
    v_[1] ^= 0xdd;
    return {low, squeeze()};
  }

 private:
  static_assert(std::endian::native == std::endian::little, "words are read as they lie");

  static uint64_t word(const uint8_t* bytes, size_t count) {
    uint64_t value = 0;
    std::memcpy(&value, bytes, count);
    return value;
  }
  void absorb(uint64_t message) {
    v_[3] ^= message;
    for (int i = 0; i < 2; ++i) mix();
    v_[0] ^= message;
  }
  uint64_t squeeze() {
    for (int i = 0; i < 4; ++i) mix();
    return v_[0] ^ v_[1] ^ v_[2] ^ v_[3];
  }
  void mix() {
    v_[0] += v_[1];
    v_[2] += v_[3];
    v_[1] = std::rotl(v_[1], 13) ^ v_[0];
    v_[3] = std::rotl(v_[3], 16) ^ v_[2];
    v_[0] = std::rotl(v_[0], 32) + v_[3];
    v_[2] += v_[1];
    v_[3] = std::rotl(v_[3], 21) ^ v_[0];
    v_[1] = std::rotl(v_[1], 17) ^ v_[2];
    v_[2] = std::rotl(v_[2], 32);
  }

  std::array<uint64_t, 4> v_;
};

}  // namespace llmserve
