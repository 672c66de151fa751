// The nodes of a program. A node is a set of independent work items over the rows of a step; all items of a node end
// before the next node starts. Nodes are immutable once the program runs: what belongs to a step comes as arguments.
#pragma once

#include <cstdint>
#include <vector>

#include "core/work_queue.h"
#include "cpu/pack.h"
#include "cpu/step.h"
#include "cpu/value.h"

namespace llmserve {

// What the kernels of one worker need besides the arena.
struct Worker {
  const KernelTable* kernels;
  uint8_t* scratch;  // 64-byte aligned, as many bytes as the neediest node asked for
};

inline int64_t num_rows(const Step& step, Rows rows) { return rows == Rows::kTokens ? step.num_tokens : step.num_rows; }

class Node {
 public:
  virtual ~Node() = default;
  virtual const char* kind() const = 0;
  virtual int64_t num_items(const Step& step) const = 0;
  virtual HandOut hand_out() const { return HandOut::kRuns; }
  // Whether sharing the items out would cost more than it saves.
  virtual bool is_small(const Step& step) const { return num_items(step) <= 1; }
  virtual void run(const Step& step, int64_t item, const Worker& worker) const = 0;
  virtual size_t scratch_bytes() const { return 0; }
  // Throws std::invalid_argument for states or masks of a step that do not fit this node.
  virtual void check(const StepArrays&) const {}
};

// Zeroes the KV blocks that were handed out since the last step and are not filled by this one.
class ZeroBlocksNode : public Node {
 public:
  const char* kind() const override { return "zero_blocks"; }
  int64_t num_items(const Step& step) const override;
  void run(const Step& step, int64_t item, const Worker& worker) const override;
};

// Copies the partial blocks of forked sequences, after blocks are zeroed and before anything is written.
class CopyBlocksNode : public Node {
 public:
  const char* kind() const override { return "copy_blocks"; }
  int64_t num_items(const Step& step) const override;
  void run(const Step& step, int64_t item, const Worker& worker) const override;
};

// About so many values are normalized, quantized or copied in the time of a barrier.
constexpr int64_t kSmallValues = 4096;

class EmbedNode : public Node {
 public:
  TensorView table;
  TensorView positions;  // data null: none
  float factor = 1.0f;
  Value out;

  const char* kind() const override { return "embed"; }
  bool is_small(const Step& step) const override { return num_items(step) * out.columns <= kSmallValues; }
  void check(const StepArrays& arrays) const override;
  int64_t num_items(const Step& step) const override { return step.num_tokens; }
  void run(const Step& step, int64_t item, const Worker& worker) const override;
  size_t scratch_bytes() const override { return static_cast<size_t>(out.columns) * 2 * sizeof(float); }
};

enum class NormKind : uint8_t { kRms, kLayer };

class NormNode : public Node {
 public:
  NormKind norm = NormKind::kRms;
  Value in, out;
  std::vector<float> weight, bias;
  float eps = 0;

  const char* kind() const override { return "norm"; }
  int64_t num_items(const Step& step) const override;
  bool is_small(const Step& step) const override { return num_items(step) * in.columns <= kSmallValues; }
  void run(const Step& step, int64_t item, const Worker& worker) const override;
  size_t scratch_bytes() const override { return static_cast<size_t>(in.columns) * sizeof(float); }
};

// Copies the rows that need logits.
class GatherNode : public Node {
 public:
  Value in, out;

  const char* kind() const override { return "gather"; }
  int64_t num_items(const Step& step) const override { return step.num_rows; }
  bool is_small(const Step& step) const override { return num_items(step) * in.columns <= kSmallValues; }
  void run(const Step& step, int64_t item, const Worker& worker) const override;
};

enum class Elementwise : uint8_t { kAdd, kScale, kActivate, kGated, kForms, kPermute };

// out = x + y | x * by | act(x) | act(gate) * x | x in further forms | x[order].
class ElementwiseNode : public Node {
 public:
  Elementwise op = Elementwise::kForms;
  Activation activation = Activation::kSilu;
  Value x, y, out;  // y: the second addend, or the gate
  float by = 1.0f;
  std::vector<int32_t> order;  // of the columns

