// atp eval: cross-entropy and accuracy of a model on a text or on token ids, with the cache exact and
// compressed.
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "cli/baseline_backend.h"
#include "cli/command.h"
#include "cli/compression_choice.h"
#include "cli/evaluation_data.h"
#include "cli/evaluator.h"
#include "cli/logging.h"
#include "cli/served_engine.h"
#include "cli/settings_flags.h"
#include "nlohmann/json.hpp"

namespace atp {
namespace {

using nlohmann::ordered_json;

struct EvalFlags {
  explicit EvalFlags(CLI::App* app) : settings(app) {}
  SettingsFlags settings;
  DataFlags data;
  int from = 0;
  std::vector<double> ratios;  // empty: 1, or what the budgets file has
  std::vector<int> segments;   // these and the next: empty: as set
  std::vector<int> windows;
  std::vector<int> caps;
  std::vector<int> bits;
  std::vector<std::string> kv_dtypes;
  std::vector<std::string> baselines;
  std::string budgets_file;
  bool json = false;
};

// One line of the answer.
struct EvalRow {
  std::string kv_dtype;
  CompressionSettings settings;
  double ratio = 1;  // mean over kv heads
  Baseline method = Baseline::kNone;
  std::shared_ptr<const CompressionPlan> plan;  // null: nothing is compressed
  double kv_bytes_ratio = 1;
  Score score;
};

// Every ratio with every number of bits.
std::vector<std::pair<std::optional<double>, int>> Pairs(const std::vector<std::optional<double>>& ratios,
                                                         const std::vector<int>& bits) {
  std::vector<std::pair<std::optional<double>, int>> pairs;
  for (const std::optional<double>& ratio : ratios)
    for (const int b : bits) pairs.emplace_back(ratio, b);
  return pairs;
}

template <class T>
std::vector<T> OrSet(const std::vector<T>& given, const T& set) {
  return given.empty() ? std::vector<T>{set} : given;
}

// Blocks of one compressed segment as a share of what its tokens take exact, padding and log masses counted.
// Under a cap: of the whole history, at the model's last position.
double KvBytesRatio(const CompressionPlan& plan, const LlamaConfig& model, KvFormat format, int context) {
  const int block_tokens = plan.block_tokens();
  const KvPage exact(format, block_tokens, model.head_dim, false);
  const int last = std::max(0, context / plan.segment_tokens() - 1);
  double bytes = 0;
  for (int k = plan.StateBegin(last); k <= last; ++k) {
    for (int head = 0; head < model.layers * model.kv_heads; ++head)
      bytes += static_cast<double>(plan.GroupBlocks(k)[head]) * static_cast<double>(plan.Page(head)->bytes());
  }
  const int64_t exact_blocks = int64_t{last + 1} * plan.blocks_per_segment() * model.layers * model.kv_heads;
  return bytes / (static_cast<double>(exact_blocks) * static_cast<double>(exact.bytes()));
}

// Ratios by hand, or the file's own, or shared by the file for the given mean.
absl::Status SetRatio(const std::optional<CompressionBudgets>& budgets, const EvalFlags& flags,
                      std::optional<double> ratio, int block_tokens, EvalRow* row) {
  row->ratio = ratio ? *ratio : budgets ? budgets->MeanRatio() : 1;
  row->settings.ratio = row->ratio;
  if (!budgets || row->ratio == 1) return absl::OkStatus();  // every head keeps all its keys
  if (!ratio) {
    row->settings.head_ratio = budgets->ratio;
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<double>> ratios =
      RatiosForMean(*budgets, *ratio, row->settings.segment_tokens, block_tokens, flags.budgets_file);
  if (!ratios.ok()) return ratios.status();
  row->settings.head_ratio = *std::move(ratios);
  return absl::OkStatus();
}

// All combinations of the lists, for one element type of the cache.
absl::StatusOr<std::vector<EvalRow>> MakeRows(const EvalFlags& flags, const Config& config,
                                              const LoadedModel& loaded, int context) {
  const LlamaConfig& model = loaded.model->config();
  std::optional<CompressionBudgets> budgets;
  if (!flags.budgets_file.empty()) {
    absl::StatusOr<CompressionBudgets> file =
        LoadCompressionBudgets(flags.budgets_file, model.layers, model.kv_heads);
    if (!file.ok()) return file.status();
    budgets = *std::move(file);
  }
  std::vector<std::optional<double>> ratios(flags.ratios.begin(), flags.ratios.end());
  if (ratios.empty()) ratios.push_back(std::nullopt);
  const CompressionShape shape =
      CompressionShapeOf(model, config.kv_cache.block_tokens, loaded.kv_format, loaded.max_context_tokens);
  std::vector<EvalRow> rows;
  for (const int segment : OrSet(flags.segments, config.atp.segment_tokens)) {
    for (const int window : OrSet(flags.windows, config.atp.window_tokens)) {
      for (const int cap : OrSet(flags.caps, config.atp.max_principal_keys)) {
        for (const auto& [ratio, bits] : Pairs(ratios, OrSet(flags.bits, 16))) {
          EvalRow row;
          row.settings.bits = bits;
          row.kv_dtype = std::string(Name(loaded.kv_format));
          row.settings.segment_tokens = segment;
          row.settings.window_tokens = window;
          row.settings.sink_tokens = config.atp.sink_tokens;
          row.settings.max_principal_keys = cap;
          if (absl::Status s = SetRatio(budgets, flags, ratio, config.kv_cache.block_tokens, &row); !s.ok()) {
            return s;
          }
          absl::StatusOr<std::shared_ptr<const CompressionPlan>> plan =
              MakeCompressionPlan(row.settings, shape);
          if (!plan.ok()) return plan.status();
          row.plan = *std::move(plan);
          if (row.plan != nullptr)
            row.kv_bytes_ratio = KvBytesRatio(*row.plan, model, loaded.kv_format, context);
          for (const std::string& name : OrSet(flags.baselines, std::string("none"))) {
            row.method = *BaselineFromName(name);
            if (row.plan != nullptr || row.method == Baseline::kNone) rows.push_back(row);
          }
        }
      }
    }
  }
  return rows;
}

// The exact row first, then all others, for one element type of the cache.
absl::StatusOr<std::vector<EvalRow>> EvaluateRows(const EvalFlags& flags, const Config& config) {
  absl::StatusOr<LlamaConfig> llama = LoadLlamaConfig(config.model.path);
  if (!llama.ok()) return llama.status();
  BaselineBackend* backend = nullptr;
  const auto wrap = [&backend](std::unique_ptr<Backend> inner) {
    auto wrapped = std::make_unique<BaselineBackend>(std::move(inner));
    backend = wrapped.get();
    return std::unique_ptr<Backend>(std::move(wrapped));
  };
  absl::StatusOr<LoadedModel> loaded =
      LoadModel(config, EvaluationLimits(*llama),
                flags.data.ids_file.empty() ? TokenizerNeed::kRequired : TokenizerNeed::kOptional, wrap);
  if (!loaded.ok()) return loaded.status();
  const absl::StatusOr<int> context = ContextTokens(flags.data, *loaded);
  if (!context.ok()) return context.status();
  absl::StatusOr<TokenSequences> sequences = LoadSequences(flags.data, *loaded, *context);
  if (!sequences.ok()) return sequences.status();
  absl::StatusOr<std::vector<EvalRow>> rows = MakeRows(flags, config, *loaded, *context);
  if (!rows.ok()) return rows.status();

  KvCache::Shape shape = KvShapeOf(config, *loaded);
  std::vector<EvaluationCase> cases;
  std::vector<size_t> case_rows;
  for (size_t i = 0; i < rows->size(); ++i) {
    if ((*rows)[i].plan == nullptr) continue;
    shape.compressible = true;
    shape.block_bytes = std::max(shape.block_bytes, CompressedBlockBytes((*rows)[i].settings, shape.format,
                                                                         shape.block_tokens, shape.head_dim));
    const Baseline method = (*rows)[i].method;
    cases.push_back({(*rows)[i].plan, [backend, method] { backend->set_baseline(method); }});
    case_rows.push_back(i);
  }
  absl::StatusOr<std::vector<Score>> scores =
      Evaluate(loaded->model.get(), loaded->backend.get(), shape, *sequences, flags.from, cases);
  if (!scores.ok()) return scores.status();
  if (scores->front().tokens == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("nothing to judge: no sequence has a token after position ", flags.from,
                     " (--from, --context ", *context, ")"));
  }
  EvalRow exact;
  exact.kv_dtype = std::string(Name(loaded->kv_format));
  exact.score = scores->front();
  for (EvalRow& row : *rows) row.score = exact.score;
  for (size_t c = 0; c < case_rows.size(); ++c) (*rows)[case_rows[c]].score = (*scores)[c + 1];
  rows->insert(rows->begin(), exact);
  return rows;
}

std::string Method(const EvalRow& row) {
  if (row.plan == nullptr) return "exact";
  return row.method == Baseline::kNone ? "atp" : std::string(Name(row.method));
}

ordered_json Json(const EvalRow& row) {
  const auto tokens = static_cast<double>(row.score.tokens);
  const bool exact = row.plan == nullptr;
  return {{"method", Method(row)},
          {"kv_dtype", row.kv_dtype},
          {"ratio", row.ratio},
          {"segment", exact ? 0 : row.settings.segment_tokens},
          {"window", exact ? 0 : row.settings.window_tokens},
          {"cap", exact ? 0 : row.settings.max_principal_keys},
          {"bits", exact ? 16 : row.settings.bits},
          {"kv_bytes_ratio", row.kv_bytes_ratio},
          {"kv_held_ratio",
           static_cast<double>(row.score.held_bytes) / static_cast<double>(row.score.exact_bytes)},
          {"cross_entropy", row.score.CrossEntropy()},
          {"perplexity", std::exp(row.score.CrossEntropy())},
          {"kl", row.score.Kl()},
          {"agreement", static_cast<double>(row.score.agree) / tokens},
          {"accuracy", static_cast<double>(row.score.right) / tokens},
          {"tokens", row.score.tokens}};
}

void PrintTable(const std::vector<EvalRow>& rows) {
  std::printf(
      "method     kv    bits  ratio    segment  window  cap   kv_bytes  held    cross_entropy  perplexity  "
      "kl      "
      "  "
      "agreement  accuracy  tokens\n");
  for (const EvalRow& row : rows) {
    const ordered_json j = Json(row);
    std::printf(
        "%-9s  %-4s  %-4d  %-7.4g  %-7d  %-6d  %-4d  %-8.4f  %-6.4f  %-13.4f  %-10.4f  %-8.2e  %-9.4f  "
        "%-8.4f  "
        "%lld\n",
        Method(row).c_str(), row.kv_dtype.c_str(), j["bits"].get<int>(), row.ratio, j["segment"].get<int>(),
        j["window"].get<int>(), j["cap"].get<int>(), row.kv_bytes_ratio, j["kv_held_ratio"].get<double>(),
        row.score.CrossEntropy(), std::exp(row.score.CrossEntropy()), row.score.Kl(),
        j["agreement"].get<double>(), j["accuracy"].get<double>(), static_cast<long long>(row.score.tokens));
  }
}

absl::Status Check(const EvalFlags& flags, const Config& config) {
  if (absl::Status s = CheckDataFlags(flags.data, "eval"); !s.ok()) return s;
  for (const double ratio : flags.ratios) {
    if (ratio > 0 && ratio <= 1) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("--ratio ", ratio, ": expected more than 0 and at most 1"));
  }
  for (const std::string& name : flags.baselines) {
    if (!BaselineFromName(name)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--baseline ", name, ": expected none, recent, attention or unfitted"));
    }
    if (name != "none" && config.backend.device == "cuda") {
      return absl::InvalidArgumentError(
          absl::StrCat("--baseline ", name, ": baselines run on --device cpu or reference"));
    }
  }
  return absl::OkStatus();
}

// An error of Config, or of the flags.
absl::StatusOr<std::vector<Config>> Configs(const EvalFlags& flags) {
  absl::StatusOr<Config> config = flags.settings.Resolve();
  if (!config.ok()) return config.status();
  if (absl::Status s = Check(flags, *config); !s.ok()) return s;
  std::vector<Config> configs;
  for (const std::string& dtype : OrSet(flags.kv_dtypes, config->kv_cache.dtype)) {
    configs.push_back(*config);
    configs.back().kv_cache.dtype = dtype;
    if (absl::Status s = Validate(configs.back()); !s.ok()) return s;
  }
  return configs;
}

int Eval(const EvalFlags& flags) {
  const absl::StatusOr<std::vector<Config>> configs = Configs(flags);
  if (!configs.ok()) return BadArguments(configs.status());
  SetUpQuietLogging(configs->front().log.level);
  std::vector<EvalRow> table;
  ordered_json exact = ordered_json::array(), rows = ordered_json::array();
  for (const Config& config : *configs) {
    absl::StatusOr<std::vector<EvalRow>> part = EvaluateRows(flags, config);
    if (!part.ok()) return Failure(part.status());
    exact.push_back(Json(part->front()));
    for (size_t i = 1; i < part->size(); ++i) rows.push_back(Json((*part)[i]));
    // A table shows the exact row once, also where it was asked for by --ratio 1.
    for (size_t i = 0; i < part->size(); ++i) {
      if (i == 0 || (*part)[i].plan != nullptr) table.push_back((*part)[i]);
    }
  }
  if (flags.json) {
    std::puts(ordered_json({{"exact", exact}, {"rows", rows}}).dump().c_str());
  } else {
    PrintTable(table);
  }
  return 0;
}

void AddListFlags(CLI::App* eval, EvalFlags* flags) {
  const auto list = [eval](const std::string& name, auto* values, const std::string& help) {
    return eval->add_option(name, *values, help)->option_text("N,N,...")->delimiter(',');
  };
  list("--ratio", &flags->ratios,
       "principal entries per token of a closed segment, mean over kv heads (default: 1, or the budgets' "
       "own)");
  list("--segment", &flags->segments, "tokens compressed together (default: atp.segment_tokens)");
  list("--window", &flags->windows, "newest tokens that stay exact (default: atp.window_tokens)");
  list("--cap", &flags->caps,
       "most principal entries per kv head, 0: no cap (default: atp.max_principal_keys)");
  list("--bits", &flags->bits, "per element of principal entries: 16 (as exact ones), 8 or 4 (default: 16)");
  list("--kv-dtype", &flags->kv_dtypes,
       "element type of the cache: auto, f32, bf16 (default: kv_cache.dtype)");
  list("--baseline", &flags->baselines,
       "how entries are chosen: none (principal keys), recent, attention, unfitted (default: none)");
  eval->add_option("--budgets", flags->budgets_file,
                   "ratios per kv head, as atp calibrate writes them (default: uniform)")
      ->option_text("FILE");
}

}  // namespace

void AddEval(CLI::App* app, int* exit_code) {
  CLI::App* const eval =
      app->add_subcommand("eval", "How well a model predicts a text, with the KV cache exact and compressed");
  auto flags = std::make_shared<EvalFlags>(eval);
  flags->settings.AddModelFlags();
  AddDataFlags(eval, &flags->data, 0);
  eval->add_option("--from", flags->from,
                   "judge predictions made at this position and later, in tokens (default: 0)")
      ->option_text("TOKENS")
      ->check(CLI::Range(0, 1 << 24));
  AddListFlags(eval, flags.get());
  eval->add_flag("--json", flags->json, "print {\"exact\": [...], \"rows\": [...]} (default: a table)");
  eval->footer(
      "Every combination of the lists is a row. kl is KL(exact || compressed) in nats per token, agreement "
      "that of the\n"
      "argmax; kv_bytes is what a compressed segment takes of its exact bytes, held what whole sequences "
      "take at their\n"
      "end, window and kept queries included. docs/principal_keys.md explains.");
  eval->callback([flags, exit_code] { *exit_code = Eval(*flags); });
}

}  // namespace atp
