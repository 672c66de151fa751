// Sampling and log-probabilities of one row of logits.
//
// Order: raw log-probabilities first; then bias, penalties and masks (where the row has a state or a mask),
// temperature, top-k, typical-p, top-p, min-p. Ties go to the smaller token id. The draw is the inverse of the
// cumulative distribution over the surviving tokens in ascending id order, with the Philox uniform of (seed, position).
#pragma once

#include "cpu/step.h"

namespace llmserve {

// Output of a row whose masks leave no token.
constexpr int32_t kNoToken = -1;
// Output of a row, sampled or scored, whose logits hold a NaN or have no finite maximum.
constexpr int32_t kNotFinite = -2;

// Bytes of scratch for a vocabulary.
size_t sampler_scratch_bytes(int64_t vocab);

// One row of logits. `maxima`, where it is there, has the largest of each 64 of them: a greedy choice reads little
// more.
struct LogitRow {
  const float* logits;
  int64_t vocab;
  const float* maxima = nullptr;
};

void sample_row(const KernelTable& kernels, const Step& step, int row, const LogitRow& logits, uint8_t* scratch);

}  // namespace llmserve
