// atp bench: how fast this machine runs a model. prefill and decode time the model's forward pass alone,
// serve the whole engine with requests side by side; so does prefill where the history is compressed. Prompts
// are pseudo-random tokens: speed does not depend on what they say.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <latch>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "cli/command.h"
#include "cli/logging.h"
#include "cli/served_engine.h"
#include "cli/settings_flags.h"
#include "engine/block_table.h"
#include "nlohmann/json.hpp"

namespace atp {
namespace {

struct BenchFlags {
  explicit BenchFlags(CLI::App* app) : settings(app) {}
  SettingsFlags settings;
  std::string mode;
  int batch = 1;
  int context = 256;
  int tokens = 32;
  double ratio = 0;  // 0: not given
  int cap = 0;
  bool json = false;

  // Where compression is asked for (or its absence, to compare with), everything runs in the engine.
  bool engine() const { return mode == "serve" || ratio > 0; }
};

struct Measured {
  int64_t tokens = 0;
  absl::Duration time;
  double cpu_seconds = 0;  // of all threads, in the engine only
  double ratio = 1;        // cache entries per token
};

// What the engine says of its steps.
class StepTotals final : public EngineObserver {
 public:
  void Watch(const Engine* engine) { engine_ = engine; }
  void OnStep(const StepReport& report) override {
    fit_time += report.fit_time;
    step_time += report.duration;
    sequences = std::max(sequences, report.sequences);
    if (report.prefill_tokens == 0) {
      decode_time += report.duration;
      decode_tokens += report.decode_tokens;
    }
    const EngineStats stats = engine_->Stats();
    const auto bytes = static_cast<int64_t>(stats.kv_block_bytes);
    peak_bytes = std::max(peak_bytes, stats.kv_blocks_used * bytes);
    last_bytes = stats.kv_blocks_used * bytes;
    preemptions = stats.preemptions_total;
  }
  void OnInterTokenLatency(absl::Duration) override {}
  void OnRequestFinished(const RequestReport&) override {}

  absl::Duration step_time, fit_time;
  absl::Duration decode_time;  // of steps without prompts
  int64_t decode_tokens = 0;   // in them
  int sequences = 0;           // most in one step
  int64_t peak_bytes = 0;      // of blocks that sequences held
  int64_t last_bytes = 0;      // before the last step
  uint64_t preemptions = 0;

 private:
  const Engine* engine_ = nullptr;
};

std::vector<TokenId> RandomPrompt(int tokens, int64_t vocab_size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<TokenId> prompt(static_cast<size_t>(tokens));
  for (TokenId& id : prompt) id = static_cast<TokenId>(random() % static_cast<uint64_t>(vocab_size));
  return prompt;
}

// A batch of sequences of equal length, driven without a scheduler.
class ForwardBench {
 public:
  static absl::StatusOr<ForwardBench> Create(const Config& config, LoadedModel* loaded,
                                             const BenchFlags& flags);

  // All sequences from nothing to `context` tokens.
  absl::StatusOr<Measured> Prefill();
  // Then `steps` tokens for each sequence, one per step.
  absl::StatusOr<Measured> Decode(int steps);

 private:
  ForwardBench(LoadedModel* loaded, KvCache kv_cache, const BenchFlags& flags)
      : loaded_(loaded), kv_cache_(std::move(kv_cache)), flags_(flags) {}
  // Appends rows [done, done + rows) of a sequence, its last one's logits wanted.
  void Add(int sequence, int done, int rows, Batch* batch);

