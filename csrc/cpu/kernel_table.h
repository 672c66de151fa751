// One table of kernels per ISA level; every kernel has a scalar twin of the same meaning.
//
// Rule of all kernels (results never depend on the batch): a row's result is the same sequence of float operations
// however many rows are computed together.
#pragma once

#include <cstdint>

#include "cpu/grid.h"
#include "cpu/layout.h"

namespace llmserve {

// One tile of 64 channels times `rows` rows: out[row * out_stride + channel], over the code groups from `first_group`
// on (float32 kernels: over k from `first_group * kGroup` on). What `out` holds is continued where that is not the
// first.
struct TileArgs {
  const uint8_t* weights = nullptr;  // packed or unpacked, at `first_group`
  const uint8_t* next = nullptr;     // unpacked weights: the packed ones that come next, to be read ahead
  Activations x;                     // pointers at the first row and column 0
  int64_t first_group = 0;
  int64_t num_groups = 0;  // the last may be partial where K is no multiple of 32 (bf16, f32)
  int rows = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
};
using TileFunction = void (*)(const TileArgs&);

// Attention of the query heads of one KV head, for consecutive tokens of one sequence.
constexpr int kKvTile = 256;       // tokens of a KV tile, aligned to absolute position 0
constexpr int kKvBlock = 16;       // tokens of a block
constexpr int kMaxQueryRows = 32;  // tokens x query heads of one task
constexpr int kMaxHeadDim = 512;
struct AttentionArgs {
  const float* q = nullptr;  // token t, head h at q + t * q_stride + h * head_dim
  int64_t q_stride = 0;
  int num_tokens = 0;
  int heads = 0;  // query heads of this KV head
  int head_dim = 0;
  int first_position = 0;
  int window = 0;                // a query at i sees j with |i - j| < window; 0: all
  int num_keys = 0;              // a query sees all of so many keys, later ones too; 0: causal
  float softcap = 0;             // a score s becomes softcap * tanh(s / softcap); 0: as it is
  const float* sinks = nullptr;  // [heads]: a score without a value, part of every sum of weights; null: none
  float scale = 0;
  const int32_t* table = nullptr;  // block table of the sequence
  const uint16_t* kv = nullptr;    // this layer and KV head: K [D/2][16][2] then V [8][D][2] of block 0
  int64_t block_stride = 0;        // in units of two bytes
  bool int8 = false;               // codes and scales instead of bf16 (KvCache)
  float* out = nullptr;            // same shape as q
  int64_t out_stride = 0;
  uint8_t* scratch = nullptr;  // attention_scratch_bytes(head_dim), 64-byte aligned
};
constexpr size_t attention_scratch_bytes(int head_dim) {
  return static_cast<size_t>(kMaxQueryRows) * (static_cast<size_t>(head_dim) * (2 + 4 + 4) + kKvTile * (4 + 2) + 16) +
         static_cast<size_t>(kKvTile) * (static_cast<size_t>(head_dim) * 2 * 2 + 2 * 4) + 256;
}

struct HeadRow {
  float* x;             // one head of one token, in place
  const float* bias;    // null: none
  const float* norm;    // RMS weight over the head, null: none
  const float* cosine;  // [rotary_dim / 2] of this position, null: no rotation
  const float* sine;
  int head_dim;
  int rotary_dim;
  bool interleaved;
  float eps;
};

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kRelu2 };

struct KernelTable {
  const char* name;
  bool reads_panels;  // of activations: they are to be made

  int direct_rows[kNumPackedTypes];             // up to so many gemm_packed is the faster
  TileFunction gemm_packed[kNumPackedTypes];    // codes unpacked in registers, for few rows; all rows of bf16, f32, i8
  TileFunction gemm_unpacked[kNumPackedTypes];  // codes in bytes, for many rows; the same results
  // Groups of a packed tile as the bytes that gemm_unpacked reads, and as float32 [k][64] that the f32 GEMM reads.
  void (*unpack)(PackedType type, const uint8_t* groups, int64_t num_groups, uint8_t* out);
  void (*dequantize_tile)(PackedType type, const uint8_t* groups, int64_t num_groups, float* out);

  void (*attention)(const AttentionArgs&);
  // One head of one token as int8 codes; returns their scale, NaN when a value is not finite.
  float (*quantize_head)(const float* x, int8_t* codes, int64_t n);

  void (*rms_norm)(const float* x, const float* weight, float* out, int64_t n, float eps);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float* out, int64_t n, float eps);
  // n a multiple of 32. The scale of a group that holds a value past 1e38 or a NaN is NaN.
  void (*quantize_q8)(const float* x, int8_t* codes, GroupMeta* meta, int64_t n);
  RowMeta (*quantize_i8)(const float* x, int8_t* codes, int64_t n);  // codes to a multiple of 64, as above
  void (*round_bf16)(const float* x, uint16_t* out, int64_t n);
  void (*head)(const HeadRow&);
  void (*activate)(Activation kind, const float* x, float* out, int64_t n);
  void (*gated)(Activation kind, const float* gate, const float* x, float* out, int64_t n);
  void (*add)(const float* x, const float* y, float* out, int64_t n);
  void (*scale)(const float* x, float by, float* out, int64_t n);
  void (*dequantize)(DType type, const uint8_t* row, float* out, int64_t n);

  float (*maximum)(const float* x, int64_t n);  // NaN when a value is
  // w[i] = exp((x[i] - maximum) * inverse_temperature); sums[i / 256] = their float64 sums by 256.
  void (*exp_weights)(const float* x, float maximum, float inverse_temperature, float* w, double* sums, int64_t n);
};

// The best table this machine can run, lowered by `limit`: "scalar", "avx2", "avx512", "amx" or "" for the
// best.
// Throws std::invalid_argument when `limit` is unknown or more than the machine has.
KernelTable choose_kernels(const char* limit);

namespace scalar {
void fill(KernelTable& table);
}
#ifdef LLMSERVE_X86
namespace avx2 {
void fill(KernelTable& table);
void fill_gemm_int8(KernelTable& table);  // the entries of quantized weights; a part of `fill`
}  // namespace avx2
namespace avx512 {
void fill(KernelTable& table);
}
namespace avx512vnni {
void fill(KernelTable& table);
}
namespace avx512bf16 {
void fill(KernelTable& table);
}
namespace amx {
void fill(KernelTable& table);
void fill_gemm(KernelTable& table);  // the entries of quantized weights; a part of `fill`
}  // namespace amx
#endif

}  // namespace llmserve
