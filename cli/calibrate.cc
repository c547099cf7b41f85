// atp calibrate: measures which kv heads mind being compressed, and writes budgets per head beside the model.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
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
#include "engine/byte_budget.h"

namespace atp {
namespace {

constexpr int kDefaultSequences = 8;
// Many segments: what it costs to drop a history shows in long ones only.
constexpr int kDefaultContext = 2048;
constexpr int kBarColumns = 30;

struct CalibrateFlags {
  explicit CalibrateFlags(CLI::App* app) : settings(app) {}
  SettingsFlags settings;
  DataFlags data;
  double ratio = 0;  // one of this
  double share = 0;  // and this is given: of the bytes of bf16
  int segment = 0;   // 0: as set
  int window = -1;   // -1: as set
  int from = -1;     // -1: the first position that sees something compressed
  std::string out;   // empty: beside the model
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

absl::StatusOr<EvaluationCase> Case(const Calibration& c, const HeadBudgets& heads) {
  CompressionSettings settings = c.settings;
  settings.head_ratio = heads.ratio;
  settings.head_bits = heads.bits;
  absl::StatusOr<std::shared_ptr<const CompressionPlan>> plan = MakeCompressionPlan(settings, c.plans);
  if (!plan.ok()) return plan.status();
  return EvaluationCase{*std::move(plan), {}, 0};
}

// KL of each case, on the calibration's sequences.
absl::StatusOr<std::vector<double>> MeasureKl(const Calibration& c, const std::vector<HeadBudgets>& ways,
                                              const std::function<void(int, int)>& progress) {
  std::vector<EvaluationCase> cases;
  for (const HeadBudgets& way : ways) {
    absl::StatusOr<EvaluationCase> one = Case(c, way);
    if (!one.ok()) return one.status();
    cases.push_back(*std::move(one));
  }
  absl::StatusOr<std::vector<Score>> scores =
      Evaluate(c.loaded.model.get(), c.loaded.backend.get(), c.cache, c.sequences, c.from, cases,
               /*recall_tokens=*/2, progress);
  if (!scores.ok()) return scores.status();
  std::vector<double> kl;
  for (size_t i = 1; i < scores->size(); ++i) kl.push_back(std::max(0.0, (*scores)[i].Kl()));
  return kl;
}

// Each (layer, kv head) compressed alone: to the ratio of the sensitivity, and where bytes are to be shared
// also to the others, to the sinks only, and to 4 bits.
absl::Status MeasureSensitivities(const Calibration& c, bool curves, CompressionBudgets* budgets) {
  const auto heads = static_cast<size_t>(c.cache.heads_total());
  struct Way {
    double ratio;
    int bits;
    std::vector<double>* kl;
  };
  std::vector<Way> ways = {{kSensitivityRatio, 16, &budgets->sensitivity}};
  if (curves) {
    ways.push_back({1.0 / 2, 16, &budgets->sensitivity_half});
    ways.push_back({1.0 / 4, 16, &budgets->sensitivity_quarter});
    ways.push_back({1.0 / 8, 16, &budgets->sensitivity_eighth});
    // The only head there is cannot go without.
    if (heads > 1) ways.push_back({0, 16, &budgets->sensitivity_none});
    ways.push_back({1, 4, &budgets->sensitivity_4_bits});
  }
  std::vector<HeadBudgets> runs;
  for (const Way& way : ways) {
    for (size_t h = 0; h < heads; ++h) {
      runs.push_back({std::vector<double>(heads, 1.0), std::vector<int>(heads, 16)});
      runs.back().ratio[h] = way.ratio;
      runs.back().bits[h] = way.bits;
    }
  }
  absl::StatusOr<std::vector<double>> kl = MeasureKl(c, runs, ShowProgress);
  if (!kl.ok()) return kl.status();
  auto next = kl->begin();
  for (const Way& way : ways) {
    way.kl->assign(next, next + static_cast<ptrdiff_t>(heads));
    next += static_cast<ptrdiff_t>(heads);
  }
  return absl::OkStatus();
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
  if (text) {
    if (absl::Status s = RepeatSpans(/*every=*/2, &c.sequences); !s.ok()) return s;
  }

  c.settings.segment_tokens = flags.segment > 0 ? flags.segment : config.atp.segment_tokens;
  c.settings.window_tokens = flags.window >= 0 ? flags.window : config.atp.window_tokens;
  c.settings.sink_tokens = config.atp.sink_tokens;
  c.cache = KvShapeOf(config, c.loaded);
  c.cache.compressible = true;
  c.plans = CompressionShapeOf(c.loaded.model->config(), config.kv_cache.block_tokens, c.loaded.kv_format,
                               *context);
  CompressionSettings any_bits;
  any_bits.head_bits = {16, 8, 4};
  c.cache.block_bytes =
      CompressedBlockBytes(any_bits, c.cache.format, c.cache.block_tokens, c.cache.head_dim);
  absl::StatusOr<EvaluationCase> any =
      Case(c, {std::vector<double>(static_cast<size_t>(c.cache.heads_total()), kSensitivityRatio), {}});
  if (!any.ok()) return any.status();
  if (any->plan == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("segments of ", c.settings.segment_tokens, " tokens of which ", c.settings.sink_tokens,
                     " are kept (atp.sink_tokens) are never compressed; give longer ones"));
  }
  const int untouched = any->plan->UntouchedTokens();
  size_t longest = 0;
  for (const auto& ids : c.sequences) longest = std::max(longest, ids.size());
  if (longest <= static_cast<size_t>(untouched)) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequences of ", longest, " tokens are never compressed with segments of ",
                     c.settings.segment_tokens, " and a window of ", c.settings.window_tokens,
                     " tokens: bring longer ones and give --context more than ", untouched,
                     ", or smaller --segment and --window"));
  }
  c.from = flags.from >= 0 ? flags.from : untouched;
  if (longest <= static_cast<size_t>(c.from) + 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("nothing to measure: no sequence has a token after position ", c.from));
  }
  return c;
}

