// How a mean ratio of compression is shared among kv heads: a few heads find one earlier token and copy from
// it, and must keep their keys; most do not mind. `atp calibrate` measures that, a JSON file beside the model
// keeps it:
//   {"ratio": [[one number per kv head] per layer], "bits": the same shape, "sensitivity": ...}
#ifndef ATP_ENGINE_COMPRESSION_BUDGETS_H_
#define ATP_ENGINE_COMPRESSION_BUDGETS_H_

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace atp {

inline constexpr std::string_view kBudgetsFileName = "atp_budgets.json";
// To what ratio a head is compressed to measure its sensitivity.
inline constexpr double kSensitivityRatio = 1.0 / 16;

struct CompressionBudgets {
  int layers = 0;
  int kv_heads = 0;
  // [layers * kv_heads], layer-major, each in [0, 1], not all 0 (CompressionSettings::head_ratio).
  std::vector<double> ratio;
  std::vector<int> bits;  // per element of each head's entries: 16, 8 or 4; empty: the same for all heads
  // KL(exact || compressed) in nats per token when this head alone is compressed to kSensitivityRatio. Empty:
  // the file has none, and its ratios serve their own mean only.
  std::vector<double> sensitivity;
  // The same at ratios of 1/2, 1/4 and 1/8, and with all entries at 4 bits; all of them or none.
  std::vector<double> sensitivity_half, sensitivity_quarter, sensitivity_eighth, sensitivity_4_bits;
  // The same without any entries but the sinks. Empty: unknown, and every head keeps some.
  std::vector<double> sensitivity_none;

  double MeanRatio() const;
  // Whether SpendBytes() can share any number of bytes, and RatiosForMean() any mean by what was measured.
  bool has_curves() const { return !sensitivity_4_bits.empty() && !sensitivity.empty(); }
};

inline constexpr double kLeastRatio = 1.0 / 32;

// Ratios that minimise Σ S (1/r)^p, p = 1.5, for a given mean: r ∝ S^(1/(p+1)), clipped to [least, 1]. A mean
// outside these bounds gives the nearer one.
std::vector<double> ShareBudget(std::span<const double> sensitivity, double mean_ratio,
                                double least = kLeastRatio);

// Rounds each head's entries per segment to whole blocks, at least one, largest remainders up, so that no
// block is padded and the mean stays within a block of what it was. Unchanged where that many blocks cannot
// be had.
std::vector<double> RoundToBlocks(std::span<const double> ratio, int segment_tokens, int block_entries);

// Errors name the file, the key, and what was expected and found: another key, shape or range is not
// accepted.
absl::StatusOr<CompressionBudgets> ParseCompressionBudgets(std::string_view json, const std::string& source,
                                                           int layers, int kv_heads);
absl::StatusOr<CompressionBudgets> LoadCompressionBudgets(const std::string& path, int layers, int kv_heads);
// Replaces the file at once or not at all.
absl::Status SaveCompressionBudgets(const CompressionBudgets& budgets, const std::string& path);

}  // namespace atp

#endif  // ATP_ENGINE_COMPRESSION_BUDGETS_H_
