// atp calibrate: measures which kv heads mind being compressed, and writes budgets per head beside the model.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "cli/command.h"
#include "cli/compression_choice.h"
#include "cli/evaluation_data.h"
#include "cli/evaluator.h"
#include "cli/logging.h"
#include "cli/served_engine.h"
#include "cli/settings_flags.h"

namespace atp {
namespace {

constexpr int kDefaultSequences = 16;
constexpr int kBarColumns = 30;

struct CalibrateFlags {
  explicit CalibrateFlags(CLI::App* app) : settings(app) {}
  SettingsFlags settings;
  DataFlags data;
  double ratio = 0;
  int segment = 0;  // 0: as set
  int window = -1;  // -1: as set
  int from = -1;    // -1: the first position that sees something compressed
  std::string out;  // empty: beside the model
};

// A bar on a terminal, a line for each tenth otherwise.
void ShowProgress(int done, int runs) {
  if (isatty(STDERR_FILENO) != 1) {
    if (done * 10 / runs != (done - 1) * 10 / runs)
      std::fprintf(stderr, "calibrating %d of %d runs\n", done, runs);
    return;
  }
  const std::string bar(static_cast<size_t>(done * kBarColumns / runs), '#');
  std::fprintf(stderr, "\rcalibrating [%-*s] %d of %d runs\x1b[K%s", kBarColumns, bar.c_str(), done, runs,
               done == runs ? "\r\x1b[K" : "");
  std::fflush(stderr);
}

// What is the same in all measurements.
struct Calibration {
  LoadedModel loaded;
  TokenSequences sequences;
  CompressionSettings settings;  // but for the ratios
  CompressionShape plans;
  KvCache::Shape cache;
  int from = 0;
};

absl::StatusOr<EvaluationCase> Case(const Calibration& c, std::vector<double> ratios) {
  CompressionSettings settings = c.settings;
  settings.head_ratio = std::move(ratios);
  absl::StatusOr<std::shared_ptr<const CompressionPlan>> plan = MakeCompressionPlan(settings, c.plans);
  if (!plan.ok()) return plan.status();
  return EvaluationCase{*std::move(plan), {}};
}

// KL of each case, on the calibration's sequences.
absl::StatusOr<std::vector<double>> MeasureKl(const Calibration& c,
                                              const std::vector<std::vector<double>>& ratios,
                                              const std::function<void(int, int)>& progress) {
  std::vector<EvaluationCase> cases;
  for (const std::vector<double>& head_ratio : ratios) {
    absl::StatusOr<EvaluationCase> one = Case(c, head_ratio);
    if (!one.ok()) return one.status();
    cases.push_back(*std::move(one));
  }
  absl::StatusOr<std::vector<Score>> scores =
      Evaluate(c.loaded.model.get(), c.loaded.backend.get(), c.cache, c.sequences, c.from, cases, progress);
  if (!scores.ok()) return scores.status();
  if (scores->front().tokens == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("nothing to measure: no sequence has a token after position ", c.from));
  }
  std::vector<double> kl;
  for (size_t i = 1; i < scores->size(); ++i) kl.push_back(std::max(0.0, (*scores)[i].Kl()));
  return kl;
}

// Each (layer, kv head) compressed alone.
absl::StatusOr<std::vector<double>> MeasureSensitivity(const Calibration& c) {
  const auto heads = static_cast<size_t>(c.cache.heads_total());
  std::vector<std::vector<double>> ratios(heads, std::vector<double>(heads, 1.0));
  for (size_t h = 0; h < heads; ++h) ratios[h][h] = kSensitivityRatio;
  return MeasureKl(c, ratios, ShowProgress);
}

absl::StatusOr<Calibration> Prepare(const CalibrateFlags& flags, const Config& config) {
  absl::StatusOr<LlamaConfig> llama = LoadLlamaConfig(config.model.path);
  if (!llama.ok()) return llama.status();
  const bool text = flags.data.ids_file.empty();
  absl::StatusOr<LoadedModel> loaded =
      LoadModel(config, EvaluationLimits(*llama), text ? TokenizerNeed::kRequired : TokenizerNeed::kOptional);
  if (!loaded.ok()) return loaded.status();
  Calibration c;
  c.loaded = *std::move(loaded);
  absl::StatusOr<int> context = ContextTokens(flags.data, c.loaded);
  if (!context.ok()) return context.status();
  absl::StatusOr<TokenSequences> sequences = LoadSequences(flags.data, c.loaded, *context);
  if (!sequences.ok()) return sequences.status();
  c.sequences = *std::move(sequences);
  if (text) RepeatSpans(*context / 2, &c.sequences);

  c.settings.segment_tokens = flags.segment > 0 ? flags.segment : config.atp.segment_tokens;
  c.settings.window_tokens = flags.window >= 0 ? flags.window : config.atp.window_tokens;
  c.settings.sink_tokens = config.atp.sink_tokens;
  c.cache = KvShapeOf(config, c.loaded);
  c.cache.compressible = true;
  c.plans = CompressionShapeOf(c.loaded.model->config(), config.kv_cache.block_tokens, c.loaded.kv_format,
                               c.loaded.max_context_tokens);
  absl::StatusOr<EvaluationCase> any =
      Case(c, std::vector<double>(static_cast<size_t>(c.cache.heads_total()), kSensitivityRatio));
  if (!any.ok()) return any.status();
  const int untouched = any->plan->UntouchedTokens();
  if (*context <= untouched) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequences of ", *context, " tokens are never compressed with segments of ",
                     c.settings.segment_tokens, " and a window of ", c.settings.window_tokens,
                     " tokens: give --context more than ", untouched, ", or smaller --segment and --window"));
  }
  c.from = flags.from >= 0 ? flags.from : untouched;
  return c;
}

