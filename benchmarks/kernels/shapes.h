// The matrices of some models, each with the epilogue that it has in a network.
#pragma once

#include <string>
#include <vector>

namespace llmserve::bench {

enum class Part : int { kQkv, kO, kGateUp, kDown, kHead, kSquare };
constexpr const char* kPartNames[] = {"qkv", "o", "gate_up", "down", "head", "square"};

struct Matrix {
  const char* shape;
  Part part;
  int64_t rows, columns;                      // N, K
  int heads = 0, kv_heads = 0, head_dim = 0;  // qkv only
  bool bias = false;

  const char* part_name() const { return kPartNames[static_cast<int>(part)]; }
};

struct Shape {
  const char* name;
  int hidden, heads, kv_heads, head_dim, intermediate, vocab;
  bool bias;      // of Q, K and V
  bool detailed;  // a full run measures every M

  std::vector<Matrix> matrices() const;
};

constexpr Shape kShapes[] = {
    {"smollm2-135m", 576, 9, 3, 64, 1536, 49152, false, true},
    {"qwen2.5-0.5b", 896, 14, 2, 64, 4864, 151936, true, false},
    {"llama-3.2-1b", 2048, 32, 8, 64, 8192, 128256, false, true},
    {"llama-3-8b", 4096, 32, 8, 128, 14336, 128256, false, false},
    // Not a model: where libraries of GEMM are at their best.
    {"square-2048", 2048, 0, 0, 0, 0, 0, false, false},
};

inline std::vector<Matrix> Shape::matrices() const {
  if (heads == 0) return {{name, Part::kSquare, hidden, hidden}};
  return {{name, Part::kQkv, (heads + 2 * kv_heads) * head_dim, hidden, heads, kv_heads, head_dim, bias},
          {name, Part::kO, hidden, heads * head_dim},
          {name, Part::kGateUp, 2 * intermediate, hidden},
          {name, Part::kDown, hidden, intermediate},
          {name, Part::kHead, vocab, hidden}};
}

}  // namespace llmserve::bench
