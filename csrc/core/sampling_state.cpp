#include "core/sampling_state.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace llmserve {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

}  // namespace

void apply_mask(const uint32_t* mask, float* logits, int64_t vocab_size) {
  for (int64_t word = 0; word < mask_words(vocab_size); ++word) {
    const uint32_t bits = mask[word];
    if (bits == ~uint32_t{0}) continue;
    const int64_t first = word * 32;
    const int64_t count = std::min<int64_t>(32, vocab_size - first);
    for (int64_t i = 0; i < count; ++i)
      if ((bits >> i & 1u) == 0) logits[first + i] = kNever;
  }
}

SamplingState::SamplingState(std::vector<int32_t> prompt_token_ids, int64_t vocab_size, SamplingOptions options)
    : vocab_size_(vocab_size),
      options_(std::move(options)),
      num_prompt_tokens_(static_cast<int64_t>(prompt_token_ids.size())),
      token_ids_(std::move(prompt_token_ids)),
      penalizes_(options_.repetition_penalty != 1.0f || options_.frequency_penalty != 0.0f ||
                 options_.presence_penalty != 0.0f) {
  check();
  if (options_.restricts) {
    allowed_.assign(static_cast<size_t>(mask_words(vocab_size_)), 0);
    for (const int32_t id : options_.allowed_token_ids) allowed_[static_cast<size_t>(id / 32)] |= 1u << (id % 32);
  }
  if (options_.repetition_penalty != 1.0f)
    for (const int32_t id : token_ids_) seen(id).in_prompt = true;
}

void SamplingState::check() const {
  require(vocab_size_ > 0, "vocab_size: must be positive");
  require(options_.repetition_penalty > 0.0f, "repetition_penalty: must be above 0");
  require(options_.typical_p > 0.0f && options_.typical_p <= 1.0f, "typical_p: must lie in (0, 1]");
  require(options_.min_tokens >= 0, "min_tokens: must not be negative");
  for (const int32_t id : token_ids_) check_token(id, "prompt_token_ids");
  for (const auto& entry : options_.logit_bias) check_token(entry.first, "logit_bias");
  for (const int32_t id : options_.stop_token_ids) check_token(id, "stop_token_ids");
  for (const int32_t id : options_.allowed_token_ids) check_token(id, "allowed_token_ids");
  for (const auto& word : options_.bad_words) {
    require(!word.empty(), "bad_words: a word has no tokens");
    for (const int32_t id : word) check_token(id, "bad_words");
  }
}

void SamplingState::check_token(int32_t token_id, const char* name) const {
  if (token_id < 0 || token_id >= vocab_size_)
    throw std::invalid_argument(std::string(name) + ": token " + std::to_string(token_id) +
                                " is outside the vocabulary");
}

SamplingState::Seen& SamplingState::seen(int32_t token_id) {
  const auto [entry, is_new] = seen_index_.try_emplace(token_id, static_cast<uint32_t>(seen_.size()));
  if (is_new) seen_.push_back({token_id, 0, false});
  return seen_[entry->second];
}

void SamplingState::rewind(int64_t position) {
  require(position >= num_prompt_tokens_, "states: a position to sample lies in the prompt");
  require(position <= num_tokens(), "states: a position to sample follows tokens that were never recorded");
  for (; num_tokens() > position; token_ids_.pop_back())
    if (penalizes_) --seen(token_ids_.back()).count;
}

void SamplingState::record(int32_t token_id) {
  check_token(token_id, "token_id");
  token_ids_.push_back(token_id);
  if (penalizes_) ++seen(token_id).count;
}

bool SamplingState::holds_back_stop() const {
  return !options_.stop_token_ids.empty() && num_tokens() - num_prompt_tokens_ < options_.min_tokens;
}

bool SamplingState::edits() const {
  return penalizes_ || options_.restricts || !options_.logit_bias.empty() || !options_.bad_words.empty() ||
         holds_back_stop();
}

void SamplingState::apply(float* logits) const {
  for (const auto& [id, bias] : options_.logit_bias) logits[id] += bias;
  if (penalizes_) penalize(logits);
  forbid(logits);
}

void SamplingState::penalize(float* logits) const {
  const float repetition = options_.repetition_penalty;
  for (const Seen& token : seen_) {
    if (token.count == 0 && !token.in_prompt) continue;  // it was rewound
    float logit = logits[token.token_id];
    if (repetition != 1.0f) logit = logit > 0.0f ? logit / repetition : logit * repetition;
    if (token.count > 0) {
      logit -= options_.frequency_penalty * static_cast<float>(token.count);
      logit -= options_.presence_penalty;
    }
    logits[token.token_id] = logit;
  }
}

void SamplingState::forbid(float* logits) const {
  if (!allowed_.empty()) apply_mask(allowed_.data(), logits, vocab_size_);
  forbid_bad_words(logits);
  if (holds_back_stop())
    for (const int32_t id : options_.stop_token_ids) logits[id] = kNever;
}

void SamplingState::forbid_bad_words(float* logits) const {
  const auto num_generated = static_cast<size_t>(num_tokens() - num_prompt_tokens_);
  for (const std::vector<int32_t>& word : options_.bad_words) {
    const size_t num_before = word.size() - 1;
    if (num_before <= num_generated &&
        std::equal(word.begin(), word.end() - 1, token_ids_.end() - static_cast<std::ptrdiff_t>(num_before)))
      logits[word.back()] = kNever;
  }
}

}  // namespace llmserve
