// A fast checksum that finds damage, not forgery: 64 bits over eight interleaved lanes, as fast as memory is read.
//
// Every step is invertible in the lane and in the word, so a change within one lane is always found; others are missed
// with a chance of 2^-64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace llmserve {

constexpr uint64_t kChecksumPrime = 0x9E3779B185EBCA87ull;

inline uint64_t checksum_step(uint64_t state, uint64_t word) {
  const uint64_t mixed = (state ^ word) * kChecksumPrime;
  return mixed << 31 | mixed >> 33;
}

inline uint64_t checksum(const uint8_t* data, size_t num_bytes) {
  uint64_t lane[8];
  for (uint64_t i = 0; i < 8; ++i) lane[i] = (i + 1) * kChecksumPrime;
  size_t at = 0;
  for (; at + 64 <= num_bytes; at += 64) {
    uint64_t word[8];
    std::memcpy(word, data + at, 64);
    for (int i = 0; i < 8; ++i) lane[i] = checksum_step(lane[i], word[i]);
  }
  uint64_t last[8] = {};
  if (at < num_bytes) std::memcpy(last, data + at, num_bytes - at);
  uint64_t state = num_bytes;
  for (int i = 0; i < 8; ++i) state = checksum_step(state, checksum_step(lane[i], last[i]));
  return state;
}

}  // namespace llmserve
