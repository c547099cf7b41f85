// Picks the next token from one row of logits. Stateless: the randomness of answer position t is a function
// of (seed, t), so a preempted and recomputed sequence draws the same tokens, whatever else runs.
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
  uint64_t seed = 0;                   // of this answer
  std::span<const TokenId> prompt;     // for repetition penalty
  std::span<const TokenId> generated;  // for penalties; its size is the draw's counter
  std::span<const TokenId> forbidden;  // end-of-sequence and stop tokens while min_tokens is not reached
};

struct Sampled {
  TokenId token = 0;
  std::optional<TokenLogprob> logprob;  // when params->logprobs is set
};

// Owns scratch of the vocabulary's size; one per thread. Its random numbers: engine/philox.h, key = seed,
// counter = t. A NaN logit is never chosen; if every logit is -inf or NaN, the answer is token 0.
class Sampler {
 public:
  explicit Sampler(int vocab_size);

  // Order of operations: logprobs of the raw logits; logit_bias; penalties; forbidden; temperature; top_k;
  // top_p; min_p; draw. Ties break toward the smaller id, so greedy is deterministic. logits: [vocab_size],
  // not changed.
  Sampled Sample(std::span<const float> logits, const SampleContext& context);

  // Log probability of `token` and of the `top` most likely ones under softmax(logits): for prompts that are
  // echoed.
  TokenLogprob Logprob(std::span<const float> logits, TokenId token, int top);

 private:
  void Adjust(const SampleContext& context);     // logit_bias, penalties and forbidden, on scratch_
  TokenId Choose(const SampleContext& context);  // greedy or a draw, from scratch_

  std::vector<float> scratch_;   // adjusted logits
  std::vector<double> weights_;  // of the tokens, relative to the best one's
  std::vector<int32_t> order_;   // candidates
  std::vector<int32_t> counts_;  // all zero between calls
};

// InvalidArgument naming the field, its value and its range, as OpenAI names it ("temperature", "top_p", …).
absl::Status ValidateSampling(const SamplingParams& params, int vocab_size);

}  // namespace atp

#endif  // ATP_ENGINE_SAMPLER_H_
