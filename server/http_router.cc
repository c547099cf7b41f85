#include "server/http_router.h"

#include <algorithm>
#include <cctype>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/completion_answer.h"
#include "server/openai_json.h"

namespace atp {
namespace {

constexpr int64_t kMaxTimeoutMs = 24 * 3600 * 1000;

absl::string_view ToAbsl(std::string_view text) { return {text.data(), text.size()}; }

HttpResponse Json(std::string body) {
  HttpResponse response;
  response.body = std::move(body);
  return response;
}

HttpResponse ErrorResponse(int status, std::string_view message, const char* code = nullptr) {
  HttpResponse response;
  response.status = status;
  response.body = RenderError(status, message, code);
  return response;
}

// What follows "Bearer "; empty when there is none.
std::string_view BearerToken(std::string_view authorization) {
  constexpr std::string_view kScheme = "Bearer ";
  if (!absl::StartsWithIgnoreCase(ToAbsl(authorization), ToAbsl(kScheme))) return {};
  authorization.remove_prefix(kScheme.size());
  const absl::string_view token = absl::StripAsciiWhitespace(ToAbsl(authorization));
  return {token.data(), token.size()};
}

bool IsTokenList(std::string_view text) {  // header names, commas, spaces
  return text.size() <= 1024 && std::all_of(text.begin(), text.end(), [](unsigned char c) {
           return std::isalnum(c) || c == '-' || c == '_' || c == ',' || c == ' ';
         });
}

absl::StatusOr<absl::Time> DeadlineOf(const HttpRequest& request) {
  const std::string_view text = request.Header("x-request-timeout-ms");
  if (text.empty()) return absl::InfiniteFuture();
  int64_t milliseconds = 0;
  if (!absl::SimpleAtoi(ToAbsl(text), &milliseconds) || milliseconds < 1 || milliseconds > kMaxTimeoutMs) {
    return absl::InvalidArgumentError(absl::StrCat(
        "x-request-timeout-ms: must be a whole number of milliseconds in [1, ", kMaxTimeoutMs, "]"));
  }
  return request.began + absl::Milliseconds(milliseconds);
}

constexpr size_t kMaxShownBytes = 128;  // of a client's text, in an error

absl::Status CheckModel(const GenerateService& service, const std::string& model) {
  if (model.empty() || model == service.model().id) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("model: '", model.substr(0, kMaxShownBytes),
                                          "' is not served here; this server serves '", service.model().id,
                                          "'"));
}

ModelCard CardOf(const ServedModel& model) {
  return {model.id, model.created_unix_seconds, model.max_context_tokens};
}

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

struct HttpRouter::Endpoint {
  std::string_view pattern;  // ends in "{id}": the rest of the path, which may have slashes
  bool post;                 // else GET and HEAD
  bool locked;               // needs an API key where any is configured
  bool on_metrics_port;
  bool without_service;  // answers before the model is loaded
  Handler handler;

