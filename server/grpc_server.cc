#include "server/grpc_server.h"

#include <grpc/grpc.h>
#include <grpc/support/log.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <netdb.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <future>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "atp/v1/inference.grpc.pb.h"
#include "server/grpc_call.h"
#include "server/grpc_convert.h"
#include "server/grpc_generate.h"

namespace atp {
namespace {

class InferenceService final : public v1::Inference::CallbackService {
 public:
  explicit InferenceService(GrpcFrontEnd front_end) : front_end_(front_end) {}

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context, const v1::GenerateRequest* request,
                                     v1::GenerateResponse* response) override {
    return StartGenerate(front_end_, context, *request, response);
  }

  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerateStream(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override {
    return StartGenerateStream(front_end_, context, *request);
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override {
    return Answer(context, "/atp.v1.Inference/Tokenize", [&](GenerateService& service) -> absl::Status {
      const bool add_special = !request->has_add_special_tokens() || request->add_special_tokens();
      absl::StatusOr<std::vector<TokenId>> ids = service.Tokenize(request->text(), add_special);
      if (!ids.ok()) return ids.status();
      response->mutable_tokens()->Add(ids->begin(), ids->end());
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override {
    return Answer(context, "/atp.v1.Inference/Detokenize", [&](GenerateService& service) -> absl::Status {
      absl::StatusOr<std::string> text =
          service.Detokenize({request->tokens().begin(), request->tokens().end()});
      if (!text.ok()) return text.status();
      response->set_text(*std::move(text));
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context, const v1::ListModelsRequest*,
                                       v1::ListModelsResponse* response) override {
    return Answer(context, "/atp.v1.Inference/ListModels", [&](GenerateService& service) {
      FillModelInfo(service.model(), response->add_models());
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetServerInfoRequest*,
                                          v1::GetServerInfoResponse* response) override {
    return Answer(context, "/atp.v1.Inference/GetServerInfo", [&](GenerateService& service) {
      const EngineStats stats = service.Stats();
      response->set_version(std::string(AtpVersion()));
      response->set_device(service.model().device);
      response->set_ready(service.ready());
      response->set_requests_running(stats.requests_running);
      response->set_requests_waiting(stats.requests_waiting);
      response->set_kv_blocks_total(stats.kv_blocks_total);
      response->set_kv_blocks_used(stats.kv_blocks_used);
      response->set_kv_blocks_cached(stats.kv_blocks_cached);
      return absl::OkStatus();
    });
  }

 private:
  // The calls that are answered at once, on gRPC's own thread.
  template <class Work>
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const char* route,
                                   const Work& work) {
    GrpcCall call(front_end_, route, context);
    absl::Status status = call.Authorize();
    if (status.ok()) status = work(call.service());
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(call.End(status));
    return reactor;
  }

  GrpcFrontEnd front_end_;
};

class GrpcServerImpl final : public GrpcServer {
 public:
  GrpcServerImpl(GenerateService* service, Metrics* metrics) : inference_({service, metrics}) {}
  ~GrpcServerImpl() override { Stop(absl::ZeroDuration()); }

  absl::Status Listen(const ServerConfig& config);

  int port() const override { return port_; }

  void SetServing(bool serving) override {
    grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
    health->SetServingStatus("", serving);
    health->SetServingStatus(v1::Inference::service_full_name(), serving);
  }

  void StartDrain() override {
    if (server_ == nullptr || shutdown_.valid()) return;
    shutdown_ = std::async(std::launch::async, [this] { server_->Shutdown(); });  // waits for open calls
  }

  void Stop(absl::Duration grace) override {
    StartDrain();
    if (server_ == nullptr || std::exchange(stopped_, true)) return;
    // Watchers of the health service never end by themselves.
    if (shutdown_.wait_for(absl::ToChronoNanoseconds(grace)) == std::future_status::timeout) {
      grpc_server_cancel_all_calls(server_->c_server());
    }
    shutdown_.wait();
    server_->Wait();
  }

 private:
  InferenceService inference_;
  std::unique_ptr<grpc::Server> server_;
  std::future<void> shutdown_;  // under way since StartDrain()
  int port_ = 0;
  bool stopped_ = false;
};

// gRPC's own complaints become lines of our log; its default is its own format on stderr.
void LogGrpcLine(gpr_log_func_args* args) {
  const bool is_error = args->severity == GPR_LOG_SEVERITY_ERROR;
  spdlog::log(is_error ? spdlog::level::warn : spdlog::level::debug,
              "grpc_library file={} line={} message=\"{}\"", args->file, args->line, args->message);
}

constexpr int kConnectionAgeMs = 10 * 60 * 1000;
constexpr size_t kQuotaBytes = 256 << 20;  // of gRPC's own buffers, besides 16 of the largest messages

int ClampToInt(int64_t value) {
  return static_cast<int>(std::clamp<int64_t>(value, 0, std::numeric_limits<int>::max()));
}

void SetLimits(const ServerConfig& config, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(ClampToInt(config.max_body_bytes));
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, ClampToInt(config.max_header_bytes));
  // A second server on the same port would silently take half of the connections.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // A client whose machine vanished answers no ping: its calls end within this, not when the deadline passes.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10000);
  // As many calls at once as HTTP has connections, on each of its connections; idle ones are closed, as
  // HTTP's are. All messages that are not whole yet share the quota: a client that stops in the middle of
  // each holds no more than that.
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, config.max_connections);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, ClampToInt(config.idle_timeout_ms));
  // Busy ones are asked to connect anew now and then, and find servers that were added since; their calls
  // end in peace.
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, kConnectionAgeMs);
  // Reflection is the one service of gRPC's own that is served by threads; a few are enough for it.
  builder->SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
  builder->SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
  builder->SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 2);
  grpc::ResourceQuota quota("atp");
  quota.SetMaxThreads(16);
  quota.Resize(kQuotaBytes + 16 * static_cast<size_t>(std::max<int64_t>(0, config.max_body_bytes)));
  builder->SetResourceQuota(quota);
}

std::string AddressOf(const ServerConfig& config) {
  const bool is_ipv6 = config.host.find(':') != std::string::npos;
  return absl::StrCat(is_ipv6 ? absl::StrCat("[", config.host, "]") : config.host, ":", config.grpc_port);
}

absl::Status CannotListen(const ServerConfig& config) {
  return absl::UnavailableError(absl::StrCat(
      "cannot listen for gRPC on ", AddressOf(config),
      ": the port is in use or the address is not of this machine; choose another with --grpc-port "
      "(server.grpc_port) or server.host"));
}

absl::Status GrpcServerImpl::Listen(const ServerConfig& config) {
  gpr_set_log_function(&LogGrpcLine);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  SetLimits(config, &builder);
  builder.AddListeningPort(AddressOf(config), grpc::InsecureServerCredentials(), &port_);
  builder.RegisterService(&inference_);
  server_ = builder.BuildAndStart();
  return server_ == nullptr || port_ == 0 ? CannotListen(config) : absl::OkStatus();
}

}  // namespace

absl::Status GrpcServer::CheckPort(const ServerConfig& config) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* addresses = nullptr;
  if (getaddrinfo(config.host.c_str(), std::to_string(config.grpc_port).c_str(), &hints, &addresses) != 0)
    return CannotListen(config);
  bool free = false;
  for (const addrinfo* a = addresses; a != nullptr && !free; a = a->ai_next) {
    const int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
    if (fd < 0) continue;
    const int reuse = 1;  // as the server has it: connections of the one before do not hold the port
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof(reuse));
    free = bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, 1) == 0;
    close(fd);
  }
  freeaddrinfo(addresses);
  return free ? absl::OkStatus() : CannotListen(config);
}

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Start(const Config& config, GenerateService* service,
                                                              Metrics* metrics) {
  auto server = std::make_unique<GrpcServerImpl>(service, metrics);
  if (absl::Status s = server->Listen(config.server); !s.ok()) return s;
  server->SetServing(service->ready());
  return server;
}

}  // namespace atp
