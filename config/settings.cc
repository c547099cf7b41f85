#include "config/settings.h"

#include <algorithm>
#include <limits>

namespace atp {
namespace {

constexpr double kWeek = 7.0 * 24 * 3600 * 1000;
constexpr double kPebibyte = 0x1p50;

#define ATP_MEMBER(type, path)                  \
  SettingMember {                               \
    +[](Config& c) -> type* { return &c.path; } \
  }

std::vector<Setting> MakeTable() {
  using String = std::string;
  using Strings = std::vector<std::string>;
  constexpr auto kBytes = SettingUnit::kBytes;
  constexpr auto kMs = SettingUnit::kMilliseconds;
  return {
      {.key = "model.path",
       .member = ATP_MEMBER(String, model.path),
       .meaning = "model directory in Hugging Face layout, GGUF file, or directory with one GGUF file"},
      {.key = "model.name",
       .member = ATP_MEMBER(String, model.name),
       .meaning = "name that clients ask for; empty: the directory's or file's name",
       .may_be_empty = true},
      {.key = "model.weight_dtype",
       .member = ATP_MEMBER(String, model.weight_dtype),
       .meaning =
           "what weight matrices are kept as: auto (as they are stored), f32, bf16, q8 (8 bits and a scale "
           "per 32 elements) or q4 (4 bits and a scale per 32 elements)",
       .choices = {"auto", "f32", "bf16", "q8", "q4"}},
      {.key = "model.activation_dtype",
       .member = ATP_MEMBER(String, model.activation_dtype),
       .meaning = "what activations are rounded to before they meet bf16 weights: f32 (not at all), or bf16, "
                  "faster where the processor multiplies bf16",
       .choices = {"f32", "bf16"}},
      {.key = "model.chat_template",
       .member = ATP_MEMBER(String, model.chat_template),
       .meaning = "how chat messages become a prompt; auto: from the template in the model's files",
       .choices = {"auto", "llama-2", "llama-3", "chatml", "mistral", "plain"}},
      {.key = "model.generation_config",
       .member = ATP_MEMBER(String, model.generation_config),
       .meaning = "sampling parameters that a request does not bring; auto: those of the model's "
                  "generation_config.json or GGUF file (temperature, top_k, top_p, min_p, "
                  "repetition_penalty), else the API's; ignore: the API's",
       .choices = {"auto", "ignore"}},

      {.key = "backend.device",
       .member = ATP_MEMBER(String, backend.device),
       .meaning = "where the model runs; reference is the slow fp32 oracle",
       .choices = {"cpu", "cuda", "reference"}},
      {.key = "backend.threads",
       .member = ATP_MEMBER(int, backend.threads),
       .meaning = "threads that compute; 0: the physical cores that the cgroup grants",
       .max = 1024},
      {.key = "backend.cpu_isa",
       .member = ATP_MEMBER(String, backend.cpu_isa),
       .meaning = "SIMD instruction set; auto: the best that the machine has (amx, avx512_bf16, avx512_vnni, "
                  "avx512, avx2_vnni, avx2, sse4, scalar, ...)"},

      {.key = "scheduler.max_batch_tokens",
       .member = ATP_MEMBER(int, scheduler.max_batch_tokens),
       .meaning = "tokens per engine step, prefill and decode together",
       .min = 1,
       .max = 1 << 20},
      {.key = "scheduler.max_prefill_chunk_tokens",
       .member = ATP_MEMBER(int, scheduler.max_prefill_chunk_tokens),
       .meaning = "prompt tokens of one sequence per engine step",
       .min = 1,
       .max = 1 << 20},
      {.key = "scheduler.max_running_requests",
       .member = ATP_MEMBER(int, scheduler.max_running_requests),
       .meaning = "sequences that run at the same time",
       .min = 1,
       .max = 65535},
      {.key = "scheduler.max_waiting_requests",
       .member = ATP_MEMBER(int, scheduler.max_waiting_requests),
       .meaning = "requests that may wait; beyond, clients get 429 or RESOURCE_EXHAUSTED",
       .min = 1,
       .max = 1 << 24},
      {.key = "scheduler.default_timeout_ms",
       .member = ATP_MEMBER(int64_t, scheduler.default_timeout_ms),
       .meaning = "deadline of a request that brings none; 0: none",
       .max = kWeek,
       .unit = kMs},

      {.key = "kv_cache.memory_bytes",
       .member = ATP_MEMBER(int64_t, kv_cache.memory_bytes),
       .meaning = "size of the KV cache; 0: memory_fraction of what the cgroup leaves after the weights, at "
                  "most what "
                  "scheduler.max_running_requests sequences of full length can use",
       .max = kPebibyte,
       .unit = kBytes},
      {.key = "kv_cache.memory_fraction",
       .member = ATP_MEMBER(double, kv_cache.memory_fraction),
       .meaning = "share of the memory left after the weights; used when memory_bytes is 0",
       .max = 0.95,
       .min_excluded = true},
      {.key = "kv_cache.block_tokens",
       .member = ATP_MEMBER(int, kv_cache.block_tokens),
       .meaning = "tokens per block of the cache",
       .min = 16,
       .max = 1024,
       .multiple_of = 16},
      {.key = "kv_cache.dtype",
       .member = ATP_MEMBER(String, kv_cache.dtype),
       .meaning = "element type of keys and values; auto: bf16 where the weights are 16-bit, else f32; fp8, "
                  "int8 and "
                  "int4 have a scale per key and per value",
       .choices = {"auto", "f32", "bf16", "fp8", "int8", "int4"}},
      {.key = "kv_cache.prefix_cache",
       .member = ATP_MEMBER(bool, kv_cache.prefix_cache),
       .meaning = "keep blocks of finished requests for prompts that begin alike"},

      {.key = "atp.preset",
       .member = ATP_MEMBER(String, atp.preset),
       .meaning =
           "how far the KV cache is compressed, as a share of an exact bf16 cache: exact, quality about 1/4 "
           "(half the entries, 8 bits), balanced 1/8 (half, 4 bits), compact 1/16 (a quarter, 4 bits); auto: "
           "balanced where a budgets file lies beside the model, else exact",
       .choices = {"auto", "exact", "quality", "balanced", "compact"}},
      {.key = "atp.ratio",
       .member = ATP_MEMBER(double, atp.ratio),
       .meaning =
           "principal entries per token of a compressed segment, the mean over kv heads; 0: the preset's",
       .max = 1},
      {.key = "atp.bits",
       .member = ATP_MEMBER(int, atp.bits),
       .meaning =
           "bits per element of principal entries: 16 (as exact ones), 8 or 4; 0: the preset's, 16 where "
           "atp.ratio is set",
       .max = 16},
      {.key = "atp.segment_tokens",
       .member = ATP_MEMBER(int, atp.segment_tokens),
       .meaning = "tokens that are compressed together; whole blocks of kv_cache.block_tokens",
       .min = 16,
       .max = 1 << 16,
       .multiple_of = 16},
      {.key = "atp.window_tokens",
       .member = ATP_MEMBER(int, atp.window_tokens),
       .meaning = "newest tokens that stay exact; whole blocks of kv_cache.block_tokens",
       .max = 1 << 24,
       .multiple_of = 16},
      {.key = "atp.sink_tokens",
       .member = ATP_MEMBER(int, atp.sink_tokens),
       .meaning = "first tokens of a sequence that every fit keeps",
       .max = 1 << 16},
      {.key = "atp.max_principal_keys",
       .member = ATP_MEMBER(int, atp.max_principal_keys),
       .meaning = "principal entries per kv head that a history stays around, a quarter more at most, so "
                  "that a sequence's cache is bounded; 0: no cap",
       .max = 1 << 24},
      {.key = "atp.budgets",
       .member = ATP_MEMBER(String, atp.budgets),
       .meaning =
           "ratios per kv head, as atp calibrate writes them: auto (atp_budgets.json in the model's "
           "directory, FILE.gguf.atp_budgets.json beside a GGUF file, where it is), uniform, or a file"},
      {.key = "atp.linear_rank",
       .member = ATP_MEMBER(double, atp.linear_rank),
       .meaning = "rank of the input of linear layers in whole segments of a prompt, as a share of their "
                  "tokens, where "
                  "that is faster; 1: exact",
       .max = 1,
       .min_excluded = true},
      {.key = "atp.allow_override",
       .member = ATP_MEMBER(bool, atp.allow_override),
       .meaning = "a request may bring a preset or a ratio of its own"},

      {.key = "server.host",
       .member = ATP_MEMBER(String, server.host),
       .meaning = "address to listen on, for all ports; 0.0.0.0 in a container"},
      {.key = "server.http_port",
       .member = ATP_MEMBER(int, server.http_port),
       .meaning = "port of the OpenAI-style REST API; 0: any free port, printed at start",
       .max = 65535},
      {.key = "server.grpc_port",
       .member = ATP_MEMBER(int, server.grpc_port),
       .meaning = "port of gRPC; 0: any free port",
       .max = 65535},
      {.key = "server.metrics_port",
       .member = ATP_MEMBER(int, server.metrics_port),
       .meaning = "port that serves only /metrics and /health; 0: any free port",
       .max = 65535},
      {.key = "server.io_threads",
       .member = ATP_MEMBER(int, server.io_threads),
       .meaning = "threads that serve HTTP sockets",
       .min = 1,
       .max = 256},
      {.key = "server.drain_timeout_ms",
       .member = ATP_MEMBER(int64_t, server.drain_timeout_ms),
       .meaning = "how long running requests may take to finish after SIGTERM",
       .max = kWeek,
       .unit = kMs},
      {.key = "server.max_body_bytes",
       .member = ATP_MEMBER(int64_t, server.max_body_bytes),
       .meaning = "largest HTTP body and gRPC message",
       .min = 1024,
       .max = 0x1p30,
       .unit = kBytes},
      {.key = "server.max_header_bytes",
       .member = ATP_MEMBER(int64_t, server.max_header_bytes),
       .meaning = "largest HTTP request header",
       .min = 1024,
       .max = 0x1p20,
       .unit = kBytes},
      {.key = "server.max_connections",
       .member = ATP_MEMBER(int, server.max_connections),
       .meaning = "open HTTP connections; beyond: 503 and close",
       .min = 1,
       .max = 1000000},
      {.key = "server.idle_timeout_ms",
       .member = ATP_MEMBER(int64_t, server.idle_timeout_ms),
       .meaning = "a keep-alive connection without a request is closed after this",
       .min = 1,
       .max = kWeek,
       .unit = kMs},
      {.key = "server.header_timeout_ms",
       .member = ATP_MEMBER(int64_t, server.header_timeout_ms),
       .meaning = "time from a request's first byte to its end",
       .min = 1,
       .max = kWeek,
       .unit = kMs},
      {.key = "server.write_timeout_ms",
       .member = ATP_MEMBER(int64_t, server.write_timeout_ms),
       .meaning = "a client that does not read its answer for this long is cut off",
       .min = 1,
       .max = kWeek,
       .unit = kMs},
      {.key = "server.cors_allowed_origins",
       .member = ATP_MEMBER(Strings, server.cors_allowed_origins),
       .meaning = "origins that browsers may call from; empty: no CORS headers, \"*\": any"},
      {.key = "server.api_keys",
       .member = ATP_MEMBER(Strings, server.api_keys),
       .meaning = "accepted bearer tokens for /v1, /tokenize, /detokenize and gRPC; empty: open to all",
       .secret = true},

      {.key = "limits.max_n",
       .member = ATP_MEMBER(int, limits.max_n),
       .meaning = "answers per prompt",
       .min = 1,
       .max = 128},
      {.key = "limits.max_prompts",
       .member = ATP_MEMBER(int, limits.max_prompts),
       .meaning = "prompts in one /v1/completions call",
       .min = 1,
       .max = 65536},
      {.key = "limits.max_logprobs",
       .member = ATP_MEMBER(int, limits.max_logprobs),
       .meaning = "most likely tokens that a request may ask for at each position",
       .max = 20},
      {.key = "limits.max_stop_strings",
       .member = ATP_MEMBER(int, limits.max_stop_strings),
       .meaning = "stop strings of one request",
       .max = 48},
      {.key = "limits.default_max_tokens",
       .member = ATP_MEMBER(int, limits.default_max_tokens),
       .meaning = "tokens of a /v1/completions answer without max_tokens; chat and gRPC: as many as fit",
       .min = 1,
       .max = 1 << 24},

      {.key = "log.level",
       .member = ATP_MEMBER(String, log.level),
       .meaning = "least severe messages that are logged",
       .choices = {"trace", "debug", "info", "warn", "error"}},
  };
}

#undef ATP_MEMBER

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({substitute, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

std::span<const Setting> SettingsTable() {
  static const std::vector<Setting>& table = *new std::vector<Setting>(MakeTable());
  return table;
}

const Setting* FindSetting(std::string_view key) {
  for (const Setting& setting : SettingsTable()) {
    if (setting.key == key) return &setting;
  }
  return nullptr;
}

std::string_view NearestKey(std::string_view key) {
  key = key.substr(0, 64);  // longer than any key; bounds the work
  const auto last_part = [](std::string_view k) { return k.substr(k.find('.') + 1); };
  std::string_view best;
  size_t best_distance = std::numeric_limits<size_t>::max();
  for (const Setting& setting : SettingsTable()) {
    // A right name in the wrong section is nearer than a vaguely similar key of that section.
    constexpr size_t kWrongSection = 3;
    const size_t distance = std::min(EditDistance(key, setting.key),
                                     EditDistance(last_part(key), last_part(setting.key)) + kWrongSection);
    if (distance < best_distance) {
      best_distance = distance;
      best = setting.key;
    }
  }
  return best;
}

}  // namespace atp