  std::string_view Allow() const { return post ? "POST, OPTIONS" : "GET, HEAD, OPTIONS"; }
};

struct HttpRouter::Call {
  const HttpRequest& request;
  std::string path;
  GenerateService* service;
  std::function<void()> wake;
};

const HttpRouter::Endpoint HttpRouter::kEndpoints[] = {
    {"/v1/models", false, true, false, false, &HttpRouter::Models},
    {"/v1/models/{id}", false, true, false, false, &HttpRouter::Model},
    {"/v1/completions", true, true, false, false, &HttpRouter::Completions},
    {"/v1/chat/completions", true, true, false, false, &HttpRouter::ChatCompletions},
    {"/tokenize", true, true, false, false, &HttpRouter::Tokenize},
    {"/detokenize", true, true, false, false, &HttpRouter::Detokenize},
    {"/version", false, false, false, false, &HttpRouter::Version},
    {"/metrics", false, false, true, true, &HttpRouter::RenderMetrics},
    {"/health/live", false, false, true, true, &HttpRouter::Live},
    {"/health/ready", false, false, true, true, &HttpRouter::Ready},
    {"/health", false, false, true, true, &HttpRouter::Ready},
};

const HttpRouter::Endpoint* HttpRouter::Find(std::string_view path) const {
  constexpr std::string_view kRest = "{id}";
  for (const Endpoint& endpoint : kEndpoints) {
    if (metrics_only_ && !endpoint.on_metrics_port) continue;
    if (endpoint.pattern == path) return &endpoint;
    if (!absl::EndsWith(ToAbsl(endpoint.pattern), ToAbsl(kRest))) continue;
    const std::string_view prefix = endpoint.pattern.substr(0, endpoint.pattern.size() - kRest.size());
    if (path.size() > prefix.size() && path.substr(0, prefix.size()) == prefix) return &endpoint;
  }
  return nullptr;
}

Routed HttpRouter::Route(const HttpRequest& request, std::function<void()> wake) const {
  Call call{request, PathOf(request.target), service_.load(), std::move(wake)};
  const Endpoint* endpoint = Find(call.path);
  Routed routed;
  routed.route = endpoint == nullptr ? "unknown" : endpoint->pattern;
  routed.headers = CommonHeaders(request);
  routed.answer = Dispatch(endpoint, &call);
  return routed;
}

HttpRouter::Answer HttpRouter::Dispatch(const Endpoint* endpoint, Call* call) const {
  const std::string& method = call->request.method;
  if (method == "OPTIONS") return Preflight(call->request, endpoint == nullptr ? "" : endpoint->Allow());
  // A stranger learns nothing about /v1, not even which paths there are.
  const bool locked = endpoint != nullptr ? endpoint->locked : absl::StartsWith(call->path, "/v1/");
  const bool answers = endpoint != nullptr && endpoint->without_service;
  if (call->service == nullptr && !answers && !metrics_only_) {
    return Error(absl::UnavailableError("the model is still being loaded; try again soon"), nullptr);
  }
  if (locked && call->service != nullptr &&
      !call->service->Authorized(BearerToken(call->request.Header("authorization")))) {
    HttpResponse response =
        ErrorResponse(401, "a valid API key is needed: send the header Authorization: Bearer KEY");
    response.headers.emplace_back("WWW-Authenticate", "Bearer");
    return response;
  }
  if (endpoint == nullptr) return ErrorResponse(404, "there is nothing at this path");
  if (endpoint->post ? method != "POST" : method != "GET" && method != "HEAD") {
    HttpResponse response = ErrorResponse(
        405, absl::StrCat("this path does not take this method; use ", endpoint->post ? "POST" : "GET"));
    response.headers.emplace_back("Allow", endpoint->Allow());
    return response;
  }
  return (this->*endpoint->handler)(*call);
}

Routed HttpRouter::Refuse(const HttpRequest& request, int status, std::string_view message) const {
  Routed routed;
  routed.route = "refused";
  routed.headers = CommonHeaders(request);
  HttpResponse response = ErrorResponse(status, message);
  if (status == 503) response.headers.emplace_back("Retry-After", "1");
  routed.answer = std::move(response);
  return routed;
}

HttpHeaders HttpRouter::CommonHeaders(const HttpRequest& request) const {
  HttpHeaders headers = {{"x-request-id", request.request_id}};
  if (config_.cors_allowed_origins.empty()) return headers;
  const std::string_view origin = request.Header("origin");
  const auto allows = [this](std::string_view name) {
    return std::find(config_.cors_allowed_origins.begin(), config_.cors_allowed_origins.end(), name) !=
           config_.cors_allowed_origins.end();
  };
  const bool any = allows("*");
  if (!any) headers.emplace_back("Vary", "Origin");
  if (origin.empty() || (!any && !allows(origin))) return headers;
  headers.emplace_back("Access-Control-Allow-Origin", any ? "*" : std::string(origin));
  headers.emplace_back("Access-Control-Expose-Headers", "x-request-id, retry-after, x-should-retry");
  return headers;
}

// Also plain OPTIONS. Origins that are not allowed get no CORS headers, which is how a browser is told no.
HttpResponse HttpRouter::Preflight(const HttpRequest& request, std::string_view allow) const {
  HttpResponse response;
  if (allow.empty()) return ErrorResponse(404, "there is nothing at this path");
  response.status = 204;
  response.content_type.clear();
  response.headers.emplace_back("Allow", allow);
  const HttpHeaders common = CommonHeaders(request);
  const bool allowed = std::any_of(common.begin(), common.end(), [](const auto& header) {
    return header.first == "Access-Control-Allow-Origin";
  });
  if (!allowed || request.Header("access-control-request-method").empty()) return response;
  const std::string_view wanted = request.Header("access-control-request-headers");
  response.headers.emplace_back("Access-Control-Allow-Methods", allow);
  response.headers.emplace_back("Access-Control-Allow-Headers",
                                !wanted.empty() && IsTokenList(wanted)
                                    ? std::string(wanted)
                                    : "authorization, content-type, x-request-id, x-request-timeout-ms");
  response.headers.emplace_back("Access-Control-Max-Age", "600");
  return response;
}

HttpResponse HttpRouter::Error(const absl::Status& status, const GenerateService* service) const {
  const int http_status = HttpStatusOf(status);
  // OpenAI's word for it, by which clients know that they must shorten their prompt.
  const char* code = absl::IsOutOfRange(status) ? "context_length_exceeded" : nullptr;
  HttpResponse response =
      ErrorResponse(http_status, {status.message().data(), status.message().size()}, code);
  if (http_status == 429 || http_status == 503) {
    const absl::Duration wait = service == nullptr ? absl::Seconds(1) : service->RetryAfter();
    const int64_t seconds = std::max<int64_t>(1, absl::ToInt64Seconds(absl::Ceil(wait, absl::Seconds(1))));
    response.headers.emplace_back("Retry-After", absl::StrCat(seconds));
  }
  return response;
}

HttpRouter::Answer HttpRouter::Models(const Call& call) const {
  return Json(RenderModelList(CardOf(call.service->model())));
}

HttpRouter::Answer HttpRouter::Model(const Call& call) const {
  const std::string id = call.path.substr(std::string_view("/v1/models/").size());
  if (absl::Status s = CheckModel(*call.service, id); !s.ok()) return Error(s, call.service);
  return Json(RenderModel(CardOf(call.service->model())));
}

HttpRouter::Answer HttpRouter::Completions(const Call& call) const {
  return Complete(call, ParseCompletionCall(call.request.body, call.service->config().limits,
                                            call.service->model().sampling));
}

HttpRouter::Answer HttpRouter::ChatCompletions(const Call& call) const {
  return Complete(
      call, ParseChatCall(call.request.body, call.service->config().limits, call.service->model().sampling));
}

HttpRouter::Answer HttpRouter::Complete(const Call& call, absl::StatusOr<CompletionCall> parsed) const {
  if (!parsed.ok()) return Error(parsed.status(), call.service);
  absl::StatusOr<absl::Time> deadline = DeadlineOf(call.request);
  if (!deadline.ok()) return Error(deadline.status(), call.service);
  absl::StatusOr<std::shared_ptr<CompletionAnswer>> answer = CompletionAnswer::Start(
      call.service, *std::move(parsed), call.request.request_id, *deadline, call.wake);
  if (!answer.ok()) return Error(answer.status(), call.service);
  return std::shared_ptr<PendingAnswer>(*std::move(answer));
}

HttpRouter::Answer HttpRouter::Tokenize(const Call& call) const {
  absl::StatusOr<TokenizeCall> parsed = ParseTokenizeCall(call.request.body);
  if (!parsed.ok()) return Error(parsed.status(), call.service);
  if (absl::Status s = CheckModel(*call.service, parsed->model); !s.ok()) return Error(s, call.service);
  const auto* messages = std::get_if<std::vector<ChatMessage>>(&parsed->input);
  absl::StatusOr<std::vector<TokenId>> tokens =
      messages != nullptr ? call.service->TokenizeChat(*messages, parsed->add_generation_prompt)
                          : call.service->Tokenize(std::get<std::string>(parsed->input), parsed->add_special);
  if (!tokens.ok()) return Error(tokens.status(), call.service);
  return Json(RenderTokens(*tokens, call.service->model().max_context_tokens));
}

HttpRouter::Answer HttpRouter::Detokenize(const Call& call) const {
  absl::StatusOr<DetokenizeCall> parsed = ParseDetokenizeCall(call.request.body);
  if (!parsed.ok()) return Error(parsed.status(), call.service);
  if (absl::Status s = CheckModel(*call.service, parsed->model); !s.ok()) return Error(s, call.service);
  absl::StatusOr<std::string> text = call.service->Detokenize(parsed->tokens);
  if (!text.ok()) return Error(text.status(), call.service);
  return Json(RenderText(*text));
}

HttpRouter::Answer HttpRouter::Version(const Call&) const { return Json(RenderVersion()); }

HttpRouter::Answer HttpRouter::RenderMetrics(const Call&) const {
  HttpResponse response;
  response.content_type = "text/plain; version=0.0.4; charset=utf-8";
  response.body = metrics_->Render();
  return response;
}

HttpRouter::Answer HttpRouter::Live(const Call&) const { return Json(RenderHealth("live")); }

HttpRouter::Answer HttpRouter::Ready(const Call& call) const {
  if (call.service == nullptr)
    return Error(absl::UnavailableError("the model is still being loaded"), nullptr);
  if (!call.service->ready())
    return Error(absl::UnavailableError("the server takes no new requests"), call.service);
  return Json(RenderHealth("ready"));
}

std::string RequestIdFrom(std::string_view header) {
  const bool fit =
      !header.empty() && header.size() <= 128 &&
      std::all_of(header.begin(), header.end(), [](unsigned char c) { return c >= 0x20 && c < 0x7F; });
  return fit ? std::string(header) : NewRequestId();
}

std::string PathOf(std::string_view target) {
  if (const size_t scheme = target.find("://");
      !target.empty() && target[0] != '/' && scheme != target.npos) {
    const size_t path = target.find('/', scheme + 3);
    target = path == target.npos ? "/" : target.substr(path);
  }
  target = target.substr(0, target.find_first_of("?#"));
  std::string decoded;
  for (size_t i = 0; i < target.size(); ++i) {
    if (target[i] != '%') {
      decoded.push_back(target[i]);
      continue;
    }
    const int high = i + 2 < target.size() ? HexValue(target[i + 1]) : -1;
    const int low = i + 2 < target.size() ? HexValue(target[i + 2]) : -1;
    if (high < 0 || low < 0) return {};
    decoded.push_back(static_cast<char>(high * 16 + low));
    i += 2;
  }
  return decoded;
}

}  // namespace atp
