// atp serve: REST and gRPC in front of one model, until SIGTERM or SIGINT.
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "cli/command.h"
#include "cli/logging.h"
#include "cli/served_engine.h"
#include "cli/settings_flags.h"
#include "cli/stop_signals.h"
#include "nlohmann/json.hpp"
#include "server/generate_service.h"
#include "server/grpc_server.h"
#include "server/metrics.h"
#include "server/rest_server.h"
#include "spdlog/spdlog.h"

namespace atp {
namespace {

// After the drain every answer has its end; this is for the last bytes to reach the clients.
constexpr absl::Duration kFlushTime = absl::Seconds(2);

std::string ShellQuoted(const std::string& text) {
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'");
}

// How a client on this machine reaches `host`.
std::string Address(const std::string& host, int port) {
  if (host == "0.0.0.0") return absl::StrCat("127.0.0.1:", port);
  if (host == "::") return absl::StrCat("[::1]:", port);
  return absl::StrCat(host.find(':') == std::string::npos ? host : absl::StrCat("[", host, "]"), ":", port);
}

// Every connection is a file descriptor, and Debian's soft limit is just 1024: raises it as far as it may go.
void RaiseFileLimit(const ServerConfig& server) {
  constexpr rlim_t kOurOwn = 256;  // listening sockets, weights, gRPC's own
  const rlim_t wanted =
      static_cast<rlim_t>(server.max_connections) * 2 + kOurOwn;  // HTTP, and as much for gRPC
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur = limit.rlim_max == RLIM_INFINITY ? wanted : std::min(wanted, limit.rlim_max);
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur < wanted) {
    spdlog::warn("file_limit={} wanted={} for=server.max_connections raise_with=\"ulimit -n\"",
                 limit.rlim_cur, wanted);
  }
}

class Server {
 public:
  // `signals` outlives the server, which stops itself through it where the device is lost.
  Server(const Config& config, StopSignals* signals) : config_(config), signals_(signals) {}

  absl::Status Start();
  void Announce() const;  // on stdout
  void Stop(const std::string& signal);
  bool device_lost() const { return device_lost_; }

 private:
  absl::Status Load();
  void LogChatTemplate(const ChatTemplate& chat) const;

