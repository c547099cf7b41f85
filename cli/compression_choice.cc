#include "cli/compression_choice.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"

namespace atp {

PresetBudget BudgetOf(const std::string& preset) {
  if (preset == "quality") return {1.0 / 2, 8};
  if (preset == "balanced") return {1.0 / 2, 4};
  if (preset == "compact") return {1.0 / 4, 4};
  return {};
}

std::string BudgetsFileOf(const std::string& model_dir) {
  std::error_code ignored;
  if (std::filesystem::is_regular_file(model_dir, ignored)) {  // a GGUF file, which may have neighbours
    return model_dir + "." + std::string(kBudgetsFileName);
  }
  return (std::filesystem::path(model_dir) / std::string(kBudgetsFileName)).string();
}

absl::StatusOr<CompressionChoice> ChooseCompression(const AtpConfig& config, const std::string& model_dir,
                                                    const LlamaConfig& model, int block_tokens) {
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
  if (config.ratio > 0) {
    choice.preset = "ratio";
    budget = {config.ratio, 16};
  }
  if (config.bits > 0) budget.bits = config.bits;
  choice.ratio = budget.ratio;
  choice.bits = budget.bits;
  CompressionSettings& settings = choice.settings;
  settings.bits = budget.bits;
  settings.ratio = choice.ratio;
  settings.segment_tokens = config.segment_tokens;
  settings.window_tokens = config.window_tokens;
  settings.sink_tokens = config.sink_tokens;
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
  absl::StatusOr<std::vector<double>> ratios =
      RatiosForMean(*budgets, choice.ratio, settings.segment_tokens, block_tokens * (16 / settings.bits),
                    choice.budgets_file);
  if (!ratios.ok()) return ratios.status();
  settings.head_ratio = *std::move(ratios);
  return choice;
}

CompressionShape CompressionShapeOf(const LlamaConfig& model, int block_tokens, KvFormat format,
                                    int max_positions) {
  const KvPage page(format, block_tokens, model.head_dim, /*with_log_mass=*/true);
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
