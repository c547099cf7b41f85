#include "engine/byte_budget.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"

namespace atp {
namespace {

constexpr double kNothing = 1e-9;   // KL below this is noise
constexpr double kFewer = 1.001;    // fewer entries are always worse, if only a little
constexpr double kPower = 1.5;      // KL grows like ratio^-p beyond what was measured
constexpr double kSameMean = 1e-3;  // means this near, relatively, are the same: files hold few digits
constexpr int kSinkBits = 4;  // of heads that keep the sinks only: next to nothing is lost, in half a block

// One way to keep a head's entries.
struct Option {
  int entries = 0;
  int bits = 16;
  int parts = 0;  // of blocks
  double kl = 0;
};

// KL of one head as a function of its entries per token: measured at 1/2 .. 1/16 and, maybe, at 0; 0 at 1.
class Curve {
 public:
  Curve(const CompressionBudgets& budgets, size_t head)
      : kl_{budgets.sensitivity_half[head], budgets.sensitivity_quarter[head],
            budgets.sensitivity_eighth[head], budgets.sensitivity[head]} {
    for (double& kl : kl_) kl = std::max(kl, kNothing);
    for (size_t i = 1; i < kl_.size(); ++i) kl_[i] = std::max(kl_[i], kl_[i - 1] * kFewer);
    if (!budgets.sensitivity_none.empty())
      none_ = std::max(budgets.sensitivity_none[head], kl_.back() * kFewer);
  }

  // Without entries; nothing, where that was not measured.
  std::optional<double> none() const { return none_; }

  // Straight between 1 and 1/2, in logarithms below.
  double operator()(double ratio) const {
    if (ratio >= 0.5) return kl_[0] * 2 * (1 - ratio);
    const double octave = std::log2(0.5 / ratio);
    const auto below = static_cast<size_t>(octave);
    if (below + 1 >= kl_.size()) {
      const double kl = kl_.back() * std::pow(1.0 / 16 / ratio, kPower);
      return none_ ? std::min(kl, *none_ / kFewer) : kl;
    }
    const double t = octave - static_cast<double>(below);
    return kl_[below] * std::pow(kl_[below + 1] / kl_[below], t);
  }