  const Config config_;
  StopSignals* const signals_;
  std::atomic<bool> device_lost_ = false;
  // In the order of use, so that destruction stops the front ends first.
  Metrics metrics_;
  LoadedModel loaded_;
  std::unique_ptr<BatchingEngine> engine_;
  std::optional<GenerateService> service_;
  std::unique_ptr<RestServer> rest_;
  std::unique_ptr<GrpcServer> grpc_;
  bool chats_ = false;  // the model has a chat format of its own
};

void Server::LogChatTemplate(const ChatTemplate& chat) const {
  spdlog::info("chat_template={} change_with=model.chat_template", chat.name());
  if (chats_ || config_.model.chat_template != "auto") return;
  const absl::StatusOr<std::string> own = LoadChatTemplateText(config_.model.path);
  if (!own.ok() || own->empty()) return;
  spdlog::warn(
      "the model's chat template is of no built-in format: chats are written as plain text, which it was not "
      "trained on. Set model.chat_template where one fits, or render chats yourself for /v1/completions");
}

absl::Status Server::Load() {
  absl::StatusOr<LoadedModel> loaded =
      LoadModel(config_, LimitsOf(config_.scheduler), TokenizerNeed::kRequired);
  if (!loaded.ok()) return loaded.status();
  loaded_ = *std::move(loaded);
  absl::StatusOr<ChatTemplate> chat = LoadChatTemplate(config_.model);
  if (!chat.ok()) return chat.status();
  chats_ = std::string(chat->name()) != "plain";
  LogChatTemplate(*chat);

  absl::StatusOr<std::unique_ptr<BatchingEngine>> engine = MakeEngine(config_, &loaded_, &metrics_, [this] {
    device_lost_ = true;
    signals_->Stop("device_lost");
  });
  if (!engine.ok()) return engine.status();
  engine_ = *std::move(engine);
  absl::StatusOr<ServedModel> model = DescribeModel(config_.model, loaded_);
  if (!model.ok()) return model.status();
  LogStart(model->id, config_.model.path, loaded_, *engine_);
  spdlog::info(
      "temperature={:g} top_k={} top_p={:g} min_p={:g} repetition_penalty={:g} "
      "of=requests_that_say_nothing change_with=model.generation_config",
      model->sampling.temperature, model->sampling.top_k, model->sampling.top_p, model->sampling.min_p,
      model->sampling.repetition_penalty);
  service_.emplace(engine_.get(), loaded_.tokenizer.get(), *chat, *model, config_);
  return absl::OkStatus();
}

absl::Status Server::Start() {
  // First, so that probes find a live process that is not ready, and a port in use is known before a long
  // load.
  RaiseFileLimit(config_.server);
  absl::StatusOr<std::unique_ptr<RestServer>> rest = RestServer::Start(config_, &metrics_);
  if (!rest.ok()) return rest.status();
  rest_ = *std::move(rest);
  spdlog::info("listening http={} metrics={} state=loading", Address(config_.server.host, rest_->http_port()),
               Address(config_.server.host, rest_->metrics_port()));
  if (absl::Status s = GrpcServer::CheckPort(config_.server); !s.ok()) return s;
  if (absl::Status s = Load(); !s.ok()) return s;

  metrics_.Attach(&*service_);
  absl::StatusOr<std::unique_ptr<GrpcServer>> grpc = GrpcServer::Start(config_, &*service_, &metrics_);
  if (!grpc.ok()) return grpc.status();
  grpc_ = *std::move(grpc);
  signals_->Serving();  // from here on there may be requests to finish
  rest_->SetService(&*service_);
  service_->SetReady(true);
  grpc_->SetServing(true);
  spdlog::info("ready http={} grpc={} metrics={}", Address(config_.server.host, rest_->http_port()),
               Address(config_.server.host, grpc_->port()),
               Address(config_.server.host, rest_->metrics_port()));
  return absl::OkStatus();
}

void Server::Announce() const {
  const std::string http = absl::StrCat("http://", Address(config_.server.host, rest_->http_port()));
  nlohmann::ordered_json body = {{"model", service_->model().id}};
  if (chats_) {
    body["messages"] = {{{"role", "user"}, {"content", "Tell me about the sea."}}};
  } else {
    body["prompt"] = "The old man looked at the sea and";
  }
  body["max_tokens"] = 48;
  const std::string auth = config_.server.api_keys.empty()
                               ? ""
                               : " -H \"Authorization: Bearer $ATP_API_KEY\"";  // never a key in a log
  const std::string curl =
      absl::StrCat("curl ", http, chats_ ? "/v1/chat/completions" : "/v1/completions", auth,
                   " -H 'Content-Type: application/json' -d ",
                   ShellQuoted(body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)));
  std::printf(
      "\natp %s serves %s\n  REST     %s (OpenAI base URL: %s/v1)\n  gRPC     %s\n  metrics  "
      "http://%s/metrics\n\n"
      "Try:\n  %s\n\n",
      std::string(AtpVersion()).c_str(), service_->model().id.c_str(), http.c_str(), http.c_str(),
      Address(config_.server.host, grpc_->port()).c_str(),
      Address(config_.server.host, rest_->metrics_port()).c_str(), curl.c_str());
  std::fflush(stdout);
}

void Server::Stop(const std::string& signal) {
  service_->SetReady(false);
  grpc_->SetServing(false);
  // A gRPC client keeps its connection and would send call after call to be refused; HTTP's close with each
  // refusal.
  grpc_->StartDrain();
  const EngineStats stats = service_->Stats();
  spdlog::info("draining signal={} running={} waiting={} drain_timeout_ms={}", signal, stats.requests_running,
               stats.requests_waiting, config_.server.drain_timeout_ms);
  const absl::Status drained = engine_->Drain(absl::Milliseconds(config_.server.drain_timeout_ms));
  if (!drained.ok()) spdlog::warn("drain: {}", std::string(drained.message()));
  rest_->Stop(kFlushTime);
  grpc_->Stop(kFlushTime);
  spdlog::info("stopped");
}

int Serve(const SettingsFlags& settings) {
  absl::StatusOr<Config> config = settings.Resolve();
  if (!config.ok()) return BadArguments(config.status());
  SetUpLogging(config->log.level);
  StopSignals signals;
  Server server(*config, &signals);
  if (absl::Status s = server.Start(); !s.ok()) return Failure(s);
  server.Announce();
  server.Stop(signals.Wait());
  return server.device_lost() ? 1 : 0;
}

}  // namespace

void AddServe(CLI::App* app, int* exit_code) {
  CLI::App* const serve = app->add_subcommand("serve", "Serve a model over OpenAI-style REST and gRPC");
  auto settings = std::make_shared<SettingsFlags>(serve);
  settings->AddModelFlags();
  settings->Add("--host", "server.host");
  settings->Add("--http-port", "server.http_port");
  settings->Add("--grpc-port", "server.grpc_port");
  settings->Add("--metrics-port", "server.metrics_port");
  serve->footer(
      "SIGTERM or SIGINT: no new requests, running ones finish within server.drain_timeout_ms, exit code 0; "
      "a second\n"
      "signal stops at once. Exit code 1 when the device is lost. All settings with units and defaults: "
      "docs/configuration.md, config/cpu.yaml.");
  serve->callback([settings, exit_code] { *exit_code = Serve(*settings); });
}

}  // namespace atp
