// A real gRPC server on a free port, with a fake engine behind it, and clients for it.
#ifndef ATP_TESTS_SERVER_GRPC_FIXTURE_H_
#define ATP_TESTS_SERVER_GRPC_FIXTURE_H_

#include <grpcpp/create_channel.h>
#include <grpcpp/support/client_callback.h>
#include <gtest/gtest.h>

#include <latch>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "atp/v1/inference.grpc.pb.h"
#include "server/grpc_server.h"
#include "tests/server/byte_tokenizer.h"
#include "tests/server/fake_engine.h"

namespace atp {

class GrpcServerTest : public ::testing::Test {
 protected:
  void Start(testing::FakeEngine::Options options = {}) {
    engine_ = std::make_unique<testing::FakeEngine>(std::move(options));
    ServedModel model;
    model.id = "tiny";
    model.max_context_tokens = 4000000;
    model.vocab_size = testing::ByteTokenizer::kVocabSize;
    model.device = "fake";
    config_.server.grpc_port = 0;
    service_ = std::make_unique<GenerateService>(engine_.get(), &tokenizer_, *ChatTemplate::Create("plain"),
                                                 model, config_);
    service_->SetReady(true);
    absl::StatusOr<std::unique_ptr<GrpcServer>> server =
        GrpcServer::Start(config_, service_.get(), &metrics_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_GT(server_->port(), 0);
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->port()),
                                   grpc::InsecureChannelCredentials());
    stub_ = v1::Inference::NewStub(channel_);
  }
  static testing::FakeEngine::Options Held() {
    testing::FakeEngine::Options options;
    options.hold = true;
    return options;
  }
  static v1::GenerateRequest Prompt(int max_tokens, const std::string& text = "hi") {
    v1::GenerateRequest request;
    request.set_prompt(text);
    request.mutable_sampling()->set_max_tokens(max_tokens);
    return request;
  }
  static v1::GenerateRequest Endless() { return Prompt(1 << 20); }
  static std::string Value(const std::multimap<grpc::string_ref, grpc::string_ref>& metadata,
                           const char* key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? "(none)" : std::string(found->second.data(), found->second.size());
  }
  grpc::Status Generate(const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    return stub_->Generate(&context, request, &response_);
  }

  Config config_;
  testing::ByteTokenizer tokenizer_;
  Metrics metrics_;
  std::unique_ptr<testing::FakeEngine> engine_;
  std::unique_ptr<GenerateService> service_;
  std::unique_ptr<GrpcServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Inference::Stub> stub_;
  v1::GenerateResponse response_;
};

// A streaming call that runs on gRPC's threads: hundreds of them need no thread in the test either.
class StreamClient final : public grpc::ClientReadReactor<v1::GenerateStreamResponse> {
 public:
  StreamClient(v1::Inference::Stub* stub, v1::GenerateRequest request, bool reads = true)
      : request_(std::move(request)) {
    stub->async()->GenerateStream(&context_, &request_, this);
    if (reads) StartRead(&message_);
    StartCall();
  }
  void OnReadDone(bool ok) override {
    if (!ok) return;
    text += message_.choice().text();
    if (message_.choice().finish_reason() != v1::FINISH_REASON_UNSPECIFIED) ++finished;
    if (!first_.try_wait()) first_.count_down();
    StartRead(&message_);
  }
  void OnDone(const grpc::Status& s) override {
    status = s;
    done_.count_down();  // this may be gone from here on
  }
  void AwaitFirst() { first_.wait(); }
  void AwaitDone() { done_.wait(); }
  void Cancel() { context_.TryCancel(); }

  std::string text;
  int finished = 0;
  grpc::Status status;

 private:
  grpc::ClientContext context_;
  v1::GenerateRequest request_;
  v1::GenerateStreamResponse message_;
  std::latch first_{1}, done_{1};  // std: ThreadSanitizer cannot see into absl's
};

}  // namespace atp

#endif  // ATP_TESTS_SERVER_GRPC_FIXTURE_H_
