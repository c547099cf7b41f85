// How well a model predicts given sequences: teacher forcing through the paged cache, many sequences side by
// side.
#ifndef ATP_CLI_EVALUATOR_H_
#define ATP_CLI_EVALUATOR_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/kv_cache.h"
#include "engine/llama_model.h"
#include "engine/request.h"

namespace atp {

struct Score {
  double cross_entropy_sum = 0;  // nats
  int64_t right = 0;             // predictions whose argmax is the next token
  int64_t tokens = 0;            // predictions judged
};

// What to load a model with that Evaluate() runs.
ModelLimits EvaluationLimits(const LlamaConfig& config);
// How many of `sequences` run side by side: enough to fill a step, without a cache of many long ones.
int ParallelSequences(size_t sequences, int context_tokens);

// Position p of a sequence predicts token p + 1; judged are positions p >= first. `kv_cache` must hold
// `parallel_sequences` sequences of the longest one's length. Sums are in the order of the sequences, so the
// result does not depend on how they were batched.
absl::StatusOr<Score> Evaluate(LlamaModel* model, const KvCache& kv_cache, int parallel_sequences,
                               std::span<const std::vector<TokenId>> sequences, int first);

}  // namespace atp

#endif  // ATP_CLI_EVALUATOR_H_
