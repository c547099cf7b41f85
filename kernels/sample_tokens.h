// SampleTokens on the host: what the backends whose logits lie there use, and what the others are tested
// against.
#ifndef ATP_KERNELS_SAMPLE_TOKENS_H_
#define ATP_KERNELS_SAMPLE_TOKENS_H_

#include <cstdint>
#include <vector>

#include "kernels/op_args.h"

namespace atp {

// Owns scratch of the vocabulary's size.
class TokenSampler {
 public:
  void Sample(const SampleTokensArgs& args);

 private:
  int32_t Choose(const SampleRow& row);                               // greedy or a draw, from logits_
  void Score(const float* logits, int count, SampledRow* out) const;  // log probabilities of the raw logits

  std::vector<float> logits_;           // adjusted
  std::vector<double> weights_;         // of the tokens, relative to the best one's
  std::vector<int32_t> order_;          // candidates
  mutable std::vector<int32_t> ranks_;  // of Score
};

}  // namespace atp

#endif  // ATP_KERNELS_SAMPLE_TOKENS_H_