  LoadedModel* loaded_;
  KvCache kv_cache_;
  const BenchFlags& flags_;
  std::vector<BlockTable> tables_;
  std::vector<std::vector<TokenId>> prompts_;
};

absl::StatusOr<ForwardBench> ForwardBench::Create(const Config& config, LoadedModel* loaded,
                                                  const BenchFlags& flags) {
  const LlamaConfig& llama = loaded->model->config();
  const KvCache::Shape shape = KvShapeOf(config, *loaded);
  const int length = flags.context + flags.tokens;
  absl::StatusOr<KvCache> kv_cache =
      KvCache::Create(loaded->backend.get(), shape, KvBytes(config.kv_cache, *loaded, flags.batch, length));
  if (!kv_cache.ok()) return kv_cache.status();
  ForwardBench bench(loaded, *std::move(kv_cache), flags);
  const int blocks = (length + shape.block_tokens - 1) / shape.block_tokens;
  std::vector<BlockId> ids(static_cast<size_t>(shape.heads_total()));
  BlockId next = 0;
  for (int s = 0; s < flags.batch; ++s) {
    bench.tables_.emplace_back(llama.layers, llama.kv_heads);
    for (int b = 0; b < blocks; ++b) {
      std::iota(ids.begin(), ids.end(), next);
      next += static_cast<BlockId>(ids.size());
      bench.tables_.back().AppendExact(ids);
    }
    bench.prompts_.push_back(RandomPrompt(length, llama.vocab_size, static_cast<uint64_t>(s)));
  }
  return bench;
}

void ForwardBench::Add(int sequence, int done, int rows, Batch* batch) {
  const auto s = static_cast<size_t>(sequence);
  BatchEntry entry;
  entry.table = &tables_[s];
  entry.first_row = batch->rows();
  entry.rows = rows;
  entry.exact_entries = done + rows;
  entry.first_logit = static_cast<int>(batch->logit_rows.size());
  entry.logits = 1;
  for (int p = done; p < done + rows; ++p) {
    batch->tokens.push_back(prompts_[s][static_cast<size_t>(p)]);
    batch->positions.push_back(p);
  }
  batch->logit_rows.push_back(batch->rows() - 1);
  batch->entries.push_back(entry);
}

absl::StatusOr<Measured> ForwardBench::Prefill() {
  const int step = loaded_->model->limits().max_batch_rows;
  const absl::Time start = absl::Now();
  Batch batch;
  for (int s = 0; s < flags_.batch; ++s) {
    for (int done = 0; done < flags_.context; done += step) {
      batch.Clear();
      Add(s, done, std::min(step, flags_.context - done), &batch);
      if (auto logits = loaded_->model->Forward(batch, kv_cache_); !logits.ok()) return logits.status();
    }
  }
  return Measured{int64_t{flags_.batch} * flags_.context, absl::Now() - start, 0};
}

absl::StatusOr<Measured> ForwardBench::Decode(int steps) {
  const absl::Time start = absl::Now();
  Batch batch;
  for (int t = 0; t < steps; ++t) {
    batch.Clear();
    for (int s = 0; s < flags_.batch; ++s) Add(s, flags_.context + t, 1, &batch);
    if (auto logits = loaded_->model->Forward(batch, kv_cache_); !logits.ok()) return logits.status();
  }
  return Measured{int64_t{flags_.batch} * steps, absl::Now() - start, 0};
}

class CountingSink final : public OutputSink {
 public:
  explicit CountingSink(std::shared_ptr<std::latch> done) : done_(std::move(done)) {}
  void OnDelta(OutputDelta) override {}
  void OnFinish(OutputFinish finish) override {
    finish_ = std::move(finish);
    done_->count_down();
  }
  const OutputFinish& finish() const { return finish_; }  // after all are done

