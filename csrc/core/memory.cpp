#include "core/memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace llmserve {

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}

void prefetch_bytes(const void* data, size_t num_bytes) {
  constexpr uintptr_t kPage = 4096;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = address / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), address + num_bytes - first, MADV_WILLNEED);
}

Mapping::Mapping(size_t num_bytes, bool huge) {
  size_ = (num_bytes + kHugePage - 1) / kHugePage * kHugePage;
  mapped_ = size_ + kHugePage;
  base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) {
    base_ = nullptr;
    throw std::bad_alloc();
  }
  const auto address = reinterpret_cast<uintptr_t>(base_);
  data_ = reinterpret_cast<uint8_t*>((address + kHugePage - 1) / kHugePage * kHugePage);
  if (huge) madvise(data_, size_, MADV_HUGEPAGE);
}

Mapping Mapping::of_file(int descriptor, size_t offset, size_t num_bytes) {
  if (offset % kHugePage != 0) throw std::invalid_argument("offset: must be a multiple of 2 MiB");
  Mapping mapping(num_bytes, false);  // an aligned place; the file's pages replace its own
  if (mmap(mapping.data_, num_bytes, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, static_cast<off_t>(offset)) ==
      MAP_FAILED)
    throw std::system_error(errno, std::generic_category(), "mmap");
  // Order matters: the first has readahead fill 2 MiB pages, the second starts it.
  madvise(mapping.data_, num_bytes, MADV_HUGEPAGE);
  madvise(mapping.data_, num_bytes, MADV_WILLNEED);
  return mapping;
}

Mapping::~Mapping() { release(); }

Mapping::Mapping(Mapping&& other) noexcept { *this = std::move(other); }

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    release();
    base_ = std::exchange(other.base_, nullptr);
    mapped_ = std::exchange(other.mapped_, 0);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

void Mapping::release() {
  if (base_ != nullptr) munmap(base_, mapped_);
  base_ = nullptr;
}

}  // namespace llmserve
