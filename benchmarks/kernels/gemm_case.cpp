#include "gemm_case.h"

#include <algorithm>
#include <cmath>

namespace llmserve::bench {

namespace {

constexpr int kLayers = 1;

int blocks_for(int tokens) { return (tokens + kKvBlock - 1) / kKvBlock; }

bool has_norm(Part part) { return part == Part::kQkv || part == Part::kGateUp || part == Part::kHead; }
bool has_residual(Part part) { return part == Part::kO || part == Part::kDown; }

int tiles_of(int64_t columns) { return static_cast<int>((columns + kTile - 1) / kTile); }

int64_t out_columns(const Matrix& matrix) {
  if (matrix.part == Part::kGateUp) return matrix.rows / 2;
  return matrix.part == Part::kQkv ? int64_t{matrix.heads} * matrix.head_dim : matrix.rows;
}

RopeTable rope_table(int max_position, int rotary_dim) {
  RopeTable rope;
  rope.rotary_dim = rotary_dim;
  for (int position = 0; position < max_position; ++position)
    for (int i = 0; i < rotary_dim / 2; ++i) {
      const double angle = position * std::pow(10000.0, -2.0 * i / rotary_dim);
      rope.cosine.push_back(static_cast<float>(std::cos(angle)));
      rope.sine.push_back(static_cast<float>(std::sin(angle)));
    }
  return rope;
}

}  // namespace

int Case::num_tiles() const {
  if (matrix.part == Part::kQkv) return (matrix.heads + 2 * matrix.kv_heads) * tiles_of(matrix.head_dim);
  return matrix.part == Part::kGateUp ? 2 * tiles_of(matrix.rows / 2) : tiles_of(matrix.rows);
}

size_t Case::matrix_bytes() const { return static_cast<size_t>(num_tiles()) * tile_bytes(type, matrix.columns); }

GemmCase::GemmCase(const Case& what, int num_copies, const std::string& isa, int num_threads, const Buffers& buffers)
    : case_(what),
      type_(describe(what.type)),
      program_(isa, num_threads, ProgramLimits{what.m, 1, 1, what.m}),
      blocks_(blocks_for(what.m), kKvBlock),
      copies_(static_cast<size_t>(num_copies)),
      zeros_(static_cast<size_t>(what.m)),
      query_start_{0, what.m},
      seq_lens_{what.m},
      tables_{blocks_.create()} {
  for (int i = 0; i < what.m; ++i) positions_.push_back(i);
  blocks_.reserve(tables_, {what.m});
  const Matrix& matrix = what.matrix;
  program_.allocate_kv(kLayers, blocks_for(what.m), std::max(1, matrix.kv_heads), std::max(16, matrix.head_dim));
  if (matrix.part == Part::kQkv) rope_ = program_.add_rope(rope_table(what.m, matrix.head_dim));
  place_values(buffers);
  add_nodes(buffers);
}

void GemmCase::place_values(const Buffers& buffers) {
  const Matrix& matrix = case_.matrix;
  const unsigned out_form = matrix.part == Part::kGateUp ? type_.form : kFormF32;
  const int64_t columns = out_columns(matrix);
  const auto place = [&](int index, int64_t width, unsigned forms) {
    const bool panels = program_.kernels().reads_panels;
    if (llmserve::value_bytes(case_.m, width, forms, panels) > buffers.value_bytes)
      throw std::invalid_argument("the benchmark's activation buffers are too small");
    return place_value(buffers.value(index), Rows::kTokens, case_.m, width, forms, panels);
  };
  x_ = place(0, matrix.columns, kFormF32);
  in_ = place(1, matrix.columns, type_.form);
  out_ = place(2, columns, out_form);
  residual_ = place(3, columns, kFormF32);
  for (int row = 0; row < case_.m; ++row) write_forms(program_.kernels(), in_, row, 0, x_.at(row).f32, matrix.columns);
}

void GemmCase::add_nodes(const Buffers& buffers) {
  const size_t num_bytes = case_.matrix_bytes();
  for (size_t i = 0; i < copies_.size(); ++i) {
    PackedMatrix& copy = copies_[i];
    copy.type = case_.type;
    copy.columns = case_.matrix.columns;
    copy.sources.resize(static_cast<size_t>(case_.num_tiles()));
    copy.data = buffers.weights.data() + i * num_bytes;
    if (has_norm(case_.matrix.part)) program_.add_node(norm_node());
    program_.add_node(gemm_node(copy));
  }
}

std::unique_ptr<NormNode> GemmCase::norm_node() const {
  auto node = std::make_unique<NormNode>();
  node->in = x_;
  node->out = in_;
  node->weight.assign(static_cast<size_t>(x_.columns), 1.0f);
  node->eps = 1e-5f;
  return node;
}

std::unique_ptr<GemmNode> GemmCase::gemm_node(const PackedMatrix& matrix) {
  auto node = std::make_unique<GemmNode>();
  node->matrix = &matrix;
  node->in = in_;
  node->out = out_;
  if (case_.matrix.bias) node->bias.assign(static_cast<size_t>(case_.num_tiles()) * kTile, 0.5f);
  if (case_.matrix.part == Part::kQkv) {
    make_heads(*node);
    return node;
  }
  if (has_residual(case_.matrix.part)) node->residual = &residual_;
  const bool gated = case_.matrix.part == Part::kGateUp;
  for (int64_t column = 0, tile = 0; column < out_.columns; column += kTile, tile += gated ? 2 : 1)
    node->items.push_back({gated ? ItemKind::kGated : ItemKind::kPlain, static_cast<int32_t>(tile), gated ? 2 : 1,
                           static_cast<int32_t>(column),
                           static_cast<int32_t>(std::min<int64_t>(kTile, out_.columns - column)), 0});
  return node;
}

void GemmCase::make_heads(GemmNode& node) const {
  const Matrix& matrix = case_.matrix;
  node.head_dim = matrix.head_dim;
  node.rope = rope_;
  const int32_t tiles = tiles_of(matrix.head_dim);
  for (int32_t i = 0; i < matrix.heads + 2 * matrix.kv_heads; ++i) {
    const int32_t beyond = i - matrix.heads;
    const ItemKind kind = beyond < 0 ? ItemKind::kQuery : beyond < matrix.kv_heads ? ItemKind::kKey : ItemKind::kValue;
    const int32_t head = beyond < 0 ? i : beyond % matrix.kv_heads;
    node.items.push_back({kind, i * tiles, tiles, head * matrix.head_dim, matrix.head_dim, head});
  }
}

void GemmCase::run() {
  StepArrays step;
  step.num_tokens = case_.m;
  step.num_seqs = 1;
  step.token_ids = zeros_.data();
  step.positions = positions_.data();
  step.query_start = query_start_.data();
  step.seq_lens = seq_lens_.data();
  step.block_tables = tables_.data();
  program_.run(step, blocks_);
}

CaseTime GemmCase::measure(double seconds) {
  run();
  program_.take_times();
  const double start = seconds_now();
  int64_t num_calls = 0;
  do {
    run();
    num_calls += static_cast<int64_t>(copies_.size());
  } while (seconds_now() - start < seconds);
  CaseTime time{0.0, 0.0};
  for (const NodeTime& node : program_.take_times()) {
    time.call += node.seconds / static_cast<double>(num_calls);
    if (node.kind == "gemm") time.gemm += node.seconds / static_cast<double>(num_calls);
  }
  return time;
}

}  // namespace llmserve::bench
