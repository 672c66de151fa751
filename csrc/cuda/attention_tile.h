// What decode and prefill attention share, to the bit: tiles of 64 keys and values in shared memory, the operands that
// matrix instructions get from them, scores, the running softmax, and how states of ranges of keys are merged.
//
// A tile of keys or values is 64 rows, one a token, of kDim values (head_dim rounded up, zeros behind it) in the type
// of the cache. Rows are stored in pieces of 16 bytes, and the piece p of row r lies at swizzle(r, p), so that the
// eight rows of one 8x8 matrix are in different banks:
//
//   row 0:  p0 p1 p2 p3 p4 p5 p6 p7 | p8 ...         (rows of 128 bytes and more: p ^ r % 8)
//   row 1:  p1 p0 p3 p2 p5 p4 p7 p6 | p9 ...
//   row 2:  p2 p3 p0 p1 p6 p7 p4 p5 | p10 ...
//
// One-byte values become bfloat16 (exactly) four at a time, bytes 0 and 2 of a word in one register and bytes 1 and 3
// in another. Of 16 values of head_dim the instruction thus sees first the even ones, then the odd ones. Queries are
// put into the same order, and in the outputs four neighbours of head_dim are in one lane. float16 would lose small
// probabilities times scales, so float8 is multiplied as bfloat16 too.
//
// What is not a visible token is never read: neither its slot nor its entry of the block table, which may hold
// anything. It is zeros in shared memory.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/kv_cache.h"
#include "cuda/ptx.h"

namespace llmserve::cuda {

constexpr int kTileTokens = 64;
constexpr int kChunkTokens = 16;  // of a step of the product of probabilities and values
constexpr int kChunks = kTileTokens / kChunkTokens;
constexpr int kRowTile = 16;  // query rows of one matrix instruction
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;

template <typename C>
constexpr bool kHasScales = sizeof(C) == 1;

// What matrix instructions multiply for a cache of C.
template <typename C>
using Operand = std::conditional_t<std::is_same_v<C, __half>, __half, __nv_bfloat16>;

// --- words of two values -------------------------------------------------------------------------------------------

__device__ inline uint32_t word_of(__nv_bfloat162 x) {
  uint32_t out;
  memcpy(&out, &x, sizeof(out));
  return out;
}

template <typename T>
__device__ uint32_t pack(float low, float high) {
  uint32_t out;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(low, high);
    memcpy(&out, &both, sizeof(out));
  } else {
    out = word_of(__floats2bfloat162_rn(low, high));
  }
  return out;
}

__device__ inline __nv_bfloat162 pair_of(uint32_t word) {
  __nv_bfloat162 out;
  memcpy(static_cast<void*>(&out), &word, sizeof(out));
  return out;
}

// Four bytes to bfloat16: bytes 0 and 2, bytes 1 and 3.
template <typename C>
__device__ void unpack(uint32_t word, uint32_t& even, uint32_t& odd) {
  if constexpr (std::is_same_v<C, int8_t>) {
    // With the low seven bits as a mantissa 0x4300 is 128 + them; less 128, or 256 (0x4380) where the sign is set.
    const auto value = [](uint32_t bytes) {
      return word_of(
          __hsub2(pair_of((bytes & 0x007F007Fu) | 0x43004300u), pair_of((bytes & 0x00800080u) | 0x43004300u)));
    };
    even = value(word);
    odd = value(word >> 8);
  } else {
    // Exponent and mantissa of e4m3 moved into those of bfloat16 are the value times 2^(7 - 127), also below 2^-6. The
    // code of NaN is 480 here: who writes the cache puts what is not finite into the scale.
    const __nv_bfloat162 factor = pair_of(0x7B807B80u);  // 2^120
    const auto value = [&](uint32_t signs, uint32_t rest) {
      return word_of(__hmul2(pair_of((signs & 0x80008000u) | (rest & 0x07F007F0u)), factor));
    };
    even = value(word << 8, word << 4);
    odd = value(word, word >> 4);
  }
}

template <typename T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    mma_f16(d, a, b);
  else
    mma_bf16(d, a, b);
}

// --- a tile in shared memory ---------------------------------------------------------------------------------------

// Where in a tile a lane begins, in bytes. Opaque, as else the compiler works out the addresses of all steps before the
// loop over tiles and has no registers left for it.
struct LaneOffset {
  unsigned row, piece;
};

// Rows of kDim values of T.
template <typename T, int kDim>
struct Tile {
  static constexpr int kPieces = kDim * static_cast<int>(sizeof(T)) / 16;
  static constexpr int kSpread = kPieces % 8 == 0 ? 8 : kPieces % 4 == 0 ? 4 : 2;  // pieces that change places
  static constexpr int kBytes = kTileTokens * kPieces * 16;

  static __device__ unsigned swizzle(unsigned row) { return row / (8 / kSpread) % kSpread; }

