// One GEMM of a network, through the same Program and GemmNode as in the server: so many rows times a matrix, with the
// norm before it and the epilogue behind it that belong to that matrix.
#pragma once

#include <memory>
#include <vector>

#include "buffers.h"
#include "cpu/program.h"
#include "packed_types.h"
#include "shapes.h"

namespace llmserve::bench {

struct Case {
  PackedType type;
  Matrix matrix;
  int m;

  int num_tiles() const;
  size_t matrix_bytes() const;  // packed
  double operations() const { return 2.0 * m * static_cast<double>(matrix.rows) * static_cast<double>(matrix.columns); }
};

// Seconds of one GEMM. `call`: with the norm that quantizes its input, where the network has one.
struct CaseTime {
  double gemm, call;
};

class GemmCase {
 public:
  // `num_copies` matrices that lie behind each other take turns, so that no cache helps that would not help a network.
  GemmCase(const Case& what, int num_copies, const std::string& isa, int num_threads, const Buffers& buffers);

  // Repeats for about so long, after one run that does not count.
  CaseTime measure(double seconds);

 private:
  void place_values(const Buffers& buffers);
  void add_nodes(const Buffers& buffers);
  std::unique_ptr<NormNode> norm_node() const;
  std::unique_ptr<GemmNode> gemm_node(const PackedMatrix& matrix);
  void make_heads(GemmNode& node) const;
  void run();

  Case case_;
  TypeInfo type_;
  Program program_;
  BlockPool blocks_;
  Value x_, in_, out_, residual_;
  const RopeTable* rope_ = nullptr;
  std::vector<PackedMatrix> copies_;
  std::vector<int32_t> zeros_, positions_, query_start_, seq_lens_;
  std::vector<int64_t> tables_;
};

}  // namespace llmserve::bench
