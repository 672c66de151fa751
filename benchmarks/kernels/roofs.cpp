#include "roofs.h"

#include <atomic>
#include <chrono>
#include <cstring>

namespace llmserve::bench {

namespace {

constexpr int64_t kTrialTimes = 2000;
constexpr double kLoopSeconds = 0.002;

struct Job {
  const RoofTable* table;
  LoopFunction loop;
  int64_t times;
  const uint8_t* data;
  size_t bytes_per_worker;
  std::atomic<double> operations{0.0};
  std::atomic<uint64_t> sum{0};
};

void loop_worker(void* context, int) {
  auto* job = static_cast<Job*>(context);
  job->operations.fetch_add(job->loop(job->times, job->data));
}

void read_worker(void* context, int worker) {
  auto* job = static_cast<Job*>(context);
  job->sum.fetch_add(
      job->table->read(job->data + static_cast<size_t>(worker) * job->bytes_per_worker, job->bytes_per_worker));
}

uint64_t scalar_read(const uint8_t* data, size_t num_bytes) {
  uint64_t sums[4] = {};
  for (size_t at = 0; at < num_bytes; at += 32)
    for (size_t i = 0; i < 4; ++i) {
      uint64_t word;
      std::memcpy(&word, data + at + 8 * i, 8);
      sums[i] += word;
    }
  return sums[0] + sums[1] + sums[2] + sums[3];
}

double run_loop(Job& job, ThreadPool& pool, int64_t times) {
  job.times = times;
  job.operations = 0.0;
  const double start = seconds_now();
  pool.run(loop_worker, &job);
  return seconds_now() - start;
}

}  // namespace

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

RoofTable choose_roofs(const std::string& isa) {
  RoofTable table;
  table.read = scalar_read;
#ifdef LLMSERVE_X86
  const bool has_amx = isa == "amx", has_avx512 = has_amx || isa == "avx512";
  if (has_avx512 || isa == "avx2") avx2::fill(table);
  if (has_avx512) avx512::fill(table);
  if (has_avx512 && __builtin_cpu_supports("avx512vnni")) avx512vnni::fill(table);
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) avx512bf16::fill(table);
  if (has_amx) amx::fill(table);
#endif
  return table;
}

double measure_loop(const RoofTable& table, Roof roof, ThreadPool& pool, const uint8_t* operands) {
  Job job{&table, table.loops[roof], 0, operands, 0};
  if (job.loop == nullptr) return 0.0;
  const double trial = run_loop(job, pool, kTrialTimes);
  const double seconds = run_loop(job, pool, static_cast<int64_t>(kTrialTimes * kLoopSeconds / trial) + kTrialTimes);
  return job.operations / seconds;
}

double measure_read(const RoofTable& table, ThreadPool& pool, const uint8_t* data, size_t num_bytes) {
  const auto workers = static_cast<size_t>(pool.num_threads());
  Job job{&table, nullptr, 0, data, num_bytes / workers / 256 * 256};
  const double start = seconds_now();
  pool.run(read_worker, &job);
  const double seconds = seconds_now() - start;
  // Whoever knew that the sum is not looked at could leave out the reads.
  if (job.sum.load() == 1) return 0.0;
  return static_cast<double>(job.bytes_per_worker * workers) / seconds;
}

}  // namespace llmserve::bench
