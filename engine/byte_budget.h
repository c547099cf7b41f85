// Spending on kv heads. Bytes: how many principal entries each keeps, and in how many bits, so that a closed
// segment takes at most a given share of what bf16 takes for its tokens; counted is what the engine stores:
// scales, log masses, the padding of pages, and whole blocks. Or entries alone, of one number of bits.
#ifndef ATP_ENGINE_BYTE_BUDGET_H_
#define ATP_ENGINE_BYTE_BUDGET_H_

#include <vector>

#include "absl/status/statusor.h"
#include "engine/compression_budgets.h"
#include "engine/compression_plan.h"

namespace atp {

// Bytes of the blocks of closed segments, as a share of what their tokens take exact in bf16. Under a cap: of
// the whole history at the last position.
double ShareOfBf16(const CompressionPlan& plan, const CompressionShape& shape);

// The same of exact tokens in the cache's own format.
double ExactShareOfBf16(const CompressionShape& shape);

struct HeadBudgets {
  std::vector<double> ratio;  // [layers * kv_heads]
  std::vector<int> bits;
};

// `share` of bf16 bytes, (0, 1], spent where it lowers the KL the most: from the least that a head can have,
// always the step with the largest fall of KL per byte: a page, or nothing but the sinks where the budgets
// know what that causes. The KL of a head with r entries per token and b bits
// is taken from the curves that `atp calibrate` measured: what r alone and b alone cause, added. Entries come
// in whole pages. `settings`: segment and window. InvalidArgument where `budgets` has no curves, naming
// `source`, and where the share is less than the least.
absl::StatusOr<HeadBudgets> SpendBytes(const CompressionBudgets& budgets, double share,
                                       const CompressionSettings& settings, const CompressionShape& shape,
                                       const std::string& source);

// Entries per token of each head, with a mean of `mean_ratio`. The budgets' own where their mean is that.
// Where they have curves, whole blocks of entries spent as above, sinks not counted; else, and where
// that is too little for whole blocks, by ShareBudget(). InvalidArgument naming `source` where there is no
// sensitivity.
absl::StatusOr<std::vector<double>> RatiosForMean(const CompressionBudgets& budgets, double mean_ratio,
                                                  int segment_tokens, int block_entries,
                                                  const std::string& source);

}  // namespace atp

#endif  // ATP_ENGINE_BYTE_BUDGET_H_
