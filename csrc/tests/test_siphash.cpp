// SipHash-2-4-128 against the vectors its authors published: key 00 01 .. 0f, messages of 0, 1, 2, .. bytes 00 01 ..
#include <array>
#include <cstring>

#include "core/siphash.h"
#include "tests/check.h"

namespace llmserve::test {

namespace {

std::array<uint8_t, 16> hash_of_counting_bytes(size_t length) {
  std::array<uint8_t, 64> bytes;
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i);
  Hash128 key;
  std::memcpy(&key, bytes.data(), sizeof(key));
  const Hash128 hash = SipHash(key).hash(bytes.data(), length);
  std::array<uint8_t, 16> out;
  std::memcpy(out.data(), &hash, sizeof(hash));
  return out;
}

}  // namespace

TEST(siphash_equals_published_vectors) {
  using Digest = std::array<uint8_t, 16>;
  CHECK(hash_of_counting_bytes(0) == (Digest{0xa3, 0x81, 0x7f, 0x04, 0xba, 0x25, 0xa8, 0xe6,  //
                                             0x6d, 0xf6, 0x72, 0x14, 0xc7, 0x55, 0x02, 0x93}));
  CHECK(hash_of_counting_bytes(1) == (Digest{0xda, 0x87, 0xc1, 0xd8, 0x6b, 0x99, 0xaf, 0x44,  //
                                             0x34, 0x76, 0x59, 0x11, 0x9b, 0x22, 0xfc, 0x45}));
  CHECK(hash_of_counting_bytes(2) == (Digest{0x81, 0x77, 0x22, 0x8d, 0xa4, 0xa4, 0x5d, 0xc7,  //
                                             0xfc, 0xa3, 0x8b, 0xde, 0xf6, 0x0a, 0xff, 0xe4}));
}

TEST(siphash_depends_on_key_and_length) {
  const uint64_t words[4] = {1, 2, 3, 0};
  const Hash128 hash = SipHash({7, 8}).hash(words, 24);
  CHECK(hash == SipHash({7, 8}).hash(words, 24));
  CHECK(!(hash == SipHash({7, 9}).hash(words, 24)), "another key");
  CHECK(!(hash == SipHash({7, 8}).hash(words, 32)), "a zero more");
}

}  // namespace llmserve::test
