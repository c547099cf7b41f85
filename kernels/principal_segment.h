// The paging around a principal fit, for backends whose memory the host can read: gathers a job's entries and
// reference queries from KV blocks, and writes the fitted entries back.
#ifndef ATP_KERNELS_PRINCIPAL_SEGMENT_H_
#define ATP_KERNELS_PRINCIPAL_SEGMENT_H_

#include <cstdint>
#include <vector>

#include "kernels/key_rounding.h"
#include "kernels/op_args.h"
#include "kernels/principal_fit.h"

namespace atp {

void StoreQuerySample(const StoreQueriesArgs& args, const QuerySampleRow& row);

// One job's dense problem and room for its answer. Keeps its memory from job to job.
class PrincipalSegment {
 public:
  void Gather(const FitPrincipalKeysArgs& args, const PrincipalFitJob& job);
  // After Gather() of the same job, and the fit.
  void Scatter(const FitPrincipalKeysArgs& args, const PrincipalFitJob& job);

  const PrincipalFitProblem& problem() const { return problem_; }
  PrincipalFit* fit() { return &fit_; }
  PrincipalFitReport report() const { return {fit_.mass_residual, fit_.output_residual, fit_.fitted}; }

 private:
  void GatherEntries(const KvPool& pool, const KvPage& page, const BlockId* blocks, int count);
  void GatherQueries(const FitPrincipalKeysArgs& args, const PrincipalFitJob& job);
  void PrepareAngles(const FitPrincipalKeysArgs& args, const PrincipalFitJob& job);

  std::vector<float> keys_, values_, log_mass_, queries_;
  std::vector<float> fitted_keys_, fitted_values_, fitted_log_mass_;
  std::vector<int32_t> chosen_;
  // Angles of positions: cosines and sines of (position mod 64) · frequency and of 64 k · frequency, whose
  // sums are all of them. [rows, 2, head_dim / 2]; coarse_[0] is of k = coarse_begin_.
  std::vector<float> frequencies_;
  std::vector<double> fine_, coarse_;
  int coarse_begin_ = 0;
  std::vector<uint16_t> bits_;  // of one query
  KeyRounding rounding_;
  PrincipalFitProblem problem_;
  PrincipalFit fit_;
};

}  // namespace atp

#endif  // ATP_KERNELS_PRINCIPAL_SEGMENT_H_
