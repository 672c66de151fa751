// Rows of an embedding table, of bfloat16.
#pragma once

#include "cuda/abi.h"

namespace llmserve::cuda {

struct EmbedArgs {
  const int32_t* ids;          // [rows], each a row of the table
  const void* table;           // bfloat16 [vocabulary][columns], dense
  const int32_t* positions;    // null, or [rows], each a row of position_table
  const void* position_table;  // null, or bfloat16 [positions][columns], dense
  const void* type_row;        // null, or bfloat16 [columns]
  void* out;                   // [rows][columns], row r at out + r * out_stride values
  int64_t rows, columns, out_stride;
  float scale;  // of the table's rows
  Type type;    // of out: bfloat16 or float32
};

}  // namespace llmserve::cuda

LLMSERVE_CUDA_API int32_t llmserve_cuda_embed(const llmserve::cuda::EmbedArgs* args, void* stream);