absl::Status Run(const CalibrateFlags& flags, const Config& config) {
  absl::StatusOr<Calibration> c = Prepare(flags, config);
  if (!c.ok()) return c.status();
  absl::StatusOr<std::vector<double>> sensitivity = MeasureSensitivity(*c);
  if (!sensitivity.ok()) return sensitivity.status();
  CompressionBudgets budgets;
  budgets.layers = c->cache.layers;
  budgets.kv_heads = c->cache.kv_heads;
  budgets.sensitivity = *std::move(sensitivity);
  budgets.ratio = RoundToBlocks(ShareBudget(budgets.sensitivity, flags.ratio), c->settings.segment_tokens,
                                config.kv_cache.block_tokens);
  // What that is worth, on the same sequences.
  const std::vector<double> uniform(budgets.ratio.size(), flags.ratio);
  absl::StatusOr<std::vector<double>> kl = MeasureKl(*c, {uniform, budgets.ratio}, {});
  if (!kl.ok()) return kl.status();
  const std::string path = flags.out.empty() ? BudgetsFileOf(config.model.path) : flags.out;
  if (absl::Status s = SaveCompressionBudgets(budgets, path); !s.ok()) return s;

  std::printf("layer  ratio of each kv head\n");
  for (int l = 0; l < budgets.layers; ++l) {
    std::printf("%-5d", l);
    for (int h = 0; h < budgets.kv_heads; ++h)
      std::printf("  %-6.4g", budgets.ratio[static_cast<size_t>(l * budgets.kv_heads + h)]);
    std::printf("\n");
  }
  std::printf(
      "mean ratio %.4g; KL(exact || compressed) on this data: uniform %.3g, with these budgets %.3g\nwrote "
      "%s\n",
      budgets.MeanRatio(), (*kl)[0], (*kl)[1], path.c_str());
  return absl::OkStatus();
}

int Calibrate(const CalibrateFlags& flags) {
  if (absl::Status s = CheckDataFlags(flags.data, "calibrate"); !s.ok()) return BadArguments(s);
  if (!(flags.ratio > 0 && flags.ratio < 1)) {
    return BadArguments(absl::InvalidArgumentError(
        absl::StrCat("--ratio ", flags.ratio, ": expected more than 0 and less than 1")));
  }
  absl::StatusOr<Config> config = flags.settings.Resolve();
  if (!config.ok()) return BadArguments(config.status());
  SetUpQuietLogging(config->log.level);
  if (absl::Status s = Run(flags, *config); !s.ok()) return Failure(s);
  return 0;
}

}  // namespace

void AddCalibrate(CLI::App* app, int* exit_code) {
  CLI::App* const calibrate = app->add_subcommand(
      "calibrate", "Measure which kv heads mind being compressed, and write budgets beside the model");
  auto flags = std::make_shared<CalibrateFlags>(calibrate);
  flags->settings.AddModelFlags();
  AddDataFlags(calibrate, &flags->data, kDefaultSequences);
  calibrate->add_option("--ratio", flags->ratio, "mean principal entries per token that the heads share")
      ->option_text("R")
      ->required();
  calibrate
      ->add_option("--segment", flags->segment, "tokens compressed together (default: atp.segment_tokens)")
      ->option_text("TOKENS")
      ->check(CLI::Range(1, 1 << 16));
  calibrate
      ->add_option("--window", flags->window, "newest tokens that stay exact (default: atp.window_tokens)")
      ->option_text("TOKENS")
      ->check(CLI::Range(0, 1 << 24));
  calibrate
      ->add_option(
          "--from", flags->from,
          "judge predictions made at this position and later (default: the first that sees compressed "
          "history)")
      ->option_text("TOKENS")
      ->check(CLI::Range(0, 1 << 24));
  calibrate->add_option("--out", flags->out, "file to write (default: atp_budgets.json beside the model)")
      ->option_text("FILE");
  calibrate->footer(
      "Heads that look something up keep their keys, the others share what is left. With --text, every "
      "second sequence\n"
      "repeats spans of its first half, so that such heads show; with --ids, bring sequences that need "
      "recall.");
  calibrate->callback([flags, exit_code] { *exit_code = Calibrate(*flags); });
}

}  // namespace atp
