// The C++ client against a real server with a fake engine behind it. No gRPC header is included here: none is
// needed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "client/cpp/client.h"
#include "server/grpc_server.h"
#include "tests/server/byte_tokenizer.h"
#include "tests/server/fake_engine.h"

namespace atp {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class CppClientTest : public ::testing::Test {
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
    auto server = GrpcServer::Start(config_, service_.get(), &metrics_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    client::ClientOptions client_options;
    client_options.address = "127.0.0.1:" + std::to_string(server_->port());
    client_options.api_key = api_key_;
    client_ = std::make_unique<client::Client>(client_options);
  }
  static client::Request Prompt(int max_tokens) {
    client::Request request = client::Request::Prompt("hi");
    request.max_tokens = max_tokens;
    return request;
  }

  Config config_;
  std::string api_key_;
  testing::ByteTokenizer tokenizer_;
  Metrics metrics_;
  std::unique_ptr<testing::FakeEngine> engine_;
  std::unique_ptr<GenerateService> service_;
  std::unique_ptr<GrpcServer> server_;
  std::unique_ptr<client::Client> client_;
};

TEST_F(CppClientTest, Generates) {
  Start();
  client::Request request = Prompt(4);
  request.n = 2;
  request.seed = 5;
  request.logprobs = 1;
  request.stop = {"zz"};
  request.logit_bias = {{3, 0.5f}};
  request.request_id = "from-the-sdk";
  const absl::StatusOr<client::Generation> answer = client_->Generate(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->request_id, "from-the-sdk");
  EXPECT_EQ(answer->model, "tiny");
  ASSERT_EQ(answer->choices.size(), 2u);
  EXPECT_EQ(answer->choices[1].text, "abcd");
  EXPECT_EQ(answer->choices[1].finish_reason, client::FinishReason::kLength);
  ASSERT_EQ(answer->choices[1].logprobs.size(), 4u);
  EXPECT_EQ(answer->choices[1].logprobs[3].text, "d");
  EXPECT_EQ(answer->usage.completion_tokens, 8);
  ASSERT_TRUE(answer->usage.atp.has_value());
  EXPECT_EQ(answer->usage.atp->preset, "balanced");
  EXPECT_EQ(answer->usage.atp->bits, 4);
  EXPECT_EQ(answer->usage.atp->compressed_tokens, 2 * 64);
  EXPECT_EQ(answer->usage.atp->exact_kv_bytes, 2 * 9000);
  EXPECT_EQ(engine_->last_request().sampling.seed, 5u);
  EXPECT_THAT(engine_->last_request().sampling.stop, ElementsAre("zz"));
}

TEST_F(CppClientTest, ChoosesItsCompression) {
  Start();
  client::Request request = Prompt(1);
  ASSERT_TRUE(client_->Generate(request).ok());
  EXPECT_FALSE(engine_->last_request().compression.has_value());
  request.atp = client::Compression{"", 0.25, 4};
  ASSERT_TRUE(client_->Generate(request).ok());
  EXPECT_EQ(engine_->last_request().compression.value().ratio, 0.25);
  EXPECT_EQ(engine_->last_request().compression.value().bits, 4);
  request.atp = client::Compression{"compact"};
  ASSERT_TRUE(client_->Generate(request).ok());
  EXPECT_EQ(engine_->last_request().compression.value().preset, "compact");
  EXPECT_FALSE(engine_->last_request().compression.value().ratio.has_value());
  request.atp = client::Compression();
  EXPECT_THAT(std::string(client_->Generate(request).status().message()), HasSubstr("atp.ratio"));
}

TEST_F(CppClientTest, StreamsChat) {
  Start();
  client::Request request = client::Request::Chat({{"user", "hello"}});
  request.max_tokens = 30;
  std::string text;
  const absl::StatusOr<client::Usage> usage =
      client_->GenerateStream(request, [&](const client::Chunk& chunk) {
        text += chunk.text;
        return true;
      });
  ASSERT_TRUE(usage.ok()) << usage.status();
  EXPECT_EQ(text, "abcdefghijklmnopqrstuvwxyzabcd");
  EXPECT_EQ(usage->completion_tokens, 30);
  ASSERT_TRUE(usage->atp.has_value());
  EXPECT_EQ(usage->atp->kv_bytes, 5000);
  EXPECT_EQ(engine_->last_request().prompt, *service_->TokenizeChat({{"user", "hello", ""}}));
}

TEST_F(CppClientTest, TheCallbackEndsTheStream) {
  Start();
  int chunks = 0;
  const auto usage =
      client_->GenerateStream(Prompt(1 << 20), [&](const client::Chunk&) { return ++chunks < 3; });
  EXPECT_EQ(usage.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(chunks, 3);
  EXPECT_TRUE(engine_->AwaitLive(0));
}

TEST_F(CppClientTest, AnotherThreadEndsACall) {
  testing::FakeEngine::Options options;
  options.hold = true;
  Start(options);
  client::Cancellation cancellation;
  std::thread other([&] {
    engine_->AwaitLive(1);
    cancellation.Cancel();
  });
  EXPECT_EQ(client_->Generate(Prompt(5), &cancellation).status().code(), absl::StatusCode::kCancelled);
  other.join();
  EXPECT_TRUE(engine_->AwaitLive(0));
  // Cancelled before it began is cancelled too.
  EXPECT_EQ(client_->Generate(Prompt(5), &cancellation).status().code(), absl::StatusCode::kCancelled);
}

TEST_F(CppClientTest, ErrorsKeepCodeMessageAndRetryHint) {
  testing::FakeEngine::Options options;
  options.max_requests = 0;
  Start(options);
  const absl::Status full = client_->Generate(Prompt(1)).status();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(client::RetryAfter(full), absl::Milliseconds(1500));
  client::Request hot = Prompt(1);
  hot.temperature = -1;
  const absl::Status invalid = client_->Generate(hot).status();
  EXPECT_EQ(invalid.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(invalid.message()), HasSubstr("temperature"));
  EXPECT_EQ(client::RetryAfter(invalid), std::nullopt);
}

TEST_F(CppClientTest, TimeoutsAreDeadlines) {
  testing::FakeEngine::Options options;
  options.hold = true;
  Start(options);
  client::Request request = Prompt(1);
  request.timeout = absl::Milliseconds(100);
  EXPECT_EQ(client_->Generate(request).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(engine_->AwaitLive(0));
}

TEST_F(CppClientTest, TheClientsOwnTimeoutIsForCallsThatBringNone) {
  testing::FakeEngine::Options options;
  options.hold = true;
  Start(options);
  client::ClientOptions client_options;
  client_options.address = "127.0.0.1:" + std::to_string(server_->port());
  client_options.timeout = absl::Milliseconds(100);
  EXPECT_EQ(client::Client(client_options).Generate(Prompt(1)).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(engine_->AwaitLive(0));
}

TEST_F(CppClientTest, TlsSpeaksToNoPlainServer) {
  Start();
  client::ClientOptions options;
  options.address = "127.0.0.1:" + std::to_string(server_->port());
  options.tls = true;
  EXPECT_EQ(client::Client(options).Info().status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(CppClientTest, SmallCallsAndApiKey) {
  config_.server.api_keys = {"secret"};
  api_key_ = "secret";
  Start();
  EXPECT_THAT(*client_->Tokenize("ab"), ElementsAre(256, 'a', 'b'));
  EXPECT_THAT(*client_->Tokenize("ab", false), ElementsAre('a', 'b'));
  EXPECT_EQ(*client_->Detokenize({'o', 'k'}), "ok");
  EXPECT_EQ(client_->ListModels()->at(0).id, "tiny");
  EXPECT_EQ(client_->Info()->device, "fake");
  client::ClientOptions without_key;
  without_key.address = "127.0.0.1:" + std::to_string(server_->port());
  EXPECT_EQ(client::Client(without_key).Info().status().code(), absl::StatusCode::kUnauthenticated);
}

}  // namespace
}  // namespace atp
