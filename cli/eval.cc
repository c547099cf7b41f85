// atp eval: cross-entropy, perplexity and accuracy of a model on a text or on token ids.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "cli/command.h"
#include "cli/evaluator.h"
#include "cli/logging.h"
#include "cli/npy.h"
#include "cli/served_engine.h"
#include "cli/settings_flags.h"
#include "nlohmann/json.hpp"

namespace atp {
namespace {

constexpr int kDefaultContext = 512;
constexpr std::string_view kSeparator = "<|endoftext|>";

struct EvalFlags {
  explicit EvalFlags(CLI::App* app) : settings(app) {}
  SettingsFlags settings;
  std::string text_file;
  std::string ids_file;
  int context = 0;
  int from = 0;
  int64_t limit = 0;
  std::vector<double> ratios = {1};
  bool json = false;
};

std::string_view Strip(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n\v\f";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

// Each story on its own where the text has separators: BOS (where the model takes one), the stripped story,
// at most `context` tokens. Else windows of `context` tokens, each with its BOS.
std::vector<std::vector<TokenId>> TokenizeText(std::string_view text, const Tokenizer& tokenizer, int context,
                                               int64_t limit) {
  std::vector<TokenId> start;
  if (tokenizer.adds_bos() && tokenizer.special().bos) start.push_back(*tokenizer.special().bos);
  const size_t room = static_cast<size_t>(context) - start.size();
  std::vector<std::vector<TokenId>> sequences;
  const auto full = [&] { return limit > 0 && static_cast<int64_t>(sequences.size()) >= limit; };
  const auto add = [&](const std::vector<TokenId>& ids, size_t begin) {
    sequences.push_back(start);
    const size_t end = std::min(ids.size(), begin + room);
    sequences.back().insert(sequences.back().end(), ids.begin() + static_cast<ptrdiff_t>(begin),
                            ids.begin() + static_cast<ptrdiff_t>(end));
  };
  const auto encode = [&](std::string_view part) {
    return tokenizer.Encode(part, /*add_special=*/false, /*parse_special=*/false);
  };
  if (text.find(kSeparator) == std::string_view::npos) {
    const std::vector<TokenId> ids = encode(text);
    for (size_t begin = 0; begin < ids.size() && !full(); begin += room) add(ids, begin);
    return sequences;
  }
  while (!text.empty() && !full()) {
    const size_t end = text.find(kSeparator);
    const std::string_view story = Strip(text.substr(0, end));
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + kSeparator.size());
    if (!story.empty()) add(encode(story), 0);
  }
  return sequences;
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  std::ostringstream text;
  text << file.rdbuf();
  if (file.bad()) return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  return text.str();
}

absl::StatusOr<std::vector<std::vector<TokenId>>> LoadSequences(const EvalFlags& flags,
                                                                const LoadedModel& loaded, int context) {
  std::vector<std::vector<TokenId>> sequences;
  if (!flags.ids_file.empty()) {
    absl::StatusOr<std::vector<std::vector<TokenId>>> rows =
        ReadTokenIds(flags.ids_file, loaded.model->config().vocab_size);
    if (!rows.ok()) return rows.status();
    sequences = *std::move(rows);
    if (flags.limit > 0 && sequences.size() > static_cast<size_t>(flags.limit)) {
      sequences.resize(static_cast<size_t>(flags.limit));
    }
    for (auto& ids : sequences) ids.resize(std::min(ids.size(), static_cast<size_t>(context)));
  } else {
    absl::StatusOr<std::string> text = ReadText(flags.text_file);
    if (!text.ok()) return text.status();
    sequences = TokenizeText(*text, *loaded.tokenizer, context, flags.limit);
  }
  return sequences;
}

// Compressed caches come with their own columns; the exact one is compared with itself here, so KL and
// agreement are what they are by definition.
nlohmann::ordered_json Row(const Score& score) {
  const double cross_entropy = score.cross_entropy_sum / static_cast<double>(score.tokens);
  return {{"ratio", 1},
          {"segment", 0},
          {"window", 0},
          {"cap", 0},
          {"kv_bytes_ratio", 1},
          {"cross_entropy", cross_entropy},
          {"perplexity", std::exp(cross_entropy)},
          {"kl", 0},
          {"agreement", 1},
          {"accuracy", static_cast<double>(score.right) / static_cast<double>(score.tokens)},
          {"tokens", score.tokens}};
}

absl::StatusOr<Score> Run(const EvalFlags& flags, const Config& config) {
  absl::StatusOr<LlamaConfig> llama = LoadLlamaConfig(config.model.path);
  if (!llama.ok()) return llama.status();
  absl::StatusOr<LoadedModel> loaded =
      LoadModel(config, EvaluationLimits(*llama),
                flags.ids_file.empty() ? TokenizerNeed::kRequired : TokenizerNeed::kOptional);
  if (!loaded.ok()) return loaded.status();
  const int context =
      flags.context > 0 ? flags.context : std::min(kDefaultContext, loaded->max_context_tokens);
  if (context > loaded->max_context_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("--context ", context, ": the model has positions for ",
                                                   loaded->max_context_tokens, " tokens"));
  }
  absl::StatusOr<std::vector<std::vector<TokenId>>> sequences = LoadSequences(flags, *loaded, context);
  if (!sequences.ok()) return sequences.status();

