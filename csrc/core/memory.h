// Mappings, returned as a whole. Anonymous ones are zero-filled and lazily backed: for arenas, packed weights and the
// KV cache. One of a file is read-only and shared: its memory is the page cache, the same for all processes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmserve {

// Has the system read, in the background, what a mapped file has there. Only advice: other memory stays as it is.
void prefetch_bytes(const void* data, size_t num_bytes);

class Mapping {
 public:
  Mapping() = default;
  // Reserves `num_bytes` (rounded up to 2 MiB). Throws std::bad_alloc. `huge` asks for 2 MiB pages.
  Mapping(size_t num_bytes, bool huge);
  // `num_bytes` of a file from `offset` on, a multiple of 2 MiB; the system is told to read them. 2 MiB pages where the
  // file system has them in its page cache. Throws std::system_error.
  static Mapping of_file(int descriptor, size_t offset, size_t num_bytes);
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
