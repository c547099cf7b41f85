#include "engine/compression_plans.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"

namespace atp {
namespace {

constexpr std::array<std::string_view, 4> kPresets = {"exact", "quality", "balanced", "compact"};

}  // namespace

absl::Status ValidateOverride(const CompressionOverride& override) {
  if (override.preset.has_value() == override.ratio.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "atp: must have ", override.preset ? "only one of preset and ratio" : "a preset or a ratio"));
  }
  if (override.preset && std::find(kPresets.begin(), kPresets.end(), *override.preset) == kPresets.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("atp.preset: must be exact, quality, balanced or compact, got '",
                     override.preset->substr(0, 32), "'"));
  }
  if (override.ratio && !(*override.ratio > 0 && *override.ratio <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("atp.ratio: must be more than 0 and at most 1, got ", *override.ratio));
  }
  if (!override.bits) return absl::OkStatus();
  if (override.preset) {
    return absl::InvalidArgumentError("atp.bits: goes with a ratio; a preset has bits of its own");
  }
  if (*override.bits != 16 && *override.bits != 8 && *override.bits != 4)
    return absl::InvalidArgumentError(absl::StrCat("atp.bits: must be 16, 8 or 4, got ", *override.bits));
  return absl::OkStatus();
}

CompressionPlans::CompressionPlans(std::shared_ptr<const CompressionPlan> own, const CompressionShape& shape,
                                   SettingsOf settings_of)
    : own_(std::move(own)), shape_(shape), settings_of_(std::move(settings_of)) {}

absl::StatusOr<std::shared_ptr<const CompressionPlan>> CompressionPlans::For(
    const std::optional<CompressionOverride>& override) {
  if (!override) return own_;
  if (!settings_of_) {
    return absl::InvalidArgumentError(
        "atp: this server does not let requests choose their compression (atp.allow_override); leave it out");
  }
  if (absl::Status s = ValidateOverride(*override); !s.ok()) return s;
  CompressionOverride asked = *override;
  int steps = 0;
  if (asked.ratio) {
    steps = std::max(1, static_cast<int>(std::lround(*asked.ratio * kRatioSteps)));
    asked.ratio = static_cast<double>(steps) / kRatioSteps;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  Known& known = known_[Key(asked.preset.value_or(""), steps, asked.bits.value_or(0))];
  if (!known.error.ok()) return known.error;
  if (known.exact) return std::shared_ptr<const CompressionPlan>();
  std::shared_ptr<const CompressionPlan> plan = known.plan.lock();
  if (plan == nullptr) {
    absl::StatusOr<std::shared_ptr<const CompressionPlan>> made = Make(asked);
    // What the server's own files are to blame for may be mended.
    if (absl::IsInvalidArgument(made.status())) known.error = made.status();
    if (!made.ok()) return made;
    known.exact = *made == nullptr;
    if (known.exact) return made;
    plan = *std::move(made);
    known.plan = plan;
  }
  Keep(plan);
  return plan;
}

absl::StatusOr<std::shared_ptr<const CompressionPlan>> CompressionPlans::Make(
    const CompressionOverride& override) const {
  absl::StatusOr<CompressionSettings> settings = settings_of_(override);
  if (!settings.ok()) return settings.status();
  absl::StatusOr<std::shared_ptr<const CompressionPlan>> plan = MakeCompressionPlan(*settings, shape_);
  // The engine's own, where it is the same, so that there is no second one.
  if (plan.ok() && *plan != nullptr && own_ != nullptr && (*plan)->id() == own_->id()) return own_;
  return plan;
}

void CompressionPlans::Keep(std::shared_ptr<const CompressionPlan> plan) {
  kept_.remove(plan);
  kept_.push_front(std::move(plan));
  if (kept_.size() > kKept) kept_.pop_back();
}

size_t CompressionPlans::known() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return known_.size();
}

}  // namespace atp