// Shares what the flags ask for.
absl::Status SetBudgets(const CalibrateFlags& flags, const Calibration& c, CompressionBudgets* budgets) {
  budgets->ratio.assign(static_cast<size_t>(c.cache.heads_total()), 1.0);
  if (flags.share == 0) {
    absl::StatusOr<std::vector<double>> shared =
        RatiosForMean(*budgets, flags.ratio, c.settings.segment_tokens, c.plans.block_tokens, "calibrate");
    if (!shared.ok()) return shared.status();
    budgets->ratio = *std::move(shared);
    return absl::OkStatus();
  }
  absl::StatusOr<HeadBudgets> spent = SpendBytes(*budgets, flags.share, c.settings, c.plans, "calibrate");
  if (!spent.ok()) return spent.status();
  budgets->ratio = std::move(spent->ratio);
  budgets->bits = std::move(spent->bits);
  return absl::OkStatus();
}

void Print(const CompressionBudgets& budgets) {
  std::printf("layer  ratio%s of each kv head\n", budgets.bits.empty() ? "" : " x bits");
  for (int l = 0; l < budgets.layers; ++l) {
    std::printf("%-5d", l);
    for (int h = 0; h < budgets.kv_heads; ++h) {
      const auto head = static_cast<size_t>(l * budgets.kv_heads + h);
      std::printf("  %-6.4g", budgets.ratio[head]);
      if (!budgets.bits.empty()) std::printf(" x %-2d", budgets.bits[head]);
    }
    std::printf("\n");
  }
}

absl::Status CheckAhead(const CalibrateFlags& flags, const Calibration& c, CompressionBudgets budgets,
                        const std::string& path) {
  for (std::vector<double>* kl :
       {&budgets.sensitivity, &budgets.sensitivity_half, &budgets.sensitivity_quarter,
        &budgets.sensitivity_eighth, &budgets.sensitivity_4_bits})
    kl->assign(static_cast<size_t>(c.cache.heads_total()), 1.0);
  if (flags.share > 0 && c.cache.heads_total() > 1) budgets.sensitivity_none = budgets.sensitivity;
  if (absl::Status s = SetBudgets(flags, c, &budgets); !s.ok()) return s;
  const std::filesystem::path directory = std::filesystem::absolute(path).parent_path();
  if (access(directory.c_str(), W_OK) != 0) {
    return absl::PermissionDeniedError(absl::StrCat(path, ": ", directory.string(),
                                                    " is no directory that can be written; give --out FILE"));
  }
  return absl::OkStatus();
}

