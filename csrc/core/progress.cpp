#include "core/progress.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace llmserve {

namespace {
constexpr size_t kCellBytes = 64;

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw std::runtime_error("progress cell " + path + ": " + what + ": " + std::strerror(errno));
}
}  // namespace

ProgressCell::ProgressCell(const std::string& path, bool create) {
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0600);
  if (fd < 0) fail(path, "cannot open");
  if (create && ftruncate(fd, kCellBytes) != 0) {
    close(fd);
    fail(path, "cannot size");
  }
  void* mapped = mmap(nullptr, kCellBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (mapped == MAP_FAILED) fail(path, "cannot map");
  words_ = static_cast<Words*>(mapped);
}

ProgressCell::~ProgressCell() { munmap(words_, kCellBytes); }

}  // namespace llmserve
