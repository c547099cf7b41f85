// The plans of one engine: its own, and those that requests bring instead. A plan is made when it is first
// asked for, by the thread that submits, and shared by all who ask for the same. Thread-safe.
//
// A client cannot make the engine remember more and more: ratios are rounded to a grid, so there are few
// different overrides, and of the plans that no sequence uses only the most recently asked ones are kept.
#ifndef ATP_ENGINE_COMPRESSION_PLANS_H_
#define ATP_ENGINE_COMPRESSION_PLANS_H_

#include <cstddef>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/compression_plan.h"
#include "engine/request.h"

namespace atp {

// InvalidArgument naming the field ("atp.ratio: …") where it says not exactly one of preset and ratio, or
// something that there is not.
absl::Status ValidateOverride(const CompressionOverride& override);

class CompressionPlans {
 public:
  static constexpr int kRatioSteps = 64;  // ratios are multiples of 1/64
  static constexpr size_t kKept = 16;     // plans beside those in use

  // What an override, valid and with its ratio on the grid, means here; called under a lock, once for each
  // override and again for those that were forgotten. An error is the request's.
  using SettingsOf = std::function<absl::StatusOr<CompressionSettings>(const CompressionOverride&)>;

  // `own` may be null (exact); so may be `settings_of`: overrides are refused.
  CompressionPlans(std::shared_ptr<const CompressionPlan> own, const CompressionShape& shape,
                   SettingsOf settings_of);

  const std::shared_ptr<const CompressionPlan>& own() const { return own_; }

  // The plan of a request; null: exact. InvalidArgument as ValidateOverride, where overrides are refused, and
  // where this engine's blocks cannot hold such entries.
  absl::StatusOr<std::shared_ptr<const CompressionPlan>> For(
      const std::optional<CompressionOverride>& override);

  size_t known() const;  // overrides that were asked for

 private:
  using Key = std::tuple<std::string, int, int>;  // preset, steps of the ratio, bits; "" and 0: not given
  struct Known {
    absl::Status error;  // why there is no such plan
    bool exact = false;
    std::weak_ptr<const CompressionPlan> plan;
  };

  absl::StatusOr<std::shared_ptr<const CompressionPlan>> Make(const CompressionOverride& override) const;
  void Keep(std::shared_ptr<const CompressionPlan> plan);

  const std::shared_ptr<const CompressionPlan> own_;
  const CompressionShape shape_;
  const SettingsOf settings_of_;
  mutable std::mutex mutex_;  // guards all below
  std::map<Key, Known> known_;
  std::list<std::shared_ptr<const CompressionPlan>> kept_;  // most recently asked first
};

}  // namespace atp

#endif  // ATP_ENGINE_COMPRESSION_PLANS_H_
