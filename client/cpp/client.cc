#include "client/cpp/client.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include <memory>
#include <mutex>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "atp/v1/inference.grpc.pb.h"

namespace atp::client {
namespace {

constexpr char kRetryAfterPayload[] = "atp.v1/retry-after-ms";

void FillInput(const Request& in, v1::GenerateRequest* out) {
  if (const auto* text = std::get_if<std::string>(&in.input)) {
    out->set_prompt(*text);
  } else if (const auto* ids = std::get_if<std::vector<int32_t>>(&in.input)) {
    out->mutable_prompt_tokens()->mutable_ids()->Add(ids->begin(), ids->end());
  } else {
    v1::Chat* chat = out->mutable_chat();
    for (const Message& message : std::get<std::vector<Message>>(in.input)) {
      v1::ChatMessage* added = chat->add_messages();
      added->set_role(message.role);
      added->set_content(message.content);
    }
  }
}

v1::GenerateRequest ToProto(const Request& in) {
  v1::GenerateRequest out;
  out.set_model(in.model);
  out.set_priority(in.priority);
  FillInput(in, &out);
  v1::SamplingParams* sampling = out.mutable_sampling();
  if (in.temperature) sampling->set_temperature(*in.temperature);
  if (in.top_k) sampling->set_top_k(*in.top_k);
  if (in.top_p) sampling->set_top_p(*in.top_p);
  if (in.min_p) sampling->set_min_p(*in.min_p);
  if (in.repetition_penalty) sampling->set_repetition_penalty(*in.repetition_penalty);
  if (in.presence_penalty) sampling->set_presence_penalty(*in.presence_penalty);
  if (in.frequency_penalty) sampling->set_frequency_penalty(*in.frequency_penalty);
  sampling->mutable_logit_bias()->insert(in.logit_bias.begin(), in.logit_bias.end());
  if (in.seed) sampling->set_seed(*in.seed);
  for (const std::string& stop : in.stop) sampling->add_stop(stop);
  sampling->set_include_stop_in_output(in.include_stop_in_output);
  sampling->mutable_stop_token_ids()->Add(in.stop_token_ids.begin(), in.stop_token_ids.end());
  if (in.max_tokens) sampling->set_max_tokens(*in.max_tokens);
  sampling->set_min_tokens(in.min_tokens);
  sampling->set_ignore_eos(in.ignore_eos);
  if (in.n) sampling->set_n(*in.n);
  if (in.logprobs) sampling->set_logprobs(*in.logprobs);
  sampling->set_echo(in.echo);
  if (in.atp) {
    v1::Compression* atp = out.mutable_atp();
    if (in.atp->preset.empty()) {
      atp->set_ratio(in.atp->ratio);
    } else {
      atp->set_preset(in.atp->preset);
    }
    if (in.atp->bits) atp->set_bits(*in.atp->bits);
  }
  return out;
}

Chunk FromProto(const v1::Choice& in) {
  Chunk out;
  out.index = in.index();
  out.text = in.text();
  out.tokens.assign(in.tokens().begin(), in.tokens().end());
  for (const v1::TokenLogprob& logprob : in.logprobs()) {
    Logprob added{logprob.token(), logprob.logprob(), logprob.text(), {}};
    for (const v1::TopLogprob& top : logprob.top())
      added.top.push_back({top.token(), top.logprob(), top.text()});
    out.logprobs.push_back(std::move(added));
  }
  if (in.finish_reason() == v1::FINISH_REASON_STOP) out.finish_reason = FinishReason::kStop;
  if (in.finish_reason() == v1::FINISH_REASON_LENGTH) out.finish_reason = FinishReason::kLength;
  out.matched_stop = in.matched_stop();
  return out;
}

Usage FromProto(const v1::Usage& in) {
  Usage out{in.prompt_tokens(), in.completion_tokens(), in.cached_tokens(), std::nullopt};
  if (!in.has_atp()) return out;
  const v1::CompressionUsage& atp = in.atp();
  out.atp = CompressionUsage{
      atp.preset(),  atp.ratio(),    atp.bits(),          atp.tokens(), atp.compressed_tokens(),
      atp.entries(), atp.kv_bytes(), atp.exact_kv_bytes()};
  return out;
}

absl::Status FromGrpc(const grpc::Status& status, const grpc::ClientContext& context) {
  if (status.ok()) return absl::OkStatus();
  absl::Status out(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  const auto& trailers = context.GetServerTrailingMetadata();
  if (const auto found = trailers.find("retry-after-ms"); found != trailers.end()) {
    out.SetPayload(kRetryAfterPayload,
                   absl::Cord(absl::string_view(found->second.data(), found->second.size())));
  }
  return out;
}

}  // namespace

struct Cancellation::State {
  std::mutex mutex;  // guards all below
  bool cancelled = false;
  grpc::ClientContext* context = nullptr;

  void Attach(grpc::ClientContext* call) {
    std::lock_guard<std::mutex> lock(mutex);
    context = call;
    if (cancelled && call != nullptr) call->TryCancel();
  }
};

Cancellation::Cancellation() : state_(std::make_unique<State>()) {}
Cancellation::~Cancellation() = default;

void Cancellation::Cancel() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->cancelled = true;
  if (state_->context != nullptr) state_->context->TryCancel();
}

struct Client::Impl {
  std::string api_key;
  absl::Duration timeout;
  std::unique_ptr<v1::Inference::Stub> stub;

