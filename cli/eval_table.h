// What `atp eval` says about each way to keep the cache: as JSON, and as a table for people.
#ifndef ATP_CLI_EVAL_TABLE_H_
#define ATP_CLI_EVAL_TABLE_H_

#include <memory>
#include <string>
#include <vector>

#include "cli/baseline_backend.h"
#include "cli/evaluator.h"
#include "engine/compression_plan.h"
#include "nlohmann/json_fwd.hpp"

namespace atp {

struct EvalRow {
  std::string kv_dtype;
  CompressionSettings settings;
  Baseline method = Baseline::kNone;
  std::shared_ptr<const CompressionPlan> plan;  // null: nothing is compressed
  double kv_bytes_ratio = 1;    // bytes of closed segments, as a share of the exact cache of this dtype
  double bf16_bytes_ratio = 1;  // as a share of bf16
  Score score;
};

nlohmann::ordered_json EvalJson(const EvalRow& row);
// To stdout.
void PrintEvalTable(const std::vector<EvalRow>& rows);

}  // namespace atp

#endif  // ATP_CLI_EVAL_TABLE_H_
