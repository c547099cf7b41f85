// What a caller asks the engine for, and how the answer comes back.
#ifndef ATP_ENGINE_REQUEST_H_
#define ATP_ENGINE_REQUEST_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"

namespace atp {

using TokenId = int32_t;
using RequestId = uint64_t;  // given by the engine, unique in a process; 0 is no request

// Defaults sample from the model's own distribution. Ranges are checked by ValidateSampling().
struct SamplingParams {
  float temperature = 1.0f;         // 0 = greedy; [0, 100]
  int top_k = 0;                    // 0 = off
  float top_p = 1.0f;               // (0, 1]
  float min_p = 0.0f;               // [0, 1]
  float repetition_penalty = 1.0f;  // (0, 100]; over prompt and generated tokens (CTRL, arXiv 1909.05858)
  float presence_penalty = 0.0f;    // [-2, 2]; over generated tokens
  float frequency_penalty = 0.0f;   // [-2, 2]; over generated tokens
  std::vector<std::pair<TokenId, float>> logit_bias;
  std::optional<uint64_t> seed;  // none: the engine draws one
  std::vector<std::string> stop;
  bool include_stop_in_output = false;
  std::vector<TokenId> stop_token_ids;
  int max_tokens = 16;  // generated tokens; [0, …]: 0 only makes sense with prompt logprobs (echo)
  int min_tokens = 0;   // no end-of-sequence, stop token or stop string before so many
  bool ignore_eos = false;
  int n = 1;                    // answers per prompt; answer i uses seed + i
  std::optional<int> logprobs;  // k: log probability of each chosen token, and of the k most likely ones
};

// How far a request wants its history compressed, instead of as the server does it. Either a preset or a
// ratio; ValidateOverride() in engine/compression_plans.h checks the ranges.
struct CompressionOverride {
  std::optional<std::string> preset;  // exact | quality | balanced | compact
  std::optional<double> ratio;        // principal entries per token, (0, 1]; rounded to 1/64
  std::optional<int> bits;            // with a ratio: per element, 16 | 8 | 4
};

struct Request {
  std::string external_id;  // the client's x-request-id, for logs
  std::vector<TokenId> prompt;
  SamplingParams sampling;
  bool echo_prompt = false;  // the answer begins with the prompt (and its log probabilities, where asked for)
  std::optional<CompressionOverride> compression;  // none: as the server does it
  int priority = 0;                                // higher runs first; FCFS inside a class
  absl::Time deadline = absl::InfiniteFuture();
};

enum class FinishReason : uint8_t {
  kStop,       // end of sequence, stop token or stop string
  kLength,     // max_tokens, or the model's positions are used up
  kCancelled,  // the caller left
  kDeadline,   // Request::deadline passed
  kShutdown,   // the server stopped before the answer was whole
  kError,      // the device failed; the message says how
};

struct TokenLogprob {
  TokenId token = 0;
  float logprob = 0;                           // natural log, of the model's distribution before temperature
  std::vector<std::pair<TokenId, float>> top;  // the k most likely, best first
};

// A piece of one answer. `text` never ends inside a UTF-8 sequence and never runs ahead of a possible stop
// string; `tokens` are those whose text is in this or an earlier piece.
struct OutputDelta {
  int index = 0;  // which of the n answers
  std::string text;
  std::vector<TokenId> tokens;
  std::vector<TokenLogprob> logprobs;  // one per token when asked for, else empty
  // Echo only: this piece is the prompt. logprobs[0] of a prompt has no value (logprob NaN, top empty).
  bool is_prompt = false;
};

// How an answer's history was compressed, and what its cache held when it ended. A request's answers are
// added up; what they share counts for each.
struct CompressionUsage {
  std::string preset;  // "exact", "balanced" …, "ratio" where it was set by hand; empty: not known
  double ratio = 1;    // principal entries per token of a compressed segment, mean over kv heads
  double bits = 0;     // per element of principal entries, mean over kv heads
  int64_t tokens = 0;  // of prompt and answer that were in the cache
  int64_t compressed_tokens = 0;  // of these, those that were there as principal entries only
  int64_t entries = 0;            // exact and principal ones, mean over kv heads
  int64_t kv_bytes = 0;           // of all blocks, those for the next fit too
  int64_t exact_kv_bytes = 0;     // what an exact cache of the same format would have taken
};

struct Usage {
  int prompt_tokens = 0;
  int completion_tokens = 0;
  int cached_tokens = 0;  // of the prompt, found in the prefix cache
  CompressionUsage atp = {};
};
// Adds one answer's to those of its request.
void AddCompression(const CompressionUsage& answer, CompressionUsage* request);

struct OutputFinish {
  int index = 0;
  FinishReason reason = FinishReason::kStop;
  std::string matched_stop;  // the stop string that ended it, if one did
  std::string message;       // kError and kShutdown: what happened
  Usage usage;               // of this answer
};

// Receives one request's answers. Called from the engine thread only, in order, and must not block or call
// the engine back synchronously other than Engine::Cancel. Every submitted request ends with exactly one
// OnFinish per answer.
class OutputSink {
 public:
  virtual ~OutputSink() = default;
  virtual void OnDelta(OutputDelta delta) = 0;
  virtual void OnFinish(OutputFinish finish) = 0;
};

}  // namespace atp

#endif  // ATP_ENGINE_REQUEST_H_