 private:
  std::shared_ptr<std::latch> done_;
  OutputFinish finish_;
};

// `requests` at once, each a prompt of `context` tokens and an answer of `tokens`; how long all of them take,
// and the tokens of the answers.
absl::StatusOr<Measured> ServeAll(BatchingEngine* engine, int64_t vocab_size, int requests, int context,
                                  int tokens, uint64_t seed) {
  auto done = std::make_shared<std::latch>(requests);
  std::vector<std::shared_ptr<CountingSink>> sinks;
  const absl::Time start = absl::Now();
  const std::clock_t cpu_start = std::clock();
  for (int s = 0; s < requests; ++s) {
    Request request;
    request.prompt = RandomPrompt(context, vocab_size, seed + static_cast<uint64_t>(s));
    request.sampling.max_tokens = tokens;
    request.sampling.ignore_eos = true;
    request.sampling.seed = seed + static_cast<uint64_t>(s);
    sinks.push_back(std::make_shared<CountingSink>(done));
    // Where one is refused the engine ends those before it as it goes; their sinks hold what they count into.
    if (absl::StatusOr<RequestId> id = engine->Submit(std::move(request), sinks.back()); !id.ok())
      return id.status();
  }
  done->wait();
  Measured measured{0, absl::Now() - start, static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC};
  for (const auto& sink : sinks) {
    if (sink->finish().reason == FinishReason::kError) return absl::InternalError(sink->finish().message);
    measured.tokens += sink->finish().usage.completion_tokens;
  }
  return measured;
}

absl::StatusOr<Measured> BenchEngine(Config config, LoadedModel* loaded, const BenchFlags& flags,
                                     StepTotals* totals) {
  config.scheduler.max_waiting_requests = std::max(config.scheduler.max_waiting_requests, flags.batch);
  const int64_t vocab_size = loaded->model->config().vocab_size;
  absl::StatusOr<std::unique_ptr<BatchingEngine>> engine = MakeEngine(config, loaded, totals);
  if (!engine.ok()) return engine.status();
  totals->Watch(engine->get());
  // A short prompt first, to touch the memory and fill the caches.
  absl::StatusOr<Measured> measured = ServeAll(engine->get(), vocab_size, 1, std::min(flags.context, 512), 1,
                                               static_cast<uint64_t>(flags.batch));
  if (!measured.ok()) return measured;
  *totals = StepTotals();
  totals->Watch(engine->get());
  const bool prefill = flags.mode == "prefill";
  measured =
      ServeAll(engine->get(), vocab_size, flags.batch, flags.context, prefill ? 1 : flags.tokens, /*seed=*/0);
  if (!measured.ok()) return measured;
  if (prefill) measured->tokens = int64_t{flags.batch} * flags.context;
  measured->ratio = loaded->compression.ratio;
  return measured;
}

// --ratio and --cap over the configuration.
Config Compressed(Config config, const BenchFlags& flags) {
  if (flags.ratio == 0) return config;
  if (flags.ratio == 1 && flags.cap == 0) {
    config.atp.preset = "exact";
    config.atp.ratio = config.atp.bits = 0;
  } else {
    config.atp.ratio = flags.ratio;
  }
  config.atp.max_principal_keys = flags.cap;
  return config;
}

absl::StatusOr<Measured> Run(const BenchFlags& flags, const Config& config, size_t* kv_bytes,
                             StepTotals* totals) {
  ModelLimits limits = LimitsOf(config.scheduler);
  if (!flags.engine()) {
    limits.max_batch_entries = std::max(limits.max_batch_entries, flags.batch);
    limits.max_logit_rows = std::max(limits.max_logit_rows, flags.batch);
    limits.max_batch_rows = std::max(limits.max_batch_rows, flags.batch);
  }
  absl::StatusOr<LoadedModel> loaded = LoadModel(config, limits, TokenizerNeed::kOptional);
  if (!loaded.ok()) return loaded.status();
  const int length = flags.context + (flags.mode == "prefill" ? 0 : flags.tokens);
  if (length > loaded->max_context_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("--context and --tokens: ", length,
                                                   " tokens, the model has positions for ",
                                                   loaded->max_context_tokens));
  }
  *kv_bytes = KvBytes(config.kv_cache, *loaded, flags.batch, length);
  if (flags.engine()) return BenchEngine(Compressed(config, flags), &*loaded, flags, totals);

