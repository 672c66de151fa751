#include "report.h"

#include <algorithm>
#include <cstdio>
#include <fstream>

namespace llmserve::bench {

namespace {

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(": ") + 2);
  return "";
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20) continue;
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

}  // namespace

double Samples::median() const {
  std::vector<double> sorted = values;
  std::sort(sorted.begin(), sorted.end());
  const size_t middle = sorted.size() / 2;
  return sorted.size() % 2 != 0 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

double Samples::low() const { return *std::min_element(values.begin(), values.end()); }
double Samples::high() const { return *std::max_element(values.begin(), values.end()); }

void print_run(const Options& options, const std::string& isa, int num_threads) {
  std::printf("{\"record\":\"run\",\"cpu\":%s,\"isa\":%s,\"threads\":%d,\"rounds\":%d,\"commit\":%s,\"compiler\":%s}\n",
              quoted(cpu_name()).c_str(), quoted(isa).c_str(), num_threads, options.rounds,
              quoted(options.commit).c_str(), quoted(__VERSION__).c_str());
}

void print_roof(const RoofSamples& roof) {
  std::printf("{\"record\":\"roof\",\"name\":%s,\"threads\":%d,\"per_s\":%.5g,\"low\":%.5g,\"high\":%.5g}\n",
              quoted(roof.name).c_str(), roof.threads, roof.per_s.median(), roof.per_s.low(), roof.per_s.high());
}

void print_case(const Measured& measured) {
  const Case& what = measured.what;
  const TypeInfo type = describe(what.type);
  if (measured.gemm_s.values.empty()) {
    std::printf("{\"record\":\"disturbed\",\"type\":%s,\"shape\":%s,\"part\":%s,\"m\":%d}\n", quoted(type.name).c_str(),
                quoted(what.matrix.shape).c_str(), quoted(what.matrix.part_name()).c_str(), what.m);
    return;
  }
  const double seconds = measured.gemm_s.median();
  std::printf(
      "{\"record\":\"gemm\",\"type\":%s,\"shape\":%s,\"part\":%s,\"n\":%lld,\"k\":%lld,\"m\":%d,\"copies\":%d,"
      "\"disturbed\":%d,"
      "\"weight_bytes\":%zu,\"gemm_s\":%.5g,\"gemm_s_low\":%.5g,\"gemm_s_high\":%.5g,\"call_s\":%.5g,"
      "\"bytes_per_s\":%.5g,\"ops_per_s\":%.5g,\"dram_share\":%.4f,\"roof\":%s,\"roof_share\":%.4f}\n",
      quoted(type.name).c_str(), quoted(what.matrix.shape).c_str(), quoted(what.matrix.part_name()).c_str(),
      static_cast<long long>(what.matrix.rows), static_cast<long long>(what.matrix.columns), what.m,
      measured.num_copies, measured.num_disturbed, what.matrix_bytes(), seconds, measured.gemm_s.low(),
      measured.gemm_s.high(), measured.call_s.median(), static_cast<double>(what.matrix_bytes()) / seconds,
      what.operations() / seconds, measured.dram_share.median(), quoted(kRoofNames[type.roof]).c_str(),
      measured.roof_share.median());
}

}  // namespace llmserve::bench
