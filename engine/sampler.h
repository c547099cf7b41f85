// What is asked of each row of a step's logits, in the words of Backend::SampleTokens, and what comes back.
// The randomness of answer position t is a function of (seed, t), so a preempted and recomputed sequence
// draws the same tokens, whatever else runs.
#ifndef ATP_ENGINE_SAMPLER_H_
#define ATP_ENGINE_SAMPLER_H_

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "engine/request.h"
#include "kernels/op_args.h"

namespace atp {

struct SampleContext {
  const SamplingParams* params = nullptr;
  uint64_t seed = 0;                   // of this answer
  std::span<const TokenId> prompt;     // for repetition penalty; each token once is enough
  std::span<const TokenId> generated;  // for penalties; its size is the draw's counter
  std::span<const TokenId> forbidden;  // end-of-sequence and stop tokens while min_tokens is not reached
};

struct Sampled {
  TokenId token = 0;
  std::optional<TokenLogprob> logprob;  // when params->logprobs is set
};

// Of one step. The random numbers: engine/philox.h, key = seed, counter = t.
class SampleRows {
 public:
  explicit SampleRows(int vocab_size) : places_(static_cast<size_t>(vocab_size)) {}

  void Clear();
  // A token is drawn from `row` of the logits. The context's spans are not read again.
  void Draw(int row, const SampleContext& context);
  // Log probability of `token` and of the `top` most likely ones at `row`: for prompts that are echoed.
  void Score(int row, TokenId token, int top);

  // In order of the calls above, until the next one.
  std::span<const SampleRow> rows();
  std::span<SampledRow> sampled() { return {sampled_.data(), rows_.size()}; }
  // Of row `index`, once it has been sampled.
  Sampled Result(size_t index) const;

 private:
  SampleRow& NextRow();
  LogitAdjustment* Adjustment(TokenId token);  // null: no such token

  std::vector<SampleRow> rows_;
  std::vector<SampledRow> sampled_;
  std::vector<LogitAdjustment> adjustments_;  // of all rows
  std::vector<size_t> ends_;                  // [rows] of each row's adjustments
  std::vector<int32_t> places_;  // [vocab] of the row in progress: from its first one, plus 1; else 0
};

// InvalidArgument naming the field, its value and its range, as OpenAI names it ("temperature", "top_p", …).
absl::Status ValidateSampling(const SamplingParams& params, int vocab_size);

}  // namespace atp

#endif  // ATP_ENGINE_SAMPLER_H_