absl::Status Run(const CalibrateFlags& flags, const Config& config) {
  absl::StatusOr<Calibration> c = Prepare(flags, config);
  if (!c.ok()) return c.status();
  CompressionBudgets budgets;
  budgets.layers = c->cache.layers;
  budgets.kv_heads = c->cache.kv_heads;
  const std::string path = flags.out.empty() ? BudgetsFileOf(config.model.path) : flags.out;
  // What would be refused in the end is refused before minutes of work.
  if (absl::Status s = CheckAhead(flags, *c, budgets, path); !s.ok()) return s;
  if (absl::Status s = MeasureSensitivities(*c, flags.share > 0, &budgets); !s.ok()) return s;
  if (absl::Status s = SetBudgets(flags, *c, &budgets); !s.ok()) return s;
  // What that is worth, on the same sequences.
  const HeadBudgets shared = {budgets.ratio, budgets.bits};
  const HeadBudgets uniform = {std::vector<double>(budgets.ratio.size(), budgets.MeanRatio()), budgets.bits};
  absl::StatusOr<EvaluationCase> chosen = Case(*c, shared);
  if (!chosen.ok()) return chosen.status();
  absl::StatusOr<std::vector<double>> kl = MeasureKl(*c, {uniform, shared}, {});
  if (!kl.ok()) return kl.status();
  Print(budgets);
  std::printf("mean ratio %.4g", budgets.MeanRatio());
  if (chosen->plan != nullptr)
    std::printf(", %.4g of the bytes of bf16", ShareOfBf16(*chosen->plan, c->plans));
  std::printf("; KL(exact || compressed) on this data: entries shared evenly %.3g, with these budgets %.3g\n",
              (*kl)[0], (*kl)[1]);
  if (absl::Status s = SaveCompressionBudgets(budgets, path); !s.ok()) return s;
  std::printf("wrote %s\n", path.c_str());
  return absl::OkStatus();
}

int Calibrate(const CalibrateFlags& flags) {
  if (absl::Status s = CheckDataFlags(flags.data, "calibrate"); !s.ok()) return BadArguments(s);
  if ((flags.ratio == 0) == (flags.share == 0)) {
    return BadArguments(absl::InvalidArgumentError("calibrate needs either --ratio R or --bytes B"));
  }
  for (const auto& [name, value] : {std::pair("--ratio ", flags.ratio), std::pair("--bytes ", flags.share)}) {
    if (value >= 0 && value < 1) continue;
    return BadArguments(
        absl::InvalidArgumentError(absl::StrCat(name, value, ": expected more than 0 and less than 1")));
  }
  absl::StatusOr<Config> config = flags.settings.Resolve();
  if (!config.ok()) return BadArguments(config.status());
  SetUpQuietLogging(config->log.level);
  if (absl::Status s = Run(flags, *config); !s.ok()) return Failure(s);
  return Printed();
}

}  // namespace

void AddCalibrate(CLI::App* app, int* exit_code) {
  CLI::App* const calibrate = app->add_subcommand(
      "calibrate", "Measure which kv heads mind being compressed, and write budgets beside the model");
  auto flags = std::make_shared<CalibrateFlags>(calibrate);
  flags->settings.AddModelFlags();
  AddDataFlags(calibrate, &flags->data, kDefaultSequences, kDefaultContext);
  calibrate
      ->add_option("--ratio", flags->ratio,
                   "mean principal entries per token that the heads share (default: none; either this or "
                   "--bytes is needed)")
      ->option_text("R");
  calibrate
      ->add_option("--bytes", flags->share,
                   "share of the bytes of a bf16 cache that closed segments may take, spent head by head on "
                   "entries and bits, 8 or 4; scales, log masses and padding counted (default: none)")
      ->option_text("B");
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
  calibrate
      ->add_option("--out", flags->out,
                   "file to write (default: atp_budgets.json in the model's directory, "
                   "FILE.gguf.atp_budgets.json beside a GGUF file)")
      ->option_text("FILE")
      ->check(NotEmpty);
  calibrate->footer(
      "Heads that look something up keep their keys, the others share what is left. With --text, every "
      "second sequence\n"
      "repeats spans of its first half, so that such heads show; with --ids, bring sequences that need "
      "recall.");
  calibrate->callback([flags, exit_code] { *exit_code = Calibrate(*flags); });
}

}  // namespace atp
