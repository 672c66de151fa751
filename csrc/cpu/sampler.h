// Sampling and log-probabilities of one row of logits.
//
// Order: raw log-probabilities first; then temperature, top-k, top-p, min-p. Ties go to the smaller token id. The draw
// is the inverse of the cumulative distribution over the surviving tokens in ascending id order, with the Philox
// uniform of (seed, position).
#pragma once

#include "cpu/step.h"

namespace llmserve {

// Bytes of scratch for a vocabulary.
size_t sampler_scratch_bytes(int64_t vocab);

void sample_row(const KernelTable& kernels, const Step& step, int row, const float* logits, int64_t vocab,
                uint8_t* scratch);

}  // namespace llmserve
