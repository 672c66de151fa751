// Blocks of every quantized type by definition: one value at a time, sharing nothing with the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace llmserve::test {

// Value `i` of a block, not rounded.
double block_value(DType dtype, const uint8_t* block, int i);

// What a code of the 4-bit codebook stands for.
int codebook_value(int code);

// Where a block keeps its float16 numbers; any other bytes are legal.
std::vector<size_t> half_offsets(DType dtype);

}  // namespace llmserve::test
