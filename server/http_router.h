// Which path answers what: the endpoints of the OpenAI-style REST API, authorisation, CORS and errors. No
// socket here; a request goes in, an answer or the promise of one comes out.
#ifndef ATP_SERVER_HTTP_ROUTER_H_
#define ATP_SERVER_HTTP_ROUTER_H_

#include <atomic>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/generate_service.h"
#include "server/http_message.h"
#include "server/metrics.h"
#include "server/openai_json.h"

namespace atp {

class HttpRouter {
 public:
  // `metrics_only`: /metrics and /health* alone, for the metrics port. `metrics` outlives the router.
  HttpRouter(const ServerConfig& config, Metrics* metrics, bool metrics_only)
      : config_(config), metrics_(metrics), metrics_only_(metrics_only) {}

  // Until then all but /health/live and /metrics answers 503. Thread-safe.
  void SetService(GenerateService* service) { service_.store(service); }

  // Thread-safe. `wake` is kept by a pending answer: see CompletionAnswer::Start.
  Routed Route(const HttpRequest& request, std::function<void()> wake) const;

  // What the protocol itself refuses (400, 408, 413, 431, 503): the same shape and headers as every other
  // error.
  Routed Refuse(const HttpRequest& request, int status, std::string_view message) const;

 private:
  struct Endpoint;
  struct Call;
  using Answer = decltype(Routed::answer);
  using Handler = Answer (HttpRouter::*)(const Call&) const;

  static const Endpoint kEndpoints[];
  const Endpoint* Find(std::string_view path) const;
  Answer Dispatch(const Endpoint* endpoint, Call* call) const;
  HttpHeaders CommonHeaders(const HttpRequest& request) const;
  HttpResponse Preflight(const HttpRequest& request, std::string_view allow) const;

  HttpResponse Error(const absl::Status& status, const GenerateService* service) const;

  Answer Complete(const Call& call, absl::StatusOr<CompletionCall> parsed) const;
  Answer Models(const Call& call) const;
  Answer Model(const Call& call) const;
  Answer Completions(const Call& call) const;
  Answer ChatCompletions(const Call& call) const;
  Answer Tokenize(const Call& call) const;
  Answer Detokenize(const Call& call) const;
  Answer Version(const Call& call) const;
  Answer RenderMetrics(const Call& call) const;
  Answer Live(const Call& call) const;
  Answer Ready(const Call& call) const;

  const ServerConfig config_;
  Metrics* metrics_;
  const bool metrics_only_;
  std::atomic<GenerateService*> service_{nullptr};
};

// The client's id where it is 1 to 128 printable ASCII characters, else a fresh one.
std::string RequestIdFrom(std::string_view header);

// The path of a request target: without query, without scheme and authority, percent-decoded. Empty when
// malformed.
std::string PathOf(std::string_view target);

}  // namespace atp

#endif  // ATP_SERVER_HTTP_ROUTER_H_
