// atp eval: cross-entropy and accuracy of a model on a text or on token ids, with the cache exact and
// compressed.
#include <algorithm>
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
#include "cli/eval_table.h"
#include "cli/evaluation_data.h"
#include "cli/evaluator.h"
#include "cli/logging.h"
#include "cli/served_engine.h"
#include "cli/settings_flags.h"
#include "engine/byte_budget.h"
#include "engine/low_rank.h"
#include "nlohmann/json.hpp"

namespace atp {
namespace {

using nlohmann::ordered_json;

constexpr int kDefaultContext = 512;
constexpr int kMostTokens = 1 << 24;
constexpr int kMostSegmentTokens = 1 << 16;

struct EvalFlags {
  explicit EvalFlags(CLI::App* app) : settings(app) {}
  SettingsFlags settings;
  DataFlags data;
  int from = 0;
  int recall_tokens = 2;
  bool repeat_spans = false;
  std::vector<double> ratios;  // empty: 1, or what the budgets file has
  std::vector<double> shares;  // of bf16 bytes, spent through the budgets file, beside the ratios
  std::vector<int> segments;   // these and the next: empty: as set
  std::vector<int> windows;
  std::vector<int> caps;
  std::vector<int> bits;
  double linear_rank = 1;
  std::vector<std::string> kv_dtypes;
  std::vector<std::string> baselines;
  std::string budgets_file;
  bool json = false;
};

// How far one row compresses.
struct Degree {
  std::optional<double> ratio;  // nothing here and below: as the budgets file has it
  std::optional<int> bits;
  std::optional<double> share;  // of bf16 bytes, instead of both
};

// Every ratio with every number of bits, and then the shares.
std::vector<Degree> Degrees(const EvalFlags& flags, bool budgets_have_bits) {
  std::vector<Degree> degrees;
  std::vector<std::optional<double>> ratios(flags.ratios.begin(), flags.ratios.end());
  if (ratios.empty() && flags.shares.empty()) ratios.emplace_back();
  std::vector<std::optional<int>> bits(flags.bits.begin(), flags.bits.end());
  for (const std::optional<double>& ratio : ratios) {
    if (!bits.empty()) {
      for (const std::optional<int>& b : bits) degrees.push_back({ratio, b, {}});
    } else if (!ratio && budgets_have_bits) {
      degrees.push_back({ratio, {}, {}});
    } else {
      degrees.push_back({ratio, 16, {}});
    }
  }
  for (const double share : flags.shares) degrees.push_back({{}, {}, share});
  return degrees;
}

template <class T>
std::vector<T> OrSet(const std::vector<T>& given, const T& set) {
  return given.empty() ? std::vector<T>{set} : given;
}

// By hand, or the file's own, or shared by the file.
absl::Status SetDegree(const std::optional<CompressionBudgets>& budgets, const EvalFlags& flags,
                       const Degree& degree, const CompressionShape& shape, EvalRow* row) {
  if (degree.share) {
    absl::StatusOr<HeadBudgets> spent =
        SpendBytes(*budgets, *degree.share, row->settings, shape, flags.budgets_file);
    if (!spent.ok()) return spent.status();
    row->settings.head_ratio = std::move(spent->ratio);
    row->settings.head_bits = std::move(spent->bits);
    return absl::OkStatus();
  }
  row->settings.bits = degree.bits.value_or(16);
  row->settings.ratio = degree.ratio ? *degree.ratio : budgets ? budgets->MeanRatio() : 1;
  if (!degree.bits) row->settings.head_bits = budgets->bits;
  if (!budgets || row->settings.ratio == 1) return absl::OkStatus();  // every head keeps all its keys
  if (!degree.ratio) {
    row->settings.head_ratio = budgets->ratio;
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<double>> ratios = RatiosForMean(
      *budgets, *degree.ratio, row->settings.segment_tokens, shape.block_tokens, flags.budgets_file);
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
  CompressionShape shape =
      CompressionShapeOf(model, config.kv_cache.block_tokens, loaded.kv_format, loaded.max_context_tokens);
  shape.max_positions = context;
  std::vector<EvalRow> rows;
  for (const int segment : OrSet(flags.segments, config.atp.segment_tokens)) {
    for (const int window : OrSet(flags.windows, config.atp.window_tokens)) {
      for (const int cap : OrSet(flags.caps, config.atp.max_principal_keys)) {
        for (const Degree& degree : Degrees(flags, budgets && !budgets->bits.empty())) {
          EvalRow row;
          row.kv_dtype = std::string(Name(loaded.kv_format));
          row.settings.segment_tokens = segment;
          row.settings.window_tokens = window;
          row.settings.sink_tokens = config.atp.sink_tokens;
          row.settings.max_principal_keys = cap;
          row.settings.linear_rank = flags.linear_rank;
          row.settings.linear_layers = kAllLinearLayers;
          if (absl::Status s = SetDegree(budgets, flags, degree, shape, &row); !s.ok()) return s;
          absl::StatusOr<std::shared_ptr<const CompressionPlan>> plan =
              MakeCompressionPlan(row.settings, shape);
          if (!plan.ok()) return plan.status();
          row.plan = *std::move(plan);
          row.bf16_bytes_ratio = ExactShareOfBf16(shape);
          if (row.plan != nullptr && row.plan->compresses()) {
            row.bf16_bytes_ratio = ShareOfBf16(*row.plan, shape);
            row.kv_bytes_ratio = row.bf16_bytes_ratio / ExactShareOfBf16(shape);
          }
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

// Of all rows, where linear layers take low-rank inputs; else 0.
int LongestLowRankSegment(const EvalFlags& flags, const Config& config) {
  const std::vector<int> segments = OrSet(flags.segments, config.atp.segment_tokens);
  return flags.linear_rank < 1 ? *std::max_element(segments.begin(), segments.end()) : 0;
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
      LoadModel(config, EvaluationLimits(*llama, LongestLowRankSegment(flags, config)),
                flags.data.ids_file.empty() ? TokenizerNeed::kRequired : TokenizerNeed::kOptional, wrap);
  if (!loaded.ok()) return loaded.status();
  const absl::StatusOr<int> context = ContextTokens(flags.data, *loaded);
  if (!context.ok()) return context.status();
  absl::StatusOr<TokenSequences> sequences = LoadSequences(flags.data, *loaded, *context);
  if (!sequences.ok()) return sequences.status();
  if (flags.repeat_spans) {
    if (absl::Status s = RepeatSpans(/*every=*/1, &*sequences); !s.ok()) return s;
  }
  absl::StatusOr<std::vector<EvalRow>> rows = MakeRows(flags, config, *loaded, *context);
  if (!rows.ok()) return rows.status();

  KvCache::Shape shape = KvShapeOf(config, *loaded);
  std::vector<EvaluationCase> cases;
  std::vector<size_t> case_rows;
  for (size_t i = 0; i < rows->size(); ++i) {
    if ((*rows)[i].plan == nullptr) continue;
    size_t block_bytes = 0;
    if ((*rows)[i].plan->compresses()) {
      shape.compressible = true;
      block_bytes =
          CompressedBlockBytes((*rows)[i].settings, shape.format, shape.block_tokens, shape.head_dim);
      shape.block_bytes = std::max(shape.block_bytes, block_bytes);
    }
    const Baseline method = (*rows)[i].method;
    cases.push_back({(*rows)[i].plan, [backend, method] { backend->set_baseline(method); }, block_bytes});
    case_rows.push_back(i);
  }
  absl::StatusOr<std::vector<Score>> scores = Evaluate(loaded->model.get(), loaded->backend.get(), shape,
                                                       *sequences, flags.from, cases, flags.recall_tokens);
  if (!scores.ok()) return scores.status();
  if (scores->front().tokens == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("nothing to judge: no sequence has a token after position ", flags.from,
                     " (--from, --context ", *context, ")"));
  }
  EvalRow exact;
  exact.kv_dtype = std::string(Name(loaded->kv_format));
  exact.bf16_bytes_ratio =
      ExactShareOfBf16(CompressionShapeOf(*llama, config.kv_cache.block_tokens, loaded->kv_format, *context));
  exact.score = scores->front();
  for (EvalRow& row : *rows) row.score = exact.score;
  for (size_t c = 0; c < case_rows.size(); ++c) (*rows)[case_rows[c]].score = (*scores)[c + 1];
  rows->insert(rows->begin(), exact);
  return rows;
}

absl::Status Check(const EvalFlags& flags, const Config& config) {
  if (absl::Status s = CheckDataFlags(flags.data, "eval"); !s.ok()) return s;
  for (const double ratio : flags.ratios) {
    if (ratio > 0 && ratio <= 1) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("--ratio ", ratio, ": expected more than 0 and at most 1"));
  }
  for (const double share : flags.shares) {
    if (share > 0 && share <= 1 && !flags.budgets_file.empty()) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "--bytes ", share, ": expected more than 0 and at most 1, and --budgets FILE to spend it"));
  }
  for (const int bits : flags.bits) {
    if (bits == 16 || bits == 8 || bits == 4) continue;
    return absl::InvalidArgumentError(absl::StrCat("--bits ", bits, ": expected 16, 8 or 4"));
  }
  for (const int cap : flags.caps) {
    if (cap >= 0 && cap <= kMostTokens) continue;
    return absl::InvalidArgumentError(absl::StrCat("--cap ", cap, ": expected 0 (no cap) to ", kMostTokens));
  }
  for (const int window : flags.windows) {
    if (window >= 0 && window <= kMostTokens) continue;
    return absl::InvalidArgumentError(absl::StrCat("--window ", window, ": expected 0 to ", kMostTokens));
  }
  for (const int segment : flags.segments) {
    if (segment > 0 && segment <= kMostSegmentTokens) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("--segment ", segment, ": expected 1 to ", kMostSegmentTokens));
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
    exact.push_back(EvalJson(part->front()));
    for (size_t i = 1; i < part->size(); ++i) rows.push_back(EvalJson((*part)[i]));
    // A table shows the exact row once, also where it was asked for by --ratio 1.
    for (size_t i = 0; i < part->size(); ++i) {
      if (i == 0 || (*part)[i].plan != nullptr) table.push_back((*part)[i]);
    }
  }
  if (flags.json) {
    std::puts(ordered_json({{"exact", exact}, {"rows", rows}}).dump().c_str());
  } else {
    PrintEvalTable(table);
  }
  return Printed();
}

void AddListFlags(CLI::App* eval, EvalFlags* flags) {
  const auto list = [eval](const std::string& name, auto* values, const std::string& help) {
    return eval->add_option(name, *values, help)->option_text("N,N,...")->delimiter(',');
  };
  list("--ratio", &flags->ratios,
       "principal entries per token of a closed segment, mean over kv heads (default: 1, or the budgets' "
       "own)");
  list("--bytes", &flags->shares,
       "shares of bf16 bytes that a closed segment may take, spent through --budgets on entries and bits "
       "(default: none)");
  list("--segment", &flags->segments, "tokens compressed together (default: atp.segment_tokens)");
  list("--window", &flags->windows, "newest tokens that stay exact (default: atp.window_tokens)");
  list("--cap", &flags->caps,
       "most principal entries per kv head, 0: no cap (default: atp.max_principal_keys)");
  list("--bits", &flags->bits, "per element of principal entries: 16 (as exact ones), 8 or 4 (default: 16)");
  list("--kv-dtype", &flags->kv_dtypes,
       "element type of the cache: auto, f32, bf16, fp8, int8, int4 (default: kv_cache.dtype)");
  list("--baseline", &flags->baselines,
       "how entries are chosen: none (principal keys), recent, attention, unfitted (default: none)");
  eval->add_option("--linear-rank", flags->linear_rank,
                   "rank of the input of linear layers in whole segments, as a share of their tokens, in all "
                   "layers whether faster or not (default: 1, exact)")
      ->option_text("R")
      ->check(CLI::Range(1e-6, 1.0));
  eval->add_option("--budgets", flags->budgets_file,
                   "ratios and bits per kv head, as atp calibrate writes them (default: uniform)")
      ->option_text("FILE")
      ->check(NotEmpty);
  eval->add_option(
          "--recall-tokens", flags->recall_tokens,
          "a prediction counts as recall where so many tokens came before in the same order, followed by "
          "the same (default: 2)")
      ->option_text("TOKENS")
      ->check(CLI::Range(1, 64));
  eval->add_flag("--repeat-spans", flags->repeat_spans,
                 "spans of the first half of each sequence come again in place of its second half, so that "
                 "predicting it is recall (default: they stay as they are)");
}

}  // namespace

void AddEval(CLI::App* app, int* exit_code) {
  CLI::App* const eval =
      app->add_subcommand("eval", "How well a model predicts a text, with the KV cache exact and compressed");
  auto flags = std::make_shared<EvalFlags>(eval);
  flags->settings.AddModelFlags();
  AddDataFlags(eval, &flags->data, /*default_limit=*/0, kDefaultContext);
  eval->add_option("--from", flags->from,
                   "judge predictions made at this position and later, in tokens (default: 0)")
      ->option_text("TOKENS")
      ->check(CLI::Range(0, 1 << 24));
  AddListFlags(eval, flags.get());
  eval->add_flag("--json", flags->json, "print {\"exact\": [...], \"rows\": [...]} (default: a table)");
  eval->footer(
      "Every combination of the lists is a row, and recall the accuracy where an earlier place gives the "
      "answer "
      "away, by the\n"
      "distance in tokens. kl is KL(exact || compressed) in nats per token, agreement "
      "that of the\n"
      "argmax; kv_bytes is what a compressed segment takes of its exact bytes, held what whole sequences "
      "take at their\n"
      "end, window and kept queries included. docs/principal_keys.md explains.");
  eval->callback([flags, exit_code] { *exit_code = Eval(*flags); });
}

}  // namespace atp
