// Binds SamplingState.
#include <memory>
#include <optional>

#include "bindings/bindings.h"
#include "core/sampling_state.h"

namespace llmserve {

namespace {

std::unique_ptr<SamplingState> make_state(std::vector<int32_t> prompt_token_ids, int64_t vocab_size,
                                          float repetition_penalty, float frequency_penalty, float presence_penalty,
                                          std::vector<std::pair<int32_t, float>> logit_bias, int64_t min_tokens,
                                          std::vector<int32_t> stop_token_ids,
                                          std::vector<std::vector<int32_t>> bad_words,
                                          std::optional<std::vector<int32_t>> allowed_token_ids, float typical_p) {
  SamplingOptions options;
  options.repetition_penalty = repetition_penalty;
  options.frequency_penalty = frequency_penalty;
  options.presence_penalty = presence_penalty;
  options.typical_p = typical_p;
  options.min_tokens = min_tokens;
  options.logit_bias = std::move(logit_bias);
  options.stop_token_ids = std::move(stop_token_ids);
  options.bad_words = std::move(bad_words);
  options.restricts = allowed_token_ids.has_value();
  if (options.restricts) options.allowed_token_ids = std::move(*allowed_token_ids);
  return std::make_unique<SamplingState>(std::move(prompt_token_ids), vocab_size, std::move(options));
}

std::optional<std::vector<int32_t>> allowed(const SamplingState& state) {
  if (!state.options().restricts) return std::nullopt;
  return state.options().allowed_token_ids;
}

template <typename T>
auto option(T SamplingOptions::* field) {
  return [field](const SamplingState& state) { return state.options().*field; };
}

}  // namespace

void bind_sampling(py::module_& module) {
  py::class_<SamplingState>(module, "SamplingState", "What the sampling of one sequence remembers.")
      .def(py::init(&make_state), py::arg("prompt_token_ids"), py::kw_only(), py::arg("vocab_size"),
           py::arg("repetition_penalty") = 1.0f, py::arg("frequency_penalty") = 0.0f,
           py::arg("presence_penalty") = 0.0f, py::arg("logit_bias") = py::tuple(), py::arg("min_tokens") = 0,
           py::arg("stop_token_ids") = py::tuple(), py::arg("bad_words") = py::tuple(),
           py::arg("allowed_token_ids") = py::none(), py::arg("typical_p") = 1.0f)
      .def("rewind", &SamplingState::rewind, py::arg("position"))
      .def("record", &SamplingState::record, py::arg("token_id"))
      .def_property_readonly("vocab_size", &SamplingState::vocab_size)
      .def_property_readonly("num_prompt_tokens", &SamplingState::num_prompt_tokens)
      .def_property_readonly("token_ids", &SamplingState::token_ids)
      .def_property_readonly("repetition_penalty", option(&SamplingOptions::repetition_penalty))
      .def_property_readonly("frequency_penalty", option(&SamplingOptions::frequency_penalty))
      .def_property_readonly("presence_penalty", option(&SamplingOptions::presence_penalty))
      .def_property_readonly("typical_p", option(&SamplingOptions::typical_p))
      .def_property_readonly("min_tokens", option(&SamplingOptions::min_tokens))
      .def_property_readonly("logit_bias", option(&SamplingOptions::logit_bias))
      .def_property_readonly("stop_token_ids", option(&SamplingOptions::stop_token_ids))
      .def_property_readonly("bad_words", option(&SamplingOptions::bad_words))
      .def_property_readonly("allowed_token_ids", &allowed);
}

}  // namespace llmserve
