// One engine step: which tokens of which sequences run, and which rows' logits are wanted. Made by the
// scheduler, read by the model and by Commit. Plain data with stable storage; reused from step to step, so a
// step allocates nothing new.
#ifndef ATP_ENGINE_BATCH_H_
#define ATP_ENGINE_BATCH_H_

#include <cstdint>
#include <span>
#include <vector>

#include "engine/request.h"

namespace atp {

class Sequence;
class BlockTable;
class CompressionPlan;

struct BatchEntry {
  Sequence* sequence = nullptr;       // owned by the scheduler; null in offline use (eval)
  const BlockTable* table = nullptr;  // where its entries lie
  int first_row = 0;                  // its rows in the batch: [first_row, first_row + rows)
  int rows = 0;                       // 1 in decode, a chunk in prefill
  int exact_entries = 0;              // in the cache, this step's rows included (KvSequence::exact_entries)
  int first_logit = 0;                // its rows in the logits: [first_logit, first_logit + logits)
  int logits = 0;  // 0 in mid-prompt, 1 when it samples, more when prompt log probabilities are wanted;
                   // always its last `logits` rows
  // Set where the segment of these rows will be compressed: their queries are kept for its fit. Rows never go
  // beyond the end of a segment.
  const CompressionPlan* plan = nullptr;
  // Set where these rows are a whole segment of a prompt, whose linear layers take low-rank inputs.
  const CompressionPlan* low_rank = nullptr;
  bool closes_segment = false;  // with these rows it is whole, and is fitted in this step
};

struct Batch {
  std::vector<int32_t> tokens;      // [rows]
  std::vector<int32_t> positions;   // [rows], true position of each token
  std::vector<int32_t> logit_rows;  // rows whose logits are wanted, ascending
  std::vector<BatchEntry> entries;

  bool empty() const { return entries.empty(); }
  int rows() const { return static_cast<int>(tokens.size()); }
  void Clear() {
    tokens.clear();
    positions.clear();
    logit_rows.clear();
    entries.clear();
  }
};

}  // namespace atp

#endif  // ATP_ENGINE_BATCH_H_
