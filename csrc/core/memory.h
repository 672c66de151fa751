// Anonymous mappings: zero-filled, lazily backed, returned as a whole. For arenas, packed weights and the KV cache.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmserve {

class Mapping {
 public:
  Mapping() = default;
  // Reserves `num_bytes` (rounded up to 2 MiB). Throws std::bad_alloc. `huge` asks for 2 MiB pages.
  Mapping(size_t num_bytes, bool huge);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void release();
  void* base_ = nullptr;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace llmserve
