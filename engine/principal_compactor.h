// What a step keeps and compresses: layer by layer the queries of tokens whose segment will be compressed,
// and the fits, of all layers together, of the segments that the step makes whole. Turns the batch's entries,
// their plans and block tables into the arguments of StoreQueries and FitPrincipalKeys. Keeps its memory from
// step to step.
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

  // What to keep in one layer; empty: nothing. Valid until the next call.
  std::span<const QuerySampleRow> Queries(int layer);
  // What to fit once all layers have stored their entries and kept their queries; empty: nothing. No fit
  // reads what another writes. Valid until Begin().
  std::span<const PrincipalFitJob> Jobs();
  // Where they report, one for each job.
  std::span<PrincipalFitReport> reports() { return reports_; }
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

  void AddJob(const Closing& closing, int head);  // head: of all layers'

  const int layers_, heads_, kv_heads_;
  std::vector<Sample> samples_;
  std::vector<Closing> closings_;
  std::vector<QuerySampleRow> rows_;
  std::vector<PrincipalFitJob> jobs_;
  std::vector<int32_t> positions_;  // [closings][layers][heads][samples]: where each reference is asked from
  std::vector<PrincipalFitReport> reports_;  // of each job
};

}  // namespace atp

#endif  // ATP_ENGINE_PRINCIPAL_COMPACTOR_H_