  absl::StatusOr<ForwardBench> bench = ForwardBench::Create(config, &*loaded, flags);
  if (!bench.ok()) return bench.status();
  // Once to touch the memory and fill the caches, once to measure.
  absl::StatusOr<Measured> prefill = bench->Prefill();
  if (!prefill.ok()) return prefill;
  if (flags.mode == "prefill") return bench->Prefill();
  return bench->Decode(flags.tokens);
}

int Bench(const BenchFlags& flags) {
  if (!std::isfinite(flags.ratio)) {
    return BadArguments(absl::InvalidArgumentError(absl::StrCat("--ratio ", flags.ratio, ": not a number")));
  }
  if (flags.cap > 0 && flags.ratio == 0)
    return BadArguments(absl::InvalidArgumentError("--cap: give --ratio too (1: the cap alone)"));
  if (flags.ratio > 0 && flags.mode == "decode") {
    return BadArguments(absl::InvalidArgumentError(
        "--ratio: decode times one forward pass over an exact cache; use atp bench serve --ratio"));
  }
  absl::StatusOr<Config> config = flags.settings.Resolve();
  if (!config.ok()) return BadArguments(config.status());
  SetUpQuietLogging(config->log.level);
  size_t kv_bytes = 0;
  StepTotals totals;
  absl::StatusOr<Measured> measured = Run(flags, *config, &kv_bytes, &totals);
  if (!measured.ok()) return Failure(measured.status());
  const double seconds = absl::ToDoubleSeconds(measured->time);
  const double rate = static_cast<double>(measured->tokens) / seconds;
  nlohmann::ordered_json row = {{"bench", flags.mode},        {"batch", flags.batch},
                                {"context", flags.context},   {"ratio", measured->ratio},
                                {"tokens", measured->tokens}, {"seconds", seconds},
                                {"tokens_per_second", rate},  {"kv_bytes", kv_bytes}};
  if (flags.engine()) {
    const double steps = absl::ToDoubleSeconds(totals.step_time);
    const double decode = absl::ToDoubleSeconds(totals.decode_time);
    row["cap"] = flags.cap;
    row["cpu_seconds"] = measured->cpu_seconds;
    row["fit_share"] = steps > 0 ? absl::ToDoubleSeconds(totals.fit_time) / steps : 0;
    row["most_sequences"] = totals.sequences;
    row["preemptions"] = totals.preemptions;
    row["kv_bytes_peak"] = totals.peak_bytes;
    row["kv_bytes_last"] = totals.last_bytes;
    row["decode_tokens_per_second"] = decode > 0 ? static_cast<double>(totals.decode_tokens) / decode : 0;
  }
  if (flags.json) {
    std::puts(nlohmann::ordered_json({{"rows", nlohmann::ordered_json::array({row})}}).dump().c_str());
  } else {
    std::printf("%s: batch %d, context %d tokens: %lld tokens in %.3f s, %.1f tokens/s, KV cache %zu bytes\n",
                flags.mode.c_str(), flags.batch, flags.context, static_cast<long long>(measured->tokens),
                seconds, rate, kv_bytes);
  }
  return Printed();
}

}  // namespace

void AddBench(CLI::App* app, int* exit_code) {
  CLI::App* const bench = app->add_subcommand("bench", "How many tokens per second this machine does");
  auto flags = std::make_shared<BenchFlags>(bench);
  bench
      ->add_option("what", flags->mode,
                   "prefill (prompts), decode (one token per step) or serve (the whole engine)")
      ->option_text("prefill|decode|serve")
      ->required()
      ->check(CLI::IsMember({"prefill", "decode", "serve"}));
  flags->settings.AddModelFlags();
  bench->add_option("--batch", flags->batch, "sequences side by side (default: 1)")
      ->option_text("N")
      ->check(CLI::Range(1, 65536));
  bench->add_option("--context", flags->context, "prompt of each sequence, in tokens (default: 256)")
      ->option_text("TOKENS")
      ->check(CLI::Range(1, 1 << 24));
  bench
      ->add_option("--tokens", flags->tokens,
                   "answer of each sequence in decode and serve, in tokens (default: 32)")
      ->option_text("TOKENS")
      ->check(CLI::Range(1, 1 << 24));
  bench
      ->add_option("--ratio", flags->ratio,
                   "with prefill and serve: cache entries per token, 1 is exact (default: as configured in "
                   "serve, exact in prefill)")
      ->option_text("R")
      ->check(CLI::Range(0.001, 1.0));
  bench->add_option("--cap", flags->cap, "with --ratio: atp.max_principal_keys (default: 0, none)")
      ->option_text("N")
      ->check(CLI::Range(0, 1 << 20));
  bench->add_flag("--json", flags->json, "print {\"rows\": [...]} (default: a line of text)");
  bench->callback([flags, exit_code] { *exit_code = Bench(*flags); });
}

}  // namespace atp
