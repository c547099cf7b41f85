// Every setting of atp: plain structs with unit, default and meaning. Values are checked by Validate(); files
// and flags are read by config_loader. A key is written section.name, as in scheduler.max_waiting_requests.
#ifndef ATP_CONFIG_CONFIG_H_
#define ATP_CONFIG_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace atp {

struct ModelConfig {
  std::string path = "models/default";     // a Hugging Face directory, a GGUF file, or a directory with one
  std::string name;                        // served model name; empty: the directory's or file's name
  std::string weight_dtype = "auto";       // auto (as stored) | f32 | bf16 | q8 | q4
  std::string activation_dtype = "f32";    // f32 | bf16: what products with bf16 weights round activations to
  std::string chat_template = "auto";      // auto | llama-2 | llama-3 | chatml | mistral | plain
  std::string generation_config = "auto";  // auto (sampling defaults of the model) | ignore
};

struct BackendConfig {
  std::string device = "cpu";    // cpu | cuda | reference
  int threads = 0;               // 0: the physical cores that the cgroup grants
  std::string cpu_isa = "auto";  // auto, or one that the machine has: avx512 | avx2 | sse4 | scalar …
};

struct SchedulerConfig {
  int max_batch_tokens = 512;           // tokens per step, prefill and decode together
  int max_prefill_chunk_tokens = 256;   // of one sequence per step
  int max_running_requests = 64;        // sequences in a step
  int max_waiting_requests = 1024;      // beyond: 429 / RESOURCE_EXHAUSTED
  int64_t default_timeout_ms = 600000;  // deadline of a request that brings none; 0: none
};

struct KvCacheConfig {
  int64_t memory_bytes = 0;      // 0: memory_fraction of what the cgroup leaves after the weights
  double memory_fraction = 0.5;  // (0, 0.95]
  int block_tokens = 16;         // a multiple of 16
  std::string dtype = "auto";    // auto (bf16 where the weights are 16-bit, else f32) | f32 | bf16 | fp8 …
  bool prefix_cache = true;
};

// Compression of the KV cache into principal keys: docs/principal_keys.md.
struct AtpConfig {
  std::string preset = "auto";  // auto | exact | quality | balanced | compact
  double ratio = 0;             // principal entries per token of a closed segment; 0: the preset's
  int bits = 0;  // per element of principal entries: 16 | 8 | 4; 0: the preset's, 16 where ratio is set
  int segment_tokens = 256;    // compressed at once; a multiple of kv_cache.block_tokens
  int window_tokens = 256;     // newest tokens that stay exact; the same, or 0
  int sink_tokens = 4;         // first tokens that stay as they are
  int max_principal_keys = 0;  // per kv head; 0: as many as there are
  // Rank of the input of linear layers in a prompt's whole segments, as a share of its rows; 1: exact.
  double linear_rank = 1;
  bool allow_override = true;    // requests may choose their own preset or ratio
  std::string budgets = "auto";  // auto (atp_budgets.json beside the model, where it is) | uniform | a path
};

struct ServerConfig {
  std::string host = "127.0.0.1";  // 0.0.0.0 in a container
  int http_port = 8000;            // 0: any free port, printed at start
  int grpc_port = 8001;
  int metrics_port = 8002;
  int io_threads = 1;  // threads that serve HTTP sockets
  int64_t drain_timeout_ms = 30000;
  int64_t max_body_bytes = 4 << 20;  // HTTP body and gRPC message
  int64_t max_header_bytes = 16 << 10;
  int max_connections = 1024;                     // HTTP; beyond: 503 and close
  int64_t idle_timeout_ms = 75000;                // keep-alive connection without a request
  int64_t header_timeout_ms = 10000;              // from the first byte to the end of the request
  int64_t write_timeout_ms = 30000;               // a client that does not read its stream is cut off
  std::vector<std::string> cors_allowed_origins;  // empty: no CORS headers; "*": any
  // Empty: open. Else `Authorization: Bearer KEY` on /v1, /tokenize, /detokenize and gRPC.
  std::vector<std::string> api_keys;
};

struct LimitsConfig {
  int max_n = 16;        // answers per prompt
  int max_prompts = 64;  // prompts in one /v1/completions call
  int max_logprobs = 20;
  int max_stop_strings = 16;
  int default_max_tokens =
      16;  // /v1/completions without max_tokens, as OpenAI; chat and gRPC: as many as fit
};

struct LogConfig {
  std::string level = "info";  // trace | debug | info | warn | error
};

struct Config {
  ModelConfig model;
  BackendConfig backend;
  SchedulerConfig scheduler;
  KvCacheConfig kv_cache;
  AtpConfig atp;
  ServerConfig server;
  LimitsConfig limits;
  LogConfig log;
};

// InvalidArgument naming the key, its value and what is allowed; all problems at once, one a line.
absl::Status Validate(const Config& config);

}  // namespace atp

#endif  // ATP_CONFIG_CONFIG_H_