  // Bytes from the tile's start to a piece of a row.
  static __device__ unsigned at(unsigned row, unsigned piece) { return (row * kPieces + (piece ^ swizzle(row))) * 16; }

  // The same of lane.row + `rows` and lane.piece + `pieces`, which all lanes have in common: 16 divides the former, and
  // the latter has none of the bits that a lane's piece may have. All `rows` share one register of addresses.
  static __device__ unsigned at(LaneOffset lane, unsigned rows, unsigned pieces) {
    return lane.row + rows * kPieces * 16 + ((pieces * 16) ^ lane.piece);
  }

  static __device__ LaneOffset lane_offset(unsigned row, unsigned piece) {
    return {opaque(row * kPieces * 16), opaque((piece ^ swizzle(row)) * 16)};
  }
};

// Keys, values and, where the type has them, the scales of both: what is copied as one.
template <typename C, int kDim>
struct Stage {
  static constexpr int kKeys = 0, kValues = Tile<C, kDim>::kBytes, kKeyScales = 2 * kValues;
  static constexpr int kValueScales = kKeyScales + kTileTokens * 4;
  static constexpr int kBytes = kHasScales<C> ? kValueScales + kTileTokens * 4 : kKeyScales;
};

// Which tokens of a sequence a tile is to hold: `first` to `end` of those from `start` on, the others are zeros.
struct TokenRange {
  int start, first, end;
};

// Starts the copies of a tile by kThreads threads. Each warp reads the tile's entries of the block table once.
template <typename C, int kDim, int kThreads>
__device__ void load_tile(const KvCache& cache, const int32_t* table, int kv_head, TokenRange range,
                          unsigned char* stage) {
  using Layout = Tile<C, kDim>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, size = static_cast<int>(cache.block_size);
  const int shift = __ffs(size) - 1, first_block = range.start >> shift;
  const int own_start = (first_block + lane) << shift;
  const bool is_needed = own_start < min(range.end, range.start + kTileTokens) && own_start + size > range.first;
  const int entry = is_needed ? table[first_block + lane] : 0;
  const int pieces = static_cast<int>(cache.head_dim * sizeof(C)) / 16;
  const auto slot_of = [&](int token) {
    const int64_t block = __shfl_sync(kAllLanes, entry, (token >> shift) - first_block);
    return ((block * cache.kv_heads + kv_head) << shift) + (token & (size - 1));
  };
  const auto exists = [&](int token) { return token >= range.first && token < range.end; };
#pragma unroll 4
  for (int i = 0; i < kTileTokens * Layout::kPieces / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x), row = index / Layout::kPieces;
    const int piece = index % Layout::kPieces, token = range.start + row;
    const bool is_copied = exists(token) && piece < pieces;
    const int64_t from = slot_of(token) * cache.head_dim * static_cast<int64_t>(sizeof(C)) + piece * 16;
    const int64_t offset = is_copied ? from : 0;
    cp_async(stage + Stage<C, kDim>::kKeys + Layout::at(row, piece), static_cast<const char*>(cache.k) + offset,
             is_copied);
    cp_async(stage + Stage<C, kDim>::kValues + Layout::at(row, piece), static_cast<const char*>(cache.v) + offset,
             is_copied);
  }
  if constexpr (kHasScales<C>) {
    if (threadIdx.x >= kWarp) return;
    const int row = lane % 16 * 4, token = range.start + row;  // four tokens of one block
    const bool is_copied = token + 3 >= range.first && token < range.end;
    const int64_t offset = slot_of(token);
    const float* from = lane < 16 ? cache.k_scales : cache.v_scales;
    const int to = lane < 16 ? Stage<C, kDim>::kKeyScales : Stage<C, kDim>::kValueScales;
    cp_async(stage + to + row * 4, from + (is_copied ? offset : 0), is_copied);
  }
}

