// The weights of a program: packed into memory, or into a file that many processes map.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "core/checksum.h"
#include "cpu/program.h"

namespace llmserve {

namespace {

constexpr size_t kChunk = size_t{1} << 20;

struct PackJob {
  const PackedMatrix* matrix;
  const KernelTable* kernels;
  std::atomic<int> next{0};
};

void pack_worker(void* context, int) {
  auto* job = static_cast<PackJob*>(context);
  for (int tile = job->next.fetch_add(1); tile < job->matrix->num_tiles(); tile = job->next.fetch_add(1))
    job->matrix->pack_tile(tile, *job->kernels);
}

// Work over bytes in chunks of 1 MiB.
struct ChunkJob {
  const uint8_t* read = nullptr;
  uint8_t* clear = nullptr;
  size_t num_bytes = 0;
  std::vector<uint64_t> sums;
  std::atomic<size_t> next{0};

  size_t num_chunks() const { return (num_bytes + kChunk - 1) / kChunk; }
};

void chunk_worker(void* context, int) {
  auto* job = static_cast<ChunkJob*>(context);
  for (size_t chunk = job->next.fetch_add(1); chunk < job->num_chunks(); chunk = job->next.fetch_add(1)) {
    const size_t first = chunk * kChunk, count = std::min(kChunk, job->num_bytes - first);
    if (job->clear != nullptr) std::memset(job->clear + first, 0, count);
    if (job->read != nullptr) job->sums[chunk] = checksum(job->read + first, count);
  }
}

void write_all(int descriptor, const uint8_t* data, size_t num_bytes, size_t offset) {
  for (size_t done = 0; done < num_bytes;) {
    const ssize_t count = pwrite(descriptor, data + done, num_bytes - done, static_cast<off_t>(offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) throw std::system_error(count < 0 ? errno : EIO, std::generic_category(), "pwrite");
    done += static_cast<size_t>(count);
  }
}

void prefetch_rows(const TensorView& tensor, int64_t row, int64_t num_rows) {
  prefetch_bytes(tensor.row(row), static_cast<size_t>(tensor.row(row + num_rows) - tensor.row(row)));
}

}  // namespace

void Program::reserve_weights(size_t num_bytes) {
  if (num_bytes < weights_used_) throw std::invalid_argument("num_bytes: less than the matrices have");
  weights_ = Mapping(num_bytes, true);
  place_matrices();
}

void Program::place_matrices() {
  size_t place = 0;
  for (auto& matrix : matrices_) {
    matrix->data = weights_.data() + place;
    place += matrix->num_bytes();
  }
}

const PackedMatrix* Program::add_matrix(PackedMatrix matrix) {
  matrix.check();
  const size_t num_bytes = matrix.num_bytes();
  if (weights_used_ + num_bytes > weights_.size()) throw std::invalid_argument("matrix: the weight arena is too small");
  matrix.data = weights_.data() + weights_used_;
  weights_used_ += num_bytes;
  matrices_.push_back(std::make_unique<PackedMatrix>(std::move(matrix)));
  return matrices_.back().get();
}

void Program::pack(const PackedMatrix& matrix) {
  PackJob job{&matrix, &kernels_};
  pool_.run(pack_worker, &job);
}

PackedMatrix Program::pack_aside(PackedMatrix matrix) {
  if (aside_.data() == nullptr || aside_.size() < matrix.num_bytes()) aside_ = Mapping(matrix.num_bytes(), true);
  matrix.data = aside_.data();
  ChunkJob job;
  job.clear = matrix.data;
  job.num_bytes = matrix.num_bytes();
  pool_.run(chunk_worker, &job);
  pack(matrix);
  return matrix;
}

uint64_t Program::write(const PackedMatrix& matrix, int descriptor, size_t offset) {
  const PackedMatrix packed = pack_aside(matrix);
  write_all(descriptor, packed.data, packed.num_bytes(), offset);
  return checksum_of(packed.data, packed.num_bytes());
}

void Program::map_weights(int descriptor, size_t offset) {
  weights_ = Mapping::of_file(descriptor, offset, weights_used_);
  place_matrices();
  aside_ = Mapping();
}

void Program::prefetch(const PackedMatrix& matrix, bool sample) const {
  if (!sample) {
    for (const TensorView& tensor : matrix.tensors) prefetch_rows(tensor, 0, tensor.rows);
    return;
  }
  for (const TileSource& source : {matrix.sources.front(), matrix.sources.back()})
    prefetch_rows(matrix.tensors[static_cast<size_t>(source.tensor)], source.row, source.num_rows);
}

uint64_t Program::checksum_of(const uint8_t* data, size_t num_bytes) {
  ChunkJob job;
  job.read = data;
  job.num_bytes = num_bytes;
  job.sums.resize(job.num_chunks());
  pool_.run(chunk_worker, &job);
  return checksum(reinterpret_cast<const uint8_t*>(job.sums.data()), job.sums.size() * sizeof(uint64_t));
}

uint64_t Program::checksum_of(const PackedMatrix& matrix) { return checksum_of(matrix.data, matrix.num_bytes()); }

uint64_t Program::checksum_of_sample(const PackedMatrix& matrix) {
  PackedMatrix sample = matrix;
  sample.sources = {matrix.sources.front(), matrix.sources.back()};
  sample = pack_aside(std::move(sample));
  return checksum_of(sample);
}

}  // namespace llmserve
