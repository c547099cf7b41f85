// How well a model predicts given sequences, with its history exact and compressed in several ways. Runs what
// serving runs: scheduler, model, compactor, in the same three calls per step, many sequences side by side,
// each as a prompt whose log probabilities are wanted.
#ifndef ATP_CLI_EVALUATOR_H_
#define ATP_CLI_EVALUATOR_H_

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/compression_plan.h"
#include "engine/kv_cache.h"
#include "engine/llama_model.h"
#include "engine/request.h"

namespace atp {

// Recall by distance: bucket i counts distances of 2^i to 2^(i+1) - 1 tokens.
inline constexpr int kDistanceBuckets = 20;

struct Recall {
  int64_t right = 0;
  int64_t tokens = 0;
};

struct Score {
  double cross_entropy_sum = 0;  // nats
  double kl_sum = 0;             // KL(exact || this), nats; 0 for the exact one
  int64_t agree = 0;             // predictions whose argmax is the exact one's
  int64_t right = 0;             // predictions whose argmax is the next token
  int64_t tokens = 0;            // predictions judged
  int64_t held_bytes = 0;        // KV bytes that the sequences hold with their last token, summed
  int64_t exact_bytes = 0;       // what the same tokens take exact

  std::array<Recall, kDistanceBuckets> recall = {};  // of predictions that an earlier place gives away

  double CrossEntropy() const { return cross_entropy_sum / static_cast<double>(tokens); }
  double Kl() const { return kl_sum / static_cast<double>(tokens); }
  void Add(const Score& other);
};

// One way to run the sequences.
struct EvaluationCase {
  std::shared_ptr<const CompressionPlan> plan;  // null: exact
  std::function<void()> prepare;                // called before it runs; may be empty
  size_t block_bytes = 0;                       // of a pool made for this case alone; 0: of the exact cache
};

// For each position, how far back the answer to its prediction lies: where the last `tokens` tokens came
// before, most recently, and the token after them there is the next one here. 0: no such place.
std::vector<int> RecallDistances(std::span<const TokenId> ids, int tokens);

// What to load a model with that Evaluate() runs.
ModelLimits EvaluationLimits(const LlamaConfig& config);

// Position p of a sequence predicts token p + 1; judged are positions p >= first. Returns the score of the
// exact cache, then one for each case. Sums are in the order of the sequences, so the result does not depend
// on how they were batched. `shape.compressible` must be set where a case has a plan. `recall_tokens` is of
// RecallDistances(). `progress` (may be
// empty) is told runs done and all runs.
absl::StatusOr<std::vector<Score>> Evaluate(LlamaModel* model, Backend* backend, const KvCache::Shape& shape,
                                            std::span<const std::vector<TokenId>> sequences, int first,
                                            std::span<const EvaluationCase> cases, int recall_tokens = 2,
                                            const std::function<void(int, int)>& progress = {});

}  // namespace atp

#endif  // ATP_CLI_EVALUATOR_H_