  const int parallel = ParallelSequences(sequences->size(), context);
  KvCache::Shape shape;
  shape.layers = llama->layers;
  shape.kv_heads = llama->kv_heads;
  shape.head_dim = llama->head_dim;
  shape.block_tokens = config.kv_cache.block_tokens;
  shape.format = loaded->kv_format;
  absl::StatusOr<KvCache> kv_cache =
      KvCache::Create(loaded->backend.get(), shape, KvBytes(config.kv_cache, *loaded, parallel, context));
  if (!kv_cache.ok()) return kv_cache.status();
  absl::StatusOr<Score> score = Evaluate(loaded->model.get(), *kv_cache, parallel, *sequences, flags.from);
  if (score.ok() && score->tokens == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("nothing to judge: no sequence has a token after position ", flags.from,
                     " (--from, --context ", context, ")"));
  }
  return score;
}

int Eval(const EvalFlags& flags) {
  if (flags.text_file.empty() == flags.ids_file.empty()) {
    return BadArguments(absl::InvalidArgumentError("eval needs either --text FILE or --ids FILE.npy"));
  }
  for (const double ratio : flags.ratios) {
    if (ratio == 1) continue;
    return BadArguments(absl::InvalidArgumentError(
        absl::StrCat("--ratio ", ratio, ": this version has the exact cache only; give --ratio 1")));
  }
  absl::StatusOr<Config> config = flags.settings.Resolve();
  if (!config.ok()) return BadArguments(config.status());
  SetUpQuietLogging(config->log.level);
  absl::StatusOr<Score> score = Run(flags, *config);
  if (!score.ok()) return Failure(score.status());
  const nlohmann::ordered_json row = Row(*score);
  if (flags.json) {
    std::puts(nlohmann::ordered_json({{"rows", nlohmann::ordered_json::array({row})}}).dump().c_str());
  } else {
    std::printf("ratio  cross_entropy  perplexity  kl        agreement  accuracy  tokens\n");
    std::printf("%-5g  %-13.4f  %-10.4f  %-8.6f  %-9.4f  %-8.4f  %lld\n", row["ratio"].get<double>(),
                row["cross_entropy"].get<double>(), row["perplexity"].get<double>(), row["kl"].get<double>(),
                row["agreement"].get<double>(), row["accuracy"].get<double>(),
                static_cast<long long>(score->tokens));
  }
  return 0;
}

}  // namespace

void AddEval(CLI::App* app, int* exit_code) {
  CLI::App* const eval =
      app->add_subcommand("eval", "How well a model predicts a text: cross-entropy, perplexity, accuracy");
  auto flags = std::make_shared<EvalFlags>(eval);
  flags->settings.AddModelFlags();
  eval->add_option("--text", flags->text_file,
                   "text to judge, split at <|endoftext|> where it has that; or --ids")
      ->option_text("FILE");
  eval->add_option("--ids", flags->ids_file,
                   "token ids to judge: [rows, tokens] of int32, int64 or uint16; or --text")
      ->option_text("FILE.npy");
  eval->add_option("--context", flags->context,
                   "tokens per sequence, more are cut off or go to the next one (default: 512, or the "
                   "model's positions)")
      ->option_text("TOKENS")
      ->check(CLI::Range(2, 1 << 24));
  eval->add_option("--from", flags->from,
                   "judge predictions made at this position and later, in tokens (default: 0)")
      ->option_text("TOKENS")
      ->check(CLI::Range(0, 1 << 24));
  eval->add_option("--limit", flags->limit, "judge only the first sequences; 0: all (default: 0)")
      ->option_text("N")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  eval->add_option("--ratio", flags->ratios,
                   "cache entries per token, as a list; this version has 1 only (default: 1)")
      ->option_text("R,R,...")
      ->delimiter(',');
  eval->add_flag("--json", flags->json, "print {\"rows\": [...]} (default: a table)");
  eval->callback([flags, exit_code] { *exit_code = Eval(*flags); });
}

}  // namespace atp
