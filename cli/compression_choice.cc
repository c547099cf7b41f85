#include "cli/compression_choice.h"

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/byte_budget.h"
#include "spdlog/spdlog.h"

namespace atp {

PresetBudget BudgetOf(const std::string& preset) {
  if (preset == "quality") return {1.0 / 2, 8, 1.0 / 4};
  if (preset == "balanced") return {1.0 / 2, 4, 1.0 / 8};
  if (preset == "compact") return {1.0 / 4, 4, 1.0 / 16};
  return {};
}

std::string BudgetsFileOf(const std::string& model_dir) {
  std::error_code ignored;
  if (std::filesystem::is_regular_file(model_dir, ignored)) {  // a GGUF file, which may have neighbours
    return model_dir + "." + std::string(kBudgetsFileName);
  }
  return (std::filesystem::path(model_dir) / std::string(kBudgetsFileName)).string();
}

namespace {

double Mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Entries and bits of each head: the bytes of a preset spent anew where the file has curves, else what the
// file has, else its ratios shared anew. `choice` has the mean ratio and the bits that are wanted.
absl::Status ShareAmongHeads(const AtpConfig& config, double share, const CompressionBudgets& budgets,
                             const CompressionShape& shape, CompressionChoice* choice) {
  CompressionSettings& settings = choice->settings;
  const bool by_preset = config.ratio == 0 && config.bits == 0;
  if (by_preset && budgets.has_curves()) {
    absl::StatusOr<HeadBudgets> spent = SpendBytes(budgets, share, settings, shape, choice->budgets_file);
    if (spent.ok()) {
      settings.head_ratio = std::move(spent->ratio);
      settings.head_bits = std::move(spent->bits);
      settings.ratio = choice->ratio = Mean(settings.head_ratio);
      return absl::OkStatus();
    }
    // Segments too short for so few bytes: as near as whole pages come.
  }
  if (by_preset && !budgets.bits.empty() && budgets.sensitivity.empty()) {
    settings.head_ratio = budgets.ratio;
    settings.head_bits = budgets.bits;
    settings.ratio = choice->ratio = budgets.MeanRatio();
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<double>> ratios = RatiosForMean(budgets, choice->ratio, settings.segment_tokens,
                                                             shape.block_tokens, choice->budgets_file);
  if (!ratios.ok()) return ratios.status();
  settings.head_ratio = *std::move(ratios);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CompressionChoice> ChooseCompression(const AtpConfig& config, const std::string& model_dir,
                                                    const LlamaConfig& model, int block_tokens,
                                                    KvFormat format, size_t block_bytes) {
  CompressionChoice choice;
  std::error_code ignored;
  const std::string beside = BudgetsFileOf(model_dir);
  if (config.budgets == "auto") {
    if (std::filesystem::exists(beside, ignored)) choice.budgets_file = beside;
  } else if (config.budgets != "uniform") {
    choice.budgets_file = config.budgets;
  }

  choice.preset = config.preset;
  // Never by itself without budgets: uniform compression loses recall, and nobody is told.
  if (config.preset == "auto") choice.preset = choice.budgets_file.empty() ? "exact" : "balanced";
  PresetBudget budget = BudgetOf(choice.preset);
  if (config.ratio > 0 || (config.bits > 0 && choice.preset == "exact")) {
    choice.preset = "ratio";
    budget = {config.ratio > 0 ? config.ratio : 1, 16, 1};
  }
  if (config.bits > 0) budget.bits = config.bits;
  choice.ratio = budget.ratio;
  choice.bits = budget.bits;
  CompressionSettings& settings = choice.settings;
  settings.preset = choice.preset;
  settings.bits = budget.bits;
  settings.ratio = choice.ratio;
  settings.segment_tokens = config.segment_tokens;
  settings.window_tokens = config.window_tokens;
  settings.sink_tokens = config.sink_tokens;
  settings.linear_rank = config.linear_rank;
  if (choice.preset == "exact" && config.max_principal_keys > 0) {
    return absl::InvalidArgumentError(absl::StrCat("atp.max_principal_keys: ", config.max_principal_keys,
                                                   " caps nothing, because atp.preset auto is exact "
                                                   "where no ",
                                                   std::string(kBudgetsFileName),
                                                   " lies beside the model; set atp.preset or atp.ratio"));
  }
  settings.max_principal_keys = config.max_principal_keys;
  if (choice.ratio == 1) choice.budgets_file.clear();  // every head keeps everything
  if (choice.budgets_file.empty()) return choice;

  absl::StatusOr<CompressionBudgets> budgets =
      LoadCompressionBudgets(choice.budgets_file, model.layers, model.kv_heads);
  if (!budgets.ok()) return budgets.status();
  CompressionShape shape =
      CompressionShapeOf(model, block_tokens, format, static_cast<int>(model.max_positions));
  shape.block_bytes = block_bytes;
  if (absl::Status s = ShareAmongHeads(config, budget.share, *budgets, shape, &choice); !s.ok()) return s;
  return choice;
}

CompressionPlans::SettingsOf OverrideSettings(const Config& config, const LlamaConfig& model, KvFormat format,
                                              const CompressionChoice& own) {
  if (!config.atp.allow_override) return nullptr;
  const int own_bits = own.exact() ? 8 : own.bits;
  const int block_tokens = config.kv_cache.block_tokens;
  // Those of an exact server have no room for the log masses of as many entries of 16 bits.
  const size_t block_bytes =
      Compresses(own.settings)
          ? CompressedBlockBytes(own.settings, format, block_tokens, model.head_dim)
          : KvPage(format, block_tokens, model.head_dim, /*with_log_mass=*/false).bytes();
  return [atp = config.atp, model_dir = config.model.path, model, block_tokens, format, block_bytes, own_bits,
          linear_layers = own.settings.linear_layers](
             const CompressionOverride& wanted) -> absl::StatusOr<CompressionSettings> {
    if (wanted.preset == "exact") return CompressionSettings();
    AtpConfig asked = atp;
    asked.preset = wanted.preset.value_or("auto");
    asked.ratio = wanted.ratio.value_or(0);
    asked.bits = wanted.bits.value_or(wanted.preset ? 0 : wanted.ratio == 1.0 ? 16 : own_bits);
    absl::StatusOr<CompressionChoice> choice =
        ChooseCompression(asked, model_dir, model, block_tokens, format, block_bytes);
    if (choice.ok()) {
      choice->settings.linear_layers = linear_layers;
      return choice->settings;
    }
    // It names a file of the operator's: for the log, not for the client.
    spdlog::warn("event=override_refused status=\"{}\"", choice.status().ToString());
    const std::string message =
        absl::StrCat("atp: the server's budgets (atp.budgets) cannot be shared for a mean ratio of ",
                     asked.ratio > 0 ? asked.ratio : BudgetOf(asked.preset).ratio, "; its log says why");
    if (!absl::IsInvalidArgument(choice.status())) return absl::InternalError(message);
    return absl::InvalidArgumentError(message);
  };
}

CompressionShape CompressionShapeOf(const LlamaConfig& model, int block_tokens, KvFormat format,
                                    int max_positions) {
  const KvPage page(format, block_tokens, model.head_dim, /*with_log_mass=*/false);
  CompressionShape shape;
  shape.layers = model.layers;
  shape.heads = model.heads;
  shape.kv_heads = model.kv_heads;
  shape.head_dim = model.head_dim;
  shape.format = format;
  shape.block_tokens = block_tokens;
  shape.query_blocks_per_head = QueryPage(page.bytes(), kPrincipalSamples, model.head_dim).blocks_per_head();
  shape.max_positions = max_positions;
  return shape;
}

}  // namespace atp
