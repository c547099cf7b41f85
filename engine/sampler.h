// Picks the next token from one row of logits. Stateless: the randomness of answer position t is a function of
// (seed, t), so a preempted and recomputed sequence draws the same tokens, whatever else runs.
#ifndef ATP_ENGINE_SAMPLER_H_
#define ATP_ENGINE_SAMPLER_H_

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "engine/request.h"

namespace atp {

struct SampleContext {
  const SamplingParams* params = nullptr;
  uint64_t seed = 0;                         // of this answer
  std::span<const TokenId> prompt;           // for repetition penalty
  std::span<const TokenId> generated;        // for penalties; its size is the draw's counter
  std::span<const TokenId> forbidden;        // end-of-sequence and stop tokens while min_tokens is not reached
};

struct Sampled {
  TokenId token = 0;
  std::optional<TokenLogprob> logprob;  // when params->logprobs is set
};

// Owns scratch of the vocabulary's size; one per thread.
class Sampler {
 public:
  explicit Sampler(int vocab_size);

  // Order of operations: logprobs of the raw logits; logit_bias; penalties; forbidden; temperature; top_k; top_p; min_p;
  // draw. Ties break toward the smaller id, so greedy is deterministic. logits: [vocab_size], not changed.
  Sampled Sample(std::span<const float> logits, const SampleContext& context);

  // Log probability of `token` and of the `top` most likely ones under softmax(logits): for prompts that are echoed.
  TokenLogprob Logprob(std::span<const float> logits, TokenId token, int top);

 private:
  std::vector<float> scratch_;
  std::vector<int32_t> order_;
  std::vector<int32_t> counts_;
};

// InvalidArgument naming the field, its value and its range, as OpenAI names it ("temperature", "top_p", …).
absl::Status ValidateSampling(const SamplingParams& params, int vocab_size);

}  // namespace atp

#endif  // ATP_ENGINE_SAMPLER_H_