 private:
  std::vector<double> kl_;
  std::optional<double> none_;
};

// All ways to keep a head's entries, no fewer than a plan keeps of sinks, in whole pages of blocks of
// shape.block_bytes.
std::vector<Option> Options(const CompressionBudgets& budgets, size_t head,
                            const CompressionSettings& settings, const CompressionShape& shape) {
  const int segment_tokens = settings.segment_tokens;
  const Curve curve(budgets, head);
  std::vector<Option> options;
  if (curve.none()) options.push_back({0, kSinkBits, 0, *curve.none() + budgets.sensitivity_4_bits[head]});
  for (const int bits : {16, 8, 4}) {
    // 8 bits cause next to nothing: a 256th of what 4 bits cause, since the error of an element is a 16th.
    const double rounding = bits == 16 ? 0 : budgets.sensitivity_4_bits[head] / (bits == 8 ? 256 : 1);
    for (int parts = kBlockParts; parts > 0; parts /= 2) {
      const std::optional<KvPage> page = PrincipalPageWithin(shape.block_bytes, shape.format,
                                                             shape.block_tokens, shape.head_dim, bits, parts);
      if (!page) continue;
      for (int pages = 1, entries = 0; entries < segment_tokens; ++pages) {
        entries = std::min(pages * page->entries(), segment_tokens);
        if (entries < settings.sink_tokens) continue;
        const double kl = curve(static_cast<double>(entries) / segment_tokens) + rounding;
        options.push_back({entries, bits, pages * parts, kl});
      }
    }
  }
  return options;
}

double Bf16Bytes(const CompressionShape& shape, int tokens) {
  return 4.0 * shape.head_dim * shape.layers * shape.kv_heads * tokens;
}

// Takes, as long as there is one, the step with the largest fall of KL per part. Returns the parts left.
int64_t Spend(const std::vector<std::vector<Option>>& options, int64_t parts, std::vector<Option>* chosen) {
  while (true) {
    size_t best_head = 0;
    const Option* best = nullptr;
    double best_rate = 0;
    for (size_t head = 0; head < options.size(); ++head) {
      const Option& now = (*chosen)[head];
      for (const Option& option : options[head]) {
        const int more = option.parts - now.parts;
        if (option.kl >= now.kl || more > parts || more < 0) continue;
        const double rate = (now.kl - option.kl) / std::max(more, 1) * (more == 0 ? 1e6 : 1);
        if (rate > best_rate) best_rate = rate, best = &option, best_head = head;
      }
    }
    if (best == nullptr) return parts;
    parts -= best->parts - (*chosen)[best_head].parts;
    (*chosen)[best_head] = *best;
  }
}

// Blocks of so many segments, of which the first one also has the sinks of heads that keep nothing else.
int64_t BlocksOf(const std::vector<Option>& chosen, int segments, int sinks, const CompressionShape& shape) {
  int64_t least = std::numeric_limits<int64_t>::max(), parts = 0, of_sinks = 0;
  for (int p = kBlockParts; p > 0; p /= 2) {
    const std::optional<KvPage> page = PrincipalPageWithin(shape.block_bytes, shape.format,
                                                           shape.block_tokens, shape.head_dim, kSinkBits, p);
    if (page) least = std::min<int64_t>(least, (sinks + page->entries() - 1) / page->entries() * p);
  }
  for (const Option& option : chosen) {
    parts += option.parts;
    if (option.entries == 0) of_sinks += least;
  }
  const auto blocks = [](int64_t p) { return (p + kBlockParts - 1) / kBlockParts; };
  return (segments - 1) * blocks(parts) + blocks(parts + of_sinks);
}

// As many entries in whole blocks as `mean_ratio` allows; nothing, where that is not a block for each head,
// or for one, where heads may be without.
std::optional<std::vector<double>> SpendBlocks(const CompressionBudgets& budgets, double mean_ratio,
                                               int segment_tokens, int block_entries) {
  const auto heads = static_cast<int64_t>(budgets.ratio.size());
  const auto all = static_cast<double>(heads) * segment_tokens / block_entries;
  const bool none = !budgets.sensitivity_none.empty();
  const int64_t left = static_cast<int64_t>(mean_ratio * all + 1e-6) - (none ? 0 : heads);
  if (left < (none ? 1 : 0)) return std::nullopt;
  std::vector<std::vector<Option>> options(budgets.ratio.size());
  std::vector<Option> chosen;
  for (size_t head = 0; head < options.size(); ++head) {
    const Curve curve(budgets, head);
    if (none) options[head].push_back({0, 16, 0, *curve.none()});
    for (int blocks = 1, entries = 0; entries < segment_tokens; ++blocks) {
      entries = std::min(blocks * block_entries, segment_tokens);
      options[head].push_back({entries, 16, blocks, curve(static_cast<double>(entries) / segment_tokens)});
    }
    chosen.push_back(options[head].front());
  }
  Spend(options, left, &chosen);
  std::vector<double> ratio;
  for (const Option& option : chosen) ratio.push_back(static_cast<double>(option.entries) / segment_tokens);
  return ratio;
}

}  // namespace

double ExactShareOfBf16(const CompressionShape& shape) {
  const KvPage page(shape.format, shape.block_tokens, shape.head_dim, /*with_log_mass=*/false);
  return static_cast<double>(page.bytes()) / (4.0 * shape.head_dim * shape.block_tokens);
}

double ShareOfBf16(const CompressionPlan& plan, const CompressionShape& shape) {
  const int last = std::max(0, shape.max_positions / plan.segment_tokens() - 1);
  int64_t blocks = 0;
  for (int k = plan.StateBegin(last); k <= last; ++k) blocks += plan.TotalGroupBlocks(k);
  return static_cast<double>(blocks) * static_cast<double>(plan.block_bytes()) /
         Bf16Bytes(shape, (last + 1) * plan.segment_tokens());
}

absl::StatusOr<HeadBudgets> SpendBytes(const CompressionBudgets& budgets, double share,
                                       const CompressionSettings& settings, const CompressionShape& shape,
                                       const std::string& source) {
  if (!budgets.has_curves()) {
    return absl::InvalidArgumentError(absl::StrCat(
        source, ": sensitivity_4_bits: missing, so bytes cannot be shared; run atp calibrate --bytes ",
        share));
  }
  CompressionShape sized = shape;
  if (sized.block_bytes == 0) {
    CompressionSettings all_bits;
    all_bits.head_bits = {8, 4};
    sized.block_bytes = CompressedBlockBytes(all_bits, shape.format, shape.block_tokens, shape.head_dim);
  }
  std::vector<std::vector<Option>> options;
  for (size_t head = 0; head < budgets.ratio.size(); ++head)
    options.push_back(Options(budgets, head, settings, sized));
  const auto has_entries = [](const Option& option) { return option.entries > 0; };
  if (std::none_of(options.front().begin(), options.front().end(), has_entries)) {
    return absl::InvalidArgumentError(absl::StrCat("KV blocks of ", sized.block_bytes,
                                                   " bytes, made for exact entries, have no room for ",
                                                   "compressed ones of any bits"));
  }
  const auto block_bytes = static_cast<double>(sized.block_bytes);
  const double bytes = share * Bf16Bytes(shape, settings.segment_tokens);
  const int segments = std::max(1, shape.max_positions / settings.segment_tokens);
  // Where heads keep the sinks only, the first segment takes more: then all get a block less.
  for (auto blocks = static_cast<int64_t>(bytes / block_bytes + 1e-9);; --blocks) {
    std::vector<Option> chosen;
    int64_t parts = blocks * kBlockParts, least = 0;
    for (const std::vector<Option>& of_head : options) {
      chosen.push_back(
          *std::min_element(of_head.begin(), of_head.end(), [](const Option& a, const Option& b) {
            return a.parts != b.parts ? a.parts < b.parts : a.kl < b.kl;
          }));
      least += chosen.back().parts;
    }
    if (parts >= least) Spend(options, parts - least, &chosen);
    if (parts < least || std::none_of(chosen.begin(), chosen.end(), has_entries)) {
      const double least_bytes =
          std::ceil(static_cast<double>(std::max(least, parts + 1)) / kBlockParts) * block_bytes;
      return absl::InvalidArgumentError(
          absl::StrCat("a share of ", share, " of the bytes of bf16: segments of ", settings.segment_tokens,
                       " tokens take at least ", least_bytes / Bf16Bytes(shape, settings.segment_tokens),
                       "; give more, or raise atp.segment_tokens"));
    }
    const int64_t taken = BlocksOf(chosen, segments, settings.sink_tokens, sized);
    if (static_cast<double>(taken) * block_bytes > segments * bytes * (1 + 1e-9)) continue;
    HeadBudgets spent;
    for (const Option& option : chosen) {
      spent.ratio.push_back(static_cast<double>(option.entries) / settings.segment_tokens);
      spent.bits.push_back(option.bits);
    }
    return spent;
  }
}

absl::StatusOr<std::vector<double>> RatiosForMean(const CompressionBudgets& budgets, double mean_ratio,
                                                  int segment_tokens, int block_entries,
                                                  const std::string& source) {
  if (std::abs(budgets.MeanRatio() - mean_ratio) <= kSameMean * mean_ratio) return budgets.ratio;
  if (budgets.sensitivity.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        source, ": sensitivity: missing, so its ratios (mean ", budgets.MeanRatio(),
        ") cannot be shared anew for a mean of ", mean_ratio, "; run atp calibrate --ratio ", mean_ratio));
  }
  if (budgets.has_curves()) {
    std::optional<std::vector<double>> spent =
        SpendBlocks(budgets, mean_ratio, segment_tokens, block_entries);
    if (spent) return *std::move(spent);
  }
  // Shared so that each has a block: rounded up to one later, it would be at the cost of heads that need all.
  const double block = static_cast<double>(block_entries) / segment_tokens;
  const double least = block <= mean_ratio ? std::max(block, kLeastRatio) : kLeastRatio;
  return RoundToBlocks(ShareBudget(budgets.sensitivity, mean_ratio, least), segment_tokens, block_entries);
}

}  // namespace atp
