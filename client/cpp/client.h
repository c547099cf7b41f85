// A small C++ client of atp's gRPC interface (proto/atp/v1/inference.proto, where fields and errors are
// documented). No gRPC or protobuf header is needed to use it. Link with atp_client.
//
//   atp::client::Client client({.address = "127.0.0.1:8001"});
//   atp::client::Request request = atp::client::Request::Chat({{"user", "Tell me a story."}});
//   request.max_tokens = 100;
//   auto usage = client.GenerateStream(request, [](const atp::client::Chunk& chunk) {
//     std::cout << chunk.text << std::flush;
//     return true;  // false cancels
//   });
#ifndef ATP_CLIENT_CPP_CLIENT_H_
#define ATP_CLIENT_CPP_CLIENT_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace atp::client {

struct ClientOptions {
  std::string address = "127.0.0.1:8001";  // host:port
  std::string api_key;                     // sent as `authorization: Bearer KEY` when not empty
  bool tls = false;  // for a server behind a TLS proxy; without it nothing is encrypted, the key included
  std::string root_certificates;  // PEM, with tls; empty: the system's
  std::string load_balancing;     // a gRPC policy, as "round_robin"; empty: gRPC's default, one connection
  absl::Duration timeout = absl::InfiniteDuration();  // of every call that brings none
};

struct Message {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

// How far the request's history is compressed, instead of as the server does it by itself: a preset or a
// ratio.
struct Compression {
  std::string preset;                      // "exact", "quality", "balanced" or "compact"; empty: ratio counts
  double ratio = 0;                        // principal entries per token, (0, 1]
  std::optional<int> bits = std::nullopt;  // with a ratio: 16, 8 or 4
};

// What is not set has the server's default.
struct Request {
  std::variant<std::string, std::vector<int32_t>, std::vector<Message>>
      input;  // text, token ids or a conversation
  std::string model;
  std::optional<float> temperature;
  std::optional<int> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<float> presence_penalty;
  std::optional<float> frequency_penalty;
  std::map<int32_t, float> logit_bias;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  bool include_stop_in_output = false;
  std::vector<int32_t> stop_token_ids;
  std::optional<int> max_tokens;  // not set: as many as fit
  int min_tokens = 0;
  bool ignore_eos = false;
  std::optional<int> n;
  std::optional<int> logprobs;
  bool echo = false;
  std::optional<Compression> atp;
  int priority = 0;
  std::optional<absl::Duration> timeout;  // becomes the call's deadline; not set: ClientOptions::timeout
  std::string request_id;                 // sent as x-request-id when not empty

  static Request Prompt(std::string text) { return Make(std::move(text)); }
  static Request PromptTokens(std::vector<int32_t> ids) { return Make(std::move(ids)); }
  static Request Chat(std::vector<Message> messages) { return Make(std::move(messages)); }

 private:
  template <class Input>
  static Request Make(Input input) {
    Request request;
    request.input = std::move(input);
    return request;
  }
};

struct TopLogprob {
  int32_t token = 0;
  float logprob = 0;
  std::string text;  // bytes of the token; may be part of a UTF-8 sequence
};

struct Logprob {
  int32_t token = 0;
  float logprob = 0;
  std::string text;
  std::vector<TopLogprob> top;
};

enum class FinishReason { kNotFinished, kStop, kLength };

// How the answers' history was compressed (CompressionUsage in the .proto).
struct CompressionUsage {
  std::string preset;
  double ratio = 1;
  double bits = 0;
  int64_t tokens = 0;
  int64_t compressed_tokens = 0;
  int64_t entries = 0;
  int64_t kv_bytes = 0;
  int64_t exact_kv_bytes = 0;
};

struct Usage {
  int prompt_tokens = 0;
  int completion_tokens = 0;
  int cached_tokens = 0;
  std::optional<CompressionUsage> atp;
};

// A whole answer, or a piece of one in a stream (then text and tokens are the new piece).
struct Chunk {
  int index = 0;
  std::string text;
  std::vector<int32_t> tokens;
  std::vector<Logprob> logprobs;
  FinishReason finish_reason = FinishReason::kNotFinished;
  std::string matched_stop;
};

struct Generation {
  std::string request_id;
  std::string model;
  std::vector<Chunk> choices;
  Usage usage;
};

struct Model {
  std::string id;
  int max_context_tokens = 0;
  int vocab_size = 0;
};

struct ServerInfo {
  std::string version;
  std::string device;
  bool ready = false;
  int requests_running = 0;
  int requests_waiting = 0;
  int64_t kv_blocks_total = 0;
  int64_t kv_blocks_used = 0;
  int64_t kv_blocks_cached = 0;
};

// Ends a call from another thread. May be used for one call at a time and must outlive it.
class Cancellation {
 public:
  Cancellation();
  ~Cancellation();
  void Cancel();  // before or during the call; the call returns Cancelled

 private:
  friend class Client;
  struct State;
  std::unique_ptr<State> state_;
};

// Thread-safe. The connection is made at the first call and again whenever it was lost; a server that
// vanished without a word is noticed within 40 seconds.
class Client {
 public:
  explicit Client(const ClientOptions& options);
  ~Client();

  // Statuses are the server's (see the .proto), and Unavailable when there is no server.
  absl::StatusOr<Generation> Generate(const Request& request, Cancellation* cancellation = nullptr);

  // Calls `on_chunk` for every piece, in order, on this thread, and returns when the stream is over.
  // `on_chunk` returns whether to go on; with false the call ends with Cancelled, and the server frees what
  // it held for it.
  absl::StatusOr<Usage> GenerateStream(const Request& request,
                                       const std::function<bool(const Chunk&)>& on_chunk,
                                       Cancellation* cancellation = nullptr);

  absl::StatusOr<std::vector<int32_t>> Tokenize(const std::string& text, bool add_special_tokens = true);
  absl::StatusOr<std::string> Detokenize(const std::vector<int32_t>& tokens);
  absl::StatusOr<std::vector<Model>> ListModels();
  absl::StatusOr<ServerInfo> Info();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// How long to wait before trying again, where the server said so (ResourceExhausted).
std::optional<absl::Duration> RetryAfter(const absl::Status& status);

}  // namespace atp::client

#endif  // ATP_CLIENT_CPP_CLIENT_H_
