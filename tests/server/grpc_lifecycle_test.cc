// How calls end: cancelled, too late, cut off, drained, stopped; and five hundred at a time.
#include <gmock/gmock.h>

#include <filesystem>
#include <latch>
#include <vector>

#include "tests/server/grpc_fixture.h"

namespace atp {
namespace {

using testing::FakeEngine;
using ::testing::HasSubstr;

class GrpcLifecycleTest : public GrpcServerTest {};

TEST_F(GrpcLifecycleTest, CancelInMidStreamFreesTheRequest) {
  Start();
  StreamClient stream(stub_.get(), Endless());
  stream.AwaitFirst();
  stream.Cancel();
  stream.AwaitDone();
  EXPECT_EQ(stream.status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(engine_->AwaitLive(0));
  EXPECT_GE(engine_->cancels(), 1);
}

TEST_F(GrpcLifecycleTest, CancelOfAUnaryCallFreesTheRequest) {
  Start(Held());
  grpc::ClientContext context;
  std::latch done{1};
  const v1::GenerateRequest request = Endless();
  grpc::Status status;
  stub_->async()->Generate(&context, &request, &response_, [&](grpc::Status s) {
    status = std::move(s);
    done.count_down();
  });
  ASSERT_TRUE(engine_->AwaitLive(1));
  context.TryCancel();
  done.wait();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(engine_->AwaitLive(0));
}

TEST_F(GrpcLifecycleTest, TheClientsDeadlineEndsCallAndRequest) {
  Start(Held());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(150));
  EXPECT_EQ(stub_->Generate(&context, Endless(), &response_).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_LT(engine_->last_request().deadline, absl::Now() + absl::Minutes(1));
  EXPECT_TRUE(engine_->AwaitLive(0));
}

TEST_F(GrpcLifecycleTest, TheDefaultDeadlineIsReportedAsSuch) {
  config_.scheduler.default_timeout_ms = 100;
  Start(Held());
  EXPECT_EQ(Generate(Endless()).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  StreamClient stream(stub_.get(), Endless());
  stream.AwaitDone();
  EXPECT_EQ(stream.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(GrpcLifecycleTest, DrainEndsWhatIsLeftAsUnavailable) {
  Start(Held());
  StreamClient stream(stub_.get(), Endless());
  ASSERT_TRUE(engine_->AwaitLive(1));
  EXPECT_FALSE(engine_->Drain(absl::ZeroDuration()).ok());
  stream.AwaitDone();
  EXPECT_EQ(stream.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Generate(Prompt(1)).error_code(), grpc::StatusCode::UNAVAILABLE);
}

int ThreadsOfThisProcess() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) ++count;
  return count;
}

TEST_F(GrpcLifecycleTest, FiveHundredStreamsNeedNoThreadEach) {
  constexpr int kStreams = 500;
  Start(Held());
  ASSERT_EQ(Generate(v1::GenerateRequest()).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);  // both sides are up
  const int threads_before = ThreadsOfThisProcess();
  std::vector<std::unique_ptr<StreamClient>> streams;
  for (int i = 0; i < kStreams; ++i) {
    streams.push_back(std::make_unique<StreamClient>(stub_.get(), Prompt(30)));
  }
  ASSERT_TRUE(engine_->AwaitLive(kStreams));
  EXPECT_LT(ThreadsOfThisProcess() - threads_before, 40);
  engine_->Release();
  for (const auto& stream : streams) {
    stream->AwaitDone();
    EXPECT_TRUE(stream->status.ok()) << stream->status.error_message();
    EXPECT_EQ(stream->text, "abcdefghijklmnopqrstuvwxyzabcd");
    EXPECT_EQ(stream->finished, 1);
  }
  EXPECT_TRUE(engine_->AwaitLive(0));
}

TEST_F(GrpcLifecycleTest, CancelsAndFinishesMayMeet) {
  Start();
  for (int round = 0; round < 200; ++round) {
    StreamClient stream(stub_.get(), Prompt(1 + round % 3));
    if (round % 2 == 0) stream.AwaitFirst();
    stream.Cancel();
    stream.AwaitDone();
  }
  EXPECT_TRUE(engine_->AwaitLive(0));
}

TEST_F(GrpcLifecycleTest, AClientThatDoesNotReadIsCutOff) {
  FakeEngine::Options options;
  options.token_text = std::string(100000, 'x');
  Start(options);
  StreamClient stream(stub_.get(), Endless(), /*reads=*/false);
  ASSERT_TRUE(engine_->AwaitLive(1));
  EXPECT_TRUE(engine_->AwaitLive(0));  // although nobody cancelled
  stream.Cancel();
  stream.AwaitDone();
}

TEST_F(GrpcLifecycleTest, AnEchoedPromptIsNoSignOfASlowClient) {
  FakeEngine::Options options;
  options.scores_prompts = true;
  Start(options);
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  const auto stub = v1::Inference::NewStub(grpc::CreateCustomChannel(
      "127.0.0.1:" + std::to_string(server_->port()), grpc::InsecureChannelCredentials(), arguments));
  v1::GenerateRequest request = Prompt(3, std::string(600000, 'x'));  // its log probabilities are over 6 MB
  request.mutable_sampling()->set_echo(true);
  request.mutable_sampling()->set_logprobs(0);
  StreamClient stream(stub.get(), request);
  stream.AwaitDone();
  EXPECT_TRUE(stream.status.ok()) << stream.status.error_message();
  EXPECT_EQ(stream.text, "(prompt)abc");
}

TEST_F(GrpcLifecycleTest, AClientThatDoesNotReadTheEndIsCutOffAfterTheWriteTimeout) {
  config_.server.write_timeout_ms = 200;
  FakeEngine::Options options;
  options.token_text = std::string(100000, 'x');
  Start(options);
  grpc::ChannelArguments arguments;  // a small, fixed window: the answer cannot hide in the client's buffers
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 65536);
  const auto stub = v1::Inference::NewStub(grpc::CreateCustomChannel(
      "127.0.0.1:" + std::to_string(server_->port()), grpc::InsecureChannelCredentials(), arguments));
  StreamClient stream(stub.get(), Prompt(20), /*reads=*/false);
  ASSERT_TRUE(engine_->AwaitLive(1));
  ASSERT_TRUE(engine_->AwaitLive(0));
  server_->Stop(absl::Hours(1));  // returns only because the call ends by itself
  stream.Cancel();
  stream.AwaitDone();
}

TEST_F(GrpcLifecycleTest, StopLetsRunningCallsFinish) {
  Start(Held());
  StreamClient stream(stub_.get(), Prompt(10));
  ASSERT_TRUE(engine_->AwaitLive(1));
  engine_->Release();
  server_->Stop(absl::Minutes(5));
  stream.AwaitDone();
  EXPECT_TRUE(stream.status.ok()) << stream.status.error_message();
  EXPECT_EQ(stream.text, "abcdefghij");
  EXPECT_FALSE(Generate(Prompt(1)).ok());
}

TEST_F(GrpcLifecycleTest, StopCancelsWhatOutlivesTheGrace) {
  Start(Held());
  StreamClient stream(stub_.get(), Endless());
  ASSERT_TRUE(engine_->AwaitLive(1));
  server_->Stop(absl::Milliseconds(50));
  stream.AwaitDone();
  EXPECT_FALSE(stream.status.ok());
  EXPECT_TRUE(engine_->AwaitLive(0));
  server_->Stop(absl::ZeroDuration());  // a second time is fine
}

TEST_F(GrpcLifecycleTest, ADrainSendsClientsElsewhereWhileRunningCallsGoOn) {
  Start(Held());
  StreamClient stream(stub_.get(), Prompt(10));
  ASSERT_TRUE(engine_->AwaitLive(1));
  server_->StartDrain();
  // The service would still answer: what fails is the connection, on which a client looks for another server.
  grpc::Status status;
  do {
    grpc::ClientContext context;
    v1::TokenizeRequest request;
    v1::TokenizeResponse response;
    request.set_text("hi");
    status = stub_->Tokenize(&context, request, &response);
    // (CANCELLED: it was on its way when the client was told.)
  } while (status.ok() || status.error_code() == grpc::StatusCode::CANCELLED);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_NE(channel_->GetState(false), GRPC_CHANNEL_READY);
  engine_->Release();
  stream.AwaitDone();
  EXPECT_TRUE(stream.status.ok()) << stream.status.error_message();
  EXPECT_EQ(stream.text, "abcdefghij");
  server_->Stop(absl::Minutes(5));
}

TEST_F(GrpcLifecycleTest, ATakenPortIsAClearError) {
  Start();
  Config second = config_;
  second.server.grpc_port = server_->port();
  const absl::Status status = GrpcServer::Start(second, service_.get(), &metrics_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("127.0.0.1:" + std::to_string(server_->port())));
  EXPECT_THAT(std::string(status.message()), HasSubstr("--grpc-port"));
}

}  // namespace
}  // namespace atp