  // The context of one call, known to its Cancellation for exactly as long as it lives.
  class Call {
   public:
    Call(const Impl& impl, Cancellation* cancellation) : cancellation_(cancellation) {
      SetTimeout(impl.timeout);
      if (!impl.api_key.empty()) context_.AddMetadata("authorization", absl::StrCat("Bearer ", impl.api_key));
      if (cancellation_ != nullptr) cancellation_->state_->Attach(&context_);
    }
    ~Call() {
      if (cancellation_ != nullptr) cancellation_->state_->Attach(nullptr);
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    void Describe(const Request& request) {
      if (!request.request_id.empty()) context_.AddMetadata("x-request-id", request.request_id);
      if (request.timeout) SetTimeout(*request.timeout);
    }
    grpc::ClientContext* context() { return &context_; }

   private:
    void SetTimeout(absl::Duration timeout) {
      if (timeout < absl::InfiniteDuration())
        context_.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    }

    grpc::ClientContext context_;
    Cancellation* cancellation_;
  };
};

Client::Client(const ClientOptions& options) : impl_(std::make_unique<Impl>()) {
  impl_->api_key = options.api_key;
  impl_->timeout = options.timeout;
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  if (!options.load_balancing.empty()) arguments.SetLoadBalancingPolicyName(options.load_balancing);
  arguments.SetMaxReceiveMessageSize(
      -1);  // a long answer with log probabilities passes gRPC's default of 4 MiB
  const auto credentials = options.tls ? grpc::SslCredentials({options.root_certificates, "", ""})
                                       : grpc::InsecureChannelCredentials();
  impl_->stub = v1::Inference::NewStub(grpc::CreateCustomChannel(options.address, credentials, arguments));
}
Client::~Client() = default;

absl::StatusOr<Generation> Client::Generate(const Request& request, Cancellation* cancellation) {
  Impl::Call call(*impl_, cancellation);
  call.Describe(request);
  v1::GenerateResponse response;
  const grpc::Status status = impl_->stub->Generate(call.context(), ToProto(request), &response);
  if (!status.ok()) return FromGrpc(status, *call.context());
  Generation out{response.request_id(), response.model(), {}, FromProto(response.usage())};
  for (const v1::Choice& choice : response.choices()) out.choices.push_back(FromProto(choice));
  return out;
}

absl::StatusOr<Usage> Client::GenerateStream(const Request& request,
                                             const std::function<bool(const Chunk&)>& on_chunk,
                                             Cancellation* cancellation) {
  Impl::Call call(*impl_, cancellation);
  call.Describe(request);
  const auto reader = impl_->stub->GenerateStream(call.context(), ToProto(request));
  v1::GenerateStreamResponse response;
  Usage usage;
  bool go_on = true;
  while (reader->Read(&response)) {
    if (!go_on) continue;  // drains what was under way when the call was cancelled
    if (response.has_usage()) usage = FromProto(response.usage());
    go_on = on_chunk(FromProto(response.choice()));
    if (!go_on) call.context()->TryCancel();
  }
  const grpc::Status status = reader->Finish();
  if (!go_on) return absl::CancelledError("the caller ended the stream");
  if (!status.ok()) return FromGrpc(status, *call.context());
  return usage;
}

absl::StatusOr<std::vector<int32_t>> Client::Tokenize(const std::string& text, bool add_special_tokens) {
  Impl::Call call(*impl_, nullptr);
  v1::TokenizeRequest request;
  request.set_text(text);
  request.set_add_special_tokens(add_special_tokens);
  v1::TokenizeResponse response;
  const grpc::Status status = impl_->stub->Tokenize(call.context(), request, &response);
  if (!status.ok()) return FromGrpc(status, *call.context());
  return std::vector<int32_t>(response.tokens().begin(), response.tokens().end());
}

absl::StatusOr<std::string> Client::Detokenize(const std::vector<int32_t>& tokens) {
  Impl::Call call(*impl_, nullptr);
  v1::DetokenizeRequest request;
  request.mutable_tokens()->Add(tokens.begin(), tokens.end());
  v1::DetokenizeResponse response;
  const grpc::Status status = impl_->stub->Detokenize(call.context(), request, &response);
  if (!status.ok()) return FromGrpc(status, *call.context());
  return response.text();
}

absl::StatusOr<std::vector<Model>> Client::ListModels() {
  Impl::Call call(*impl_, nullptr);
  v1::ListModelsResponse response;
  const grpc::Status status = impl_->stub->ListModels(call.context(), {}, &response);
  if (!status.ok()) return FromGrpc(status, *call.context());
  std::vector<Model> out;
  for (const v1::ModelInfo& model : response.models()) {
    out.push_back({model.id(), model.max_context_tokens(), model.vocab_size()});
  }
  return out;
}

absl::StatusOr<ServerInfo> Client::Info() {
  Impl::Call call(*impl_, nullptr);
  v1::GetServerInfoResponse response;
  const grpc::Status status = impl_->stub->GetServerInfo(call.context(), {}, &response);
  if (!status.ok()) return FromGrpc(status, *call.context());
  return ServerInfo{response.version(),          response.device(),           response.ready(),
                    response.requests_running(), response.requests_waiting(), response.kv_blocks_total(),
                    response.kv_blocks_used(),   response.kv_blocks_cached()};
}

std::optional<absl::Duration> RetryAfter(const absl::Status& status) {
  const auto payload = status.GetPayload(kRetryAfterPayload);
  int64_t wait_ms = 0;
  if (!payload || !absl::SimpleAtoi(std::string(*payload), &wait_ms)) return std::nullopt;
  return absl::Milliseconds(wait_ms);
}

}  // namespace atp::client
