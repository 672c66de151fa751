// Memory for kernels under test: inputs of exactly their size, outputs between guard zones.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "tests/check.h"

namespace llmserve::test {

// `size` elements, 64-byte aligned, not one byte more: AddressSanitizer sees a read past the end.
template <typename T>
class Exact {
 public:
  Exact() = default;
  explicit Exact(size_t size) : size_(size) {
    void* place = nullptr;
    if (posix_memalign(&place, 64, size * sizeof(T)) != 0) throw std::bad_alloc();
    data_ = static_cast<T*>(place);
    std::memset(place, 0, size * sizeof(T));
  }
  Exact(Exact&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Exact& operator=(Exact&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  size_t num_bytes() const { return size_ * sizeof(T); }
  T& operator[](size_t index) { return data_[index]; }
  const T& operator[](size_t index) const { return data_[index]; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

// `size` elements between two zones of a known pattern, which also fills the elements before they are written.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t size) : bytes_(size * sizeof(T) + 2 * kZone), size_(size) {
    std::memset(bytes_.data(), kPattern, bytes_.size());
  }

  T* data() { return reinterpret_cast<T*>(bytes_.data() + kZone); }
  const T& operator[](size_t index) const { return reinterpret_cast<const T*>(bytes_.data() + kZone)[index]; }
  size_t size() const { return size_; }

  bool is_untouched(size_t index) const {
    const auto* element = reinterpret_cast<const uint8_t*>(&(*this)[index]);
    for (size_t i = 0; i < sizeof(T); ++i)
      if (element[i] != kPattern) return false;
    return true;
  }

  void check_zones(const std::string& what) const {
    for (size_t i = 0; i < kZone; ++i) {
      CHECK(bytes_[i] == kPattern, what, ": written ", kZone - i, " bytes before the output");
      CHECK(bytes_[bytes_.size() - kZone + i] == kPattern, what, ": written ", i, " bytes past the output");
    }
  }

 private:
  static constexpr size_t kZone = 256;
  static constexpr uint8_t kPattern = 0xA5;
  Exact<uint8_t> bytes_;
  size_t size_;
};

}  // namespace llmserve::test
