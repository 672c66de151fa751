#include "core/progress.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <stdexcept>

namespace llmserve {

namespace {
constexpr size_t kCellBytes = 64;

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw std::runtime_error("progress cell " + path + ": " + what + ": " + std::strerror(errno));
}

int open_file(const std::string& path, bool create) {
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0600);
  if (fd < 0) fail(path, "cannot open");
  if (create && ftruncate(fd, kCellBytes) != 0) {
    close(fd);
    fail(path, "cannot size");
  }
  return fd;
}
}  // namespace

ProgressCell::ProgressCell(const std::string& path, bool create) {
  const int fd = path.empty() ? -1 : open_file(path, create);
  void* mapped = mmap(nullptr, kCellBytes, PROT_READ | PROT_WRITE, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);
  if (fd >= 0) close(fd);
  if (mapped == MAP_FAILED) fail(path, "cannot map");
  words_ = static_cast<Words*>(mapped);
}

ProgressCell::~ProgressCell() { munmap(words_, kCellBytes); }

int64_t ProgressCell::now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace llmserve