// For load_keys and load_values of one tile.
template <typename T, int kDim>
__device__ LaneOffset key_offset() {
  const unsigned lane = threadIdx.x % kWarp;
  return Tile<T, kDim>::lane_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

template <typename T, int kDim>
__device__ LaneOffset value_offset() {
  return Tile<T, kDim>::lane_offset(threadIdx.x % 16, threadIdx.x % kWarp / 16);
}

// Operands of scores: 16 keys from `row` on, of 16 bits, times the values 16 * step on. a[0]: keys 0 to 7, b: 8 to 15.
template <typename T, int kDim>
__device__ void load_keys(const unsigned char* tile, LaneOffset lane, int row, int step, uint32_t (&a)[2],
                          uint32_t (&b)[2]) {
  uint32_t words[4];
  ldmatrix(words, tile + Tile<T, kDim>::at(lane, row, 2 * step));
  a[0] = words[0], a[1] = words[1], b[0] = words[2], b[1] = words[3];
}

// Operands of outputs: 16 values of 16 bits from `row` on, of the columns 16 * unit on. a: columns 0 to 7, b: 8 on.
template <typename T, int kDim>
__device__ void load_values(const unsigned char* tile, LaneOffset lane, int row, int unit, uint32_t (&a)[2],
                            uint32_t (&b)[2]) {
  uint32_t words[4];
  ldmatrix_transposed(words, tile + Tile<T, kDim>::at(lane, row, 2 * unit));
  a[0] = words[0], a[1] = words[1], b[0] = words[2], b[1] = words[3];
}

// The left operands of scores: two rows of queries, null for rows that are zeros, in the order of the cache's values.
template <typename C, int kDim>
__device__ void load_query(const __nv_bfloat16* low, const __nv_bfloat16* high, int head_dim, int step,
                           uint32_t (&a)[4]) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
  const __nv_bfloat16* rows[2] = {low, high};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t words[2] = {0, 0};
    const int first = 16 * step + (kHasScales<C> ? 4 * quad : 2 * quad);
    if constexpr (kHasScales<C>) {
      if (rows[i] != nullptr && first < head_dim) {
        const uint2 four = *reinterpret_cast<const uint2*>(rows[i] + first);
        words[0] = __byte_perm(four.x, four.y, 0x5410), words[1] = __byte_perm(four.x, four.y, 0x7632);
      }
    } else {
      for (int half = 0; half < 2; ++half)
        if (rows[i] != nullptr && first + 8 * half < head_dim)
          words[half] = *reinterpret_cast<const uint32_t*>(rows[i] + first + 8 * half);
    }
    for (int half = 0; half < 2; ++half) {
      if constexpr (std::is_same_v<Operand<C>, __half>) {
        const __nv_bfloat162 both = pair_of(words[half]);
        words[half] = pack<__half>(__low2float(both), __high2float(both));
      }
      a[2 * half + i] = words[half];
    }
  }
}

// --- softmax -------------------------------------------------------------------------------------------------------

// Scores are kept times log2(e), so that probabilities are powers of two.
struct ScoreRule {
  float factor;  // of products: scale * log2(e), or scale / cap where there is a cap
  float cap;     // zero, or cap * log2(e)
};

inline ScoreRule score_rule(float scale, float softcap) {
  if (softcap == 0.0f) return {scale * kLog2E, 0.0f};
  return {scale / softcap, softcap * kLog2E};
}

__device__ inline float score(float product, ScoreRule rule) {
  const float x = __fmul_rn(product, rule.factor);
  if (rule.cap == 0.0f) return x;
  const float e = exp2_fast(__fmul_rn(x, 2.0f * kLog2E));  // tanh(x) = 1 - 2 / (e^2x + 1)
  return __fmul_rn(rule.cap, __fsub_rn(1.0f, __fdividef(2.0f, __fadd_rn(e, 1.0f))));
}

// What scores and maxima are taken less, which must be finite.
__device__ inline float finite_maximum(float maximum) { return maximum == kNothing ? 0.0f : maximum; }

// A row's largest score goes from `maximum` to `larger`: what its sums so far are multiplied by.
__device__ inline float rescaling(float maximum, float larger) {
  return exp2_fast(__fsub_rn(maximum, finite_maximum(larger)));
}

__device__ inline float probability(float score, float finite) { return exp2_fast(__fsub_rn(score, finite)); }

// Largest over the four lanes of a row.
__device__ inline float largest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Ones in every lane: the right operand whose product with probabilities is their sum.
template <typename T>
constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3C003C00u : 0x3F803F80u;

// The state of a row over a range of keys, without its output: the largest score and the sum of probabilities.
struct RowState {
  float maximum = kNothing, sum = 0.0f;
};

struct MergeWeights {
  float before, added;
};

// `state` gets the keys of `other`; outputs are to be merged by what is returned. Both kernels merge by these words.
__device__ inline MergeWeights merge(RowState& state, RowState other) {
  const float larger = fmaxf(state.maximum, other.maximum);
  const MergeWeights weights{rescaling(state.maximum, larger), rescaling(other.maximum, larger)};
  state.sum = __fmaf_rn(other.sum, weights.added, __fmul_rn(state.sum, weights.before));
  state.maximum = larger;
  return weights;
}

__device__ inline float merged(float before, float added, MergeWeights weights) {
  return __fmaf_rn(added, weights.added, __fmul_rn(before, weights.before));
}

// What a row's output is multiplied by at the end; `sink` points to its head's, or is null.
__device__ inline float normalization(RowState state, const float* sink) {
  float sum = state.sum;
  if (sink != nullptr) sum = __fadd_rn(sum, exp2_fast(__fmaf_rn(*sink, kLog2E, -finite_maximum(state.maximum))));
  return sum == 0.0f ? 0.0f : __frcp_rn(sum);
}

}  // namespace llmserve::cuda