  const char* kind() const override { return "elementwise"; }
  bool is_small(const Step& step) const override { return num_items(step) * out.columns <= kSmallValues; }
  int64_t num_items(const Step& step) const override { return num_rows(step, out.rows); }
  void run(const Step& step, int64_t item, const Worker& worker) const override;
  size_t scratch_bytes() const override { return static_cast<size_t>(out.columns) * sizeof(float); }
};

// Rotary tables: cosine and sine of each position, [max_positions, rotary_dim / 2].
struct RopeTable {
  std::vector<float> cosine, sine;
  int rotary_dim = 0;
  bool interleaved = false;
};

enum class ItemKind : int32_t { kPlain, kGated, kQuery, kKey, kValue };

// What one work item of a GEMM makes: consecutive tiles that hold all its epilogue needs.
struct GemmItem {
  ItemKind kind;
  int32_t first_tile;
  int32_t num_tiles;
  int32_t out_column;   // plain, gated, query: first column of the output
  int32_t num_columns;  // columns of the output
  int32_t head;         // key, value: KV head
};

class GemmNode : public Node {
 public:
  const PackedMatrix* matrix = nullptr;
  bool exact = false;  // float32 activations for quantized weights
  Value in, out;
  std::vector<GemmItem> items;
  std::vector<float> bias;  // [num_tiles * 64], empty: none
  const Value* residual = nullptr;
  const Value* maxima = nullptr;  // [rows, tiles]: the largest output of each tile, of plain items
  Activation activation = Activation::kSilu;
  float factor = 1.0f;   // of the logits
  float softcap = 0.0f;  // of the logits, 0: none
  // Heads of Q, K and V.
  const RopeTable* rope = nullptr;
  std::vector<float> query_norm, key_norm;
  float norm_eps = 0;
  int head_dim = 0;
  int layer = 0;

  const char* kind() const override { return "gemm"; }
  int64_t num_items(const Step& step) const override;  // an item's tiles times a range of rows, or a part of it
  void run(const Step& step, int64_t item, const Worker& worker) const override;
  size_t scratch_bytes() const override;

 private:
  int max_item_tiles() const;
  int64_t num_ranges(const Step& step) const;
  bool halves_ranges(const Step& step) const;
  size_t slab_bytes() const;
  void multiply(const uint8_t* tile, TileArgs args, const Worker& worker) const;
  void multiply_unpacked(const uint8_t* tile, TileArgs args, const Worker& worker) const;
  void finish_row(const Step& step, const GemmItem& item, int64_t row, float* x, const Worker& worker) const;
  void finish_plain(const GemmItem& item, int64_t row, float* x, const Worker& worker) const;
  void write_cache(const Step& step, const GemmItem& item, int64_t row, const float* x, const Worker& worker) const;
  void finish_head(const Step& step, const GemmItem& item, int64_t row, float* x, const Worker& worker) const;
};

class AttentionNode : public Node {
 public:
  Value q, out;
  int heads = 0, kv_heads = 0, head_dim = 0, window = 0, layer = 0;
  bool bidirectional = false;
  float scale = 0, softcap = 0;
  std::vector<float> sinks;  // [heads], empty: none

  const char* kind() const override { return "attention"; }
  HandOut hand_out() const override { return HandOut::kShared; }  // the longest first
  void check(const StepArrays& arrays) const override;
  int64_t num_items(const Step& step) const override { return static_cast<int64_t>(step.chunks.size()) * kv_heads; }
  void run(const Step& step, int64_t item, const Worker& worker) const override;
  size_t scratch_bytes() const override;
};

class SampleNode : public Node {
 public:
  Value logits;
  const Value* maxima = nullptr;  // of each 64 logits, where the head wrote them

  const char* kind() const override { return "sample"; }
  int64_t num_items(const Step& step) const override { return step.num_rows; }
  void run(const Step& step, int64_t item, const Worker& worker) const override;
  size_t scratch_bytes() const override;
  void check(const StepArrays& arrays) const override;
};

}  // namespace llmserve
