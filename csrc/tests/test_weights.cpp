// Weights in a file: the same bytes as in memory, mapped and shared; the checksum finds every change.
#include <cstring>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#include "core/checksum.h"
#include "cpu/program.h"
#include "tests/check.h"
#include "tests/tables.h"
#include "tests/weights.h"

namespace llmserve::test {

namespace {

constexpr size_t kOffset = size_t{2} << 20;

struct TemporaryFile {
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("weights-" + std::to_string(getpid()));
  int descriptor = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
  ~TemporaryFile() {
    close(descriptor);
    std::filesystem::remove(path);
  }
};

// The last tile has rows to spare, which must be zero whatever was packed aside before.
PackedMatrix describe(const Weights& weights, PackedType type) {
  PackedMatrix matrix;
  matrix.type = type;
  matrix.columns = weights.columns;
  matrix.tensors.push_back(weights.view());
  for (int row = 0; row < weights.rows; row += kTile)
    matrix.sources.push_back({0, row, std::min(kTile, static_cast<int>(weights.rows) - row)});
  return matrix;
}

}  // namespace

TEST(checksum_changes_with_every_byte_and_with_the_length) {
  for (const size_t size : {size_t{1}, size_t{63}, size_t{64}, size_t{65}, size_t{300}}) {
    std::vector<uint8_t> bytes(size);
    for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(i * 37);
    const uint64_t whole = checksum(bytes.data(), size);
    CHECK(whole != checksum(bytes.data(), size - 1), "a byte less");
    for (size_t i = 0; i < size; ++i) {
      bytes[i] ^= 0x80;
      CHECK(whole != checksum(bytes.data(), size), "a changed byte");
      bytes[i] ^= 0x80;
    }
  }
}

TEST(checksum_sees_two_changes_that_a_plain_product_would_not) {
  std::vector<uint8_t> bytes(256, 1);
  const uint64_t before = checksum(bytes.data(), bytes.size());
  bytes[7] ^= 0x80;  // the highest bit of a lane, in two words that follow each other
  bytes[71] ^= 0x80;
  CHECK(before != checksum(bytes.data(), bytes.size()));
}

TEST(weights_in_a_file_are_those_in_memory) {
  const Weights first = random_weights(random, DType::kQ4_0, 640, 4096);  // more than one chunk of 1 MiB
  const Weights second = random_weights(random, DType::kQ8_0, 100, 64);
  Program program("", 2, ProgramLimits{1, 1, 1, 1});
  program.reserve_weights(size_t{16} << 20);
  const PackedMatrix* matrices[] = {program.add_matrix(describe(first, PackedType::kQ4_0)),
                                    program.add_matrix(describe(second, PackedType::kQ8_0))};
  std::vector<std::vector<uint8_t>> packed;
  std::vector<uint64_t> sums;
  for (const PackedMatrix* matrix : matrices) {
    program.pack(*matrix);
    packed.emplace_back(matrix->data, matrix->data + matrix->num_bytes());
    sums.push_back(program.checksum_of(*matrix));
  }
  TemporaryFile file;
  size_t offset = kOffset;
  for (int i = 0; i < 2; ++i) {
    CHECK(program.write(*matrices[i], file.descriptor, offset) == sums[static_cast<size_t>(i)], "written as packed");
    offset += matrices[i]->num_bytes();
  }
  program.map_weights(file.descriptor, kOffset);
  for (size_t i = 0; i < 2; ++i) {
    CHECK(program.checksum_of(*matrices[i]) == sums[i], "mapped as packed");
    CHECK(std::memcmp(matrices[i]->data, packed[i].data(), packed[i].size()) == 0);
  }
  const uint8_t changed = static_cast<uint8_t>(packed[1][50] ^ 1);
  const auto place = static_cast<off_t>(kOffset + matrices[0]->num_bytes() + 50);
  CHECK(pwrite(file.descriptor, &changed, 1, place) == 1);
  CHECK(program.checksum_of(*matrices[0]) == sums[0]);
  CHECK(program.checksum_of(*matrices[1]) != sums[1], "the mapping is the file");
  program.reserve_weights(size_t{16} << 20);
  program.pack(*matrices[1]);
  CHECK(program.checksum_of(*matrices[1]) == sums[1], "back in memory");
}

TEST(weights_that_cannot_be_written_or_mapped_are_refused) {
  const Weights weights = random_weights(random, DType::kQ4_0, 64, 64);
  Program program("", 1, ProgramLimits{1, 1, 1, 1});
  program.reserve_weights(1 << 20);
  const PackedMatrix* matrix = program.add_matrix(describe(weights, PackedType::kQ4_0));
  TemporaryFile file;
  const int read_only = open(file.path.c_str(), O_RDONLY);
  CHECK_THROWS(std::system_error, program.write(*matrix, read_only, kOffset));
  close(read_only);
  CHECK_THROWS(std::system_error, program.map_weights(-1, kOffset));
  CHECK_THROWS(std::invalid_argument, program.map_weights(file.descriptor, 4096));
  CHECK_THROWS(std::invalid_argument, program.reserve_weights(1));
}

TEST(a_sample_tells_content_and_type) {
  const Weights weights = random_weights(random, DType::kF32, 200, 64);
  Weights other = random_weights(random, DType::kF32, 200, 64);
  std::memcpy(other.bytes.data(), weights.bytes.data(), weights.bytes.size());
  other.bytes.data()[other.bytes.size() - 1] ^= 0x40;  // visible in bf16, too
  Program program("", 2, ProgramLimits{1, 1, 1, 1});
  program.reserve_weights(4 << 20);
  const auto sample = [&](const Weights& source, PackedType type) {
    return program.checksum_of_sample(*program.add_matrix(describe(source, type)));
  };
  const uint64_t once = sample(weights, PackedType::kF32);
  CHECK(once == sample(weights, PackedType::kF32));
  CHECK(once != sample(weights, PackedType::kBF16), "another type");
  CHECK(once != sample(other, PackedType::kF32), "the last tile differs");
}

}  // namespace llmserve::test
