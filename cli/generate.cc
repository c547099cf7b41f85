// atp generate: one answer, streamed to stdout. The way of a request is the server's, without the sockets.
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <latch>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "cli/command.h"
#include "cli/logging.h"
#include "cli/served_engine.h"
#include "cli/settings_flags.h"
#include "server/generate_service.h"

namespace atp {
namespace {

struct GenerateFlags {
  explicit GenerateFlags(CLI::App* app) : settings(app) {}
  SettingsFlags settings;
  std::optional<std::string> prompt;
  bool chat = false;
  std::optional<int> max_tokens;
  std::optional<uint64_t> seed;
  // Not given: the model's.
  std::optional<float> temperature, top_p, min_p, repetition_penalty;
  std::optional<int> top_k;
  std::vector<std::string> stop;
  bool ignore_eos = false;
};

class StdoutSink final : public OutputSink {
 public:
  void OnDelta(OutputDelta delta) override {
    std::fwrite(delta.text.data(), 1, delta.text.size(), stdout);
    std::fflush(stdout);
  }
  void OnFinish(OutputFinish finish) override {
    finish_ = std::move(finish);
    finished_.count_down();
  }
  const OutputFinish& Wait() {
    finished_.wait();
    return finish_;
  }

 private:
  OutputFinish finish_;
  std::latch finished_{1};
};

std::string ReadStdin() {
  std::string text{std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
  if (!text.empty() && text.back() == '\n') text.pop_back();  // what echo adds
  return text;
}

absl::Status Run(const GenerateFlags& flags, Config config) {
  config.scheduler.max_running_requests = 1;  // a cache for one sequence is enough
  config.scheduler.default_timeout_ms = 0;
  absl::StatusOr<LoadedModel> loaded =
      LoadModel(config, LimitsOf(config.scheduler), TokenizerNeed::kRequired);
  if (!loaded.ok()) return loaded.status();
  absl::StatusOr<ChatTemplate> chat = LoadChatTemplate(config.model);
  if (!chat.ok()) return chat.status();
  absl::StatusOr<std::unique_ptr<BatchingEngine>> engine = MakeEngine(config, &*loaded, nullptr);
  if (!engine.ok()) return engine.status();
  absl::StatusOr<ServedModel> model = DescribeModel(config.model, *loaded);
  if (!model.ok()) return model.status();
  GenerateService service(engine->get(), loaded->tokenizer.get(), *chat, *model, config);

  std::string prompt = flags.prompt ? *flags.prompt : ReadStdin();
  GenerateInput input;
  if (flags.chat) {
    input.prompt = std::vector<ChatMessage>{{"user", std::move(prompt), ""}};
  } else {
    input.prompt = std::move(prompt);
  }
  SamplingParams& sampling = input.sampling;
  sampling = service.model().sampling;
  sampling.temperature = flags.temperature.value_or(sampling.temperature);
  sampling.top_k = flags.top_k.value_or(sampling.top_k);
  sampling.top_p = flags.top_p.value_or(sampling.top_p);
  sampling.min_p = flags.min_p.value_or(sampling.min_p);
  sampling.repetition_penalty = flags.repetition_penalty.value_or(sampling.repetition_penalty);
  sampling.seed = flags.seed;
  sampling.stop = flags.stop;
  sampling.ignore_eos = flags.ignore_eos;
  input.max_tokens_given = flags.max_tokens.has_value();
  if (flags.max_tokens) sampling.max_tokens = *flags.max_tokens;

  auto sink = std::make_shared<StdoutSink>();
  absl::StatusOr<Submitted> submitted = service.Generate(std::move(input), sink);
  if (!submitted.ok()) return submitted.status();
  const OutputFinish& finish = sink->Wait();
  std::fputc('\n', stdout);
  if (std::fflush(stdout) != 0) return absl::UnavailableError("stdout: cannot be written");
  if (finish.reason == FinishReason::kError) return absl::InternalError(finish.message);
  return absl::OkStatus();
}

int Generate(const GenerateFlags& flags) {
  absl::StatusOr<Config> config = flags.settings.Resolve();
  if (!config.ok()) return BadArguments(config.status());
  SetUpQuietLogging(config->log.level);
  const absl::Status status = Run(flags, *config);
  return status.ok() ? 0 : Failure(status);
}

void AddSamplingFlags(CLI::App* app, GenerateFlags* flags) {
  app->add_option("--max-tokens", flags->max_tokens,
                  "length of the answer in tokens (default: as many as fit)")
      ->option_text("TOKENS")
      ->check(CLI::Range(1, 1 << 24));
  app->add_option("--temperature", flags->temperature,
                  "in [0, 100]; 0: always the most likely token (default: the model's, or 1)")
      ->option_text("T")
      ->check(CLI::Range(0.0f, 100.0f));
  app->add_option("--top-k", flags->top_k,
                  "draw from the K most likely tokens; 0: all (default: the model's, or 0)")
      ->option_text("K")
      ->check(CLI::Range(0, 1 << 24));
  app->add_option("--top-p", flags->top_p,
                  "draw from the most likely tokens that make up P, in (0, 1] (default: the model's, or 1)")
      ->option_text("P")
      ->check(CLI::Range(0.0001f, 1.0f));
  app->add_option("--min-p", flags->min_p,
                  "no token less likely than P times the most likely, in [0, 1] (default: the model's, or 0)")
      ->option_text("P")
      ->check(CLI::Range(0.0f, 1.0f));
  app->add_option("--repetition-penalty", flags->repetition_penalty,
                  "above 1: repeat less, in (0, 100] (default: the model's, or 1)")
      ->option_text("R")
      ->check(CLI::Range(0.0001f, 100.0f));
  app->add_option("--seed", flags->seed, "same seed, same answer (default: drawn)")
      ->option_text("N")
      ->check([](const std::string& text) {
        uint64_t seed;  // CLI11 would take -1 for the largest number
        return absl::SimpleAtoi(text, &seed) ? "" : "expected a whole number from 0 to 18446744073709551615";
      });
  app->add_option("--stop", flags->stop, "text that ends the answer; repeatable (default: none)")
      ->option_text("TEXT")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app->add_flag("--ignore-eos", flags->ignore_eos, "go on after the end-of-sequence token (default: off)");
}

}  // namespace

void AddGenerate(CLI::App* app, int* exit_code) {
  CLI::App* const generate = app->add_subcommand("generate", "Continue a prompt, streaming to stdout");
  auto flags = std::make_shared<GenerateFlags>(generate);
  flags->settings.AddModelFlags();
  generate->add_option("--prompt", flags->prompt, "text to continue (default: read from stdin)")
      ->option_text("TEXT");
  generate->add_flag("--chat", flags->chat, "the prompt is a user's chat message (default: off)");
  AddSamplingFlags(generate, flags.get());
  generate->callback([flags, exit_code] { *exit_code = Generate(*flags); });
}

}  // namespace atp
