// What the sampling of one sequence remembers: its parameters, the tokens of its prompt and those generated so far.
//
// It belongs to the sequence, not to a step: it survives a preemption, and a step that fails leaves it as it was,
// because tokens are recorded only when a step has ended. `ops/reference_sampler.py` defines what it does to logits.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace llmserve {

struct SamplingOptions {
  float repetition_penalty = 1.0f;
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  float typical_p = 1.0f;
  int64_t min_tokens = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;
  std::vector<int32_t> stop_token_ids;
  std::vector<std::vector<int32_t>> bad_words;
  bool restricts = false;  // whether only `allowed_token_ids` may be sampled
  std::vector<int32_t> allowed_token_ids;
};

class SamplingState {
 public:
  // Throws std::invalid_argument for an id outside the vocabulary and for options out of range.
  SamplingState(std::vector<int32_t> prompt_token_ids, int64_t vocab_size, SamplingOptions options);

  int64_t vocab_size() const { return vocab_size_; }
  const SamplingOptions& options() const { return options_; }
  const std::vector<int32_t>& token_ids() const { return token_ids_; }
  int64_t num_prompt_tokens() const { return num_prompt_tokens_; }
  int64_t num_tokens() const { return static_cast<int64_t>(token_ids_.size()); }

  // Forgets the tokens from `position` on: the one to be sampled there is not known yet. Throws std::invalid_argument
  // when it lies in the prompt, or when tokens before it were never recorded.
  void rewind(int64_t position);
  // The token sampled at position `num_tokens()`. Throws std::invalid_argument for one outside the vocabulary.
  void record(int32_t token_id);

  // Whether `apply` would change anything at the present position.
  bool edits() const;
  // Bias, penalties, then -infinity for what must not be sampled now. logits [vocab_size].
  void apply(float* logits) const;

 private:
  struct Seen {
    int32_t token_id;
    int32_t count;  // among the generated tokens
    bool in_prompt;
  };

  void check() const;
  void check_token(int32_t token_id, const char* name) const;
  Seen& seen(int32_t token_id);
  void penalize(float* logits) const;
  void forbid(float* logits) const;
  void forbid_bad_words(float* logits) const;
  bool holds_back_stop() const;

  int64_t vocab_size_;
  SamplingOptions options_;
  int64_t num_prompt_tokens_;
  std::vector<int32_t> token_ids_;  // prompt, then generated
  bool penalizes_;
  std::vector<uint32_t> allowed_;  // one bit a token; empty: all
  std::vector<Seen> seen_;         // only where a penalty needs it
  std::unordered_map<int32_t, uint32_t> seen_index_;
};

// Bits of a mask over a vocabulary: words, lowest bit first; a clear bit becomes -infinity.
inline int64_t mask_words(int64_t vocab_size) { return (vocab_size + 31) / 32; }
void apply_mask(const uint32_t* mask, float* logits, int64_t vocab_size);

}  // namespace llmserve
