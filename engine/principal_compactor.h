// What a step keeps and compresses, layer by layer: the queries of tokens whose segment will be compressed,
// and the fits of the segments that the step makes whole. Turns the batch's entries, their plans and block
// tables into the arguments of StoreQueries and FitPrincipalKeys. Keeps its memory from step to step.
#ifndef ATP_ENGINE_PRINCIPAL_COMPACTOR_H_
#define ATP_ENGINE_PRINCIPAL_COMPACTOR_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/batch.h"
#include "kernels/op_args.h"

namespace atp {

class PrincipalCompactor {
 public:
  PrincipalCompactor(int layers, int heads, int kv_heads);

  // A new step. The batch, its tables and plans outlive the step.
  void Begin(const Batch& batch);

  // What to keep and to fit in one layer; empty: nothing. Valid until the next call of the same method.
  std::span<const QuerySampleRow> Queries(int layer);
  std::span<const PrincipalFitJob> Jobs(int layer);
  // Where that layer's fits report, one for each job.
  std::span<PrincipalFitReport> Reports(int layer);
  // Of all layers of the step, once its last layer is computed.
  std::span<const PrincipalFitReport> reports() const { return reports_; }

 private:
  struct Sample {
    const BatchEntry* entry;
    int32_t row;
    int32_t sample;
  };
  struct Closing {
    const BatchEntry* entry;
    int segment;
  };

  const int layers_, heads_, kv_heads_;
  std::vector<Sample> samples_;
  std::vector<Closing> closings_;
  std::vector<QuerySampleRow> rows_;
  std::vector<PrincipalFitJob> jobs_;
  std::vector<int32_t> positions_;           // [closings][heads][samples]: where each reference is asked from
  std::vector<PrincipalFitReport> reports_;  // of each job, layer by layer
  std::vector<size_t> first_report_;         // [layers + 1]
};

}  // namespace atp

#endif  // ATP_ENGINE_PRINCIPAL_COMPACTOR_H_
