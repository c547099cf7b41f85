// What each method answers. Cancellation, deadlines, many streams and shutdown are in grpc_lifecycle_test.cc.
#include "server/grpc_server.h"

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/byte_buffer.h>

#include <latch>

#include "tests/server/grpc_fixture.h"

namespace atp {
namespace {

using testing::ByteTokenizer;
using testing::FakeEngine;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string ToString(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string out;
  for (const grpc::Slice& slice : slices)
    out.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return out;
}

// A call that carries no protobuf type of ours.
grpc::Status CallBytes(const std::shared_ptr<grpc::Channel>& channel, const char* method,
                       const std::string& request, std::string* response) {
  grpc::ClientContext context;
  grpc::Slice slice(request);
  grpc::ByteBuffer in(&slice, 1);
  grpc::ByteBuffer out;
  grpc::Status status;
  std::latch done{1};
  grpc::GenericStub(channel).UnaryCall(&context, method, grpc::StubOptions(), &in, &out, [&](grpc::Status s) {
    status = std::move(s);
    done.count_down();
  });
  done.wait();
  if (status.ok()) *response = ToString(out);
  return status;
}

TEST_F(GrpcServerTest, UnaryAnswersWithTextUsageAndRequestId) {
  Start();
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "my-id-1");
  const grpc::Status status = stub_->Generate(&context, Prompt(5), &response_);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(Value(context.GetServerInitialMetadata(), "x-request-id"), "my-id-1");
  EXPECT_EQ(response_.request_id(), "my-id-1");
  EXPECT_EQ(engine_->last_request().external_id, "my-id-1");
  EXPECT_EQ(response_.model(), "tiny");
  ASSERT_EQ(response_.choices_size(), 1);
  EXPECT_EQ(response_.choices(0).text(), "abcde");
  EXPECT_EQ(response_.choices(0).tokens_size(), 5);
  EXPECT_EQ(response_.choices(0).finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(response_.usage().prompt_tokens(), 3);  // BOS and two letters
  EXPECT_EQ(response_.usage().completion_tokens(), 5);
  EXPECT_EQ(response_.usage().cached_tokens(), 2);
  EXPECT_EQ(response_.usage().atp().preset(), "balanced");
  EXPECT_EQ(response_.usage().atp().ratio(), 0.5);
  EXPECT_EQ(response_.usage().atp().bits(), 4);
  EXPECT_EQ(response_.usage().atp().tokens(), 100);
  EXPECT_EQ(response_.usage().atp().compressed_tokens(), 64);
  EXPECT_EQ(response_.usage().atp().entries(), 68);
  EXPECT_THAT(
      metrics_.Render(),
      HasSubstr(
          "atp_responses_total{code=\"OK\",route=\"/atp.v1.Inference/Generate\",transport=\"grpc\"} 1"));
}

TEST_F(GrpcServerTest, Compression) {
  Start();
  ASSERT_TRUE(Generate(Prompt(1)).ok());
  EXPECT_FALSE(engine_->last_request().compression.has_value());
  v1::GenerateRequest request = Prompt(1);
  request.mutable_atp()->set_ratio(0.25);
  request.mutable_atp()->set_bits(4);
  ASSERT_TRUE(Generate(request).ok());
  EXPECT_EQ(engine_->last_request().compression.value().ratio, 0.25);
  EXPECT_EQ(engine_->last_request().compression.value().bits, 4);
  request.mutable_atp()->set_ratio(0);  // given, and wrong
  grpc::Status status = Generate(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), StartsWith("atp.ratio: "));
  request.mutable_atp()->clear_bits();
  request.mutable_atp()->set_preset("compact");
  ASSERT_TRUE(Generate(request).ok());
  EXPECT_EQ(engine_->last_request().compression.value().preset, "compact");
  request.mutable_atp()->Clear();
  EXPECT_THAT(Generate(request).error_message(), StartsWith("atp: must have a preset or a ratio"));
}

TEST_F(GrpcServerTest, ABadRequestIdIsReplaced) {
  Start();
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", std::string(200, 'x'));
  ASSERT_TRUE(stub_->Generate(&context, Prompt(1), &response_).ok());
  EXPECT_THAT(Value(context.GetServerInitialMetadata(), "x-request-id"), StartsWith("atp-"));
}

TEST_F(GrpcServerTest, UnaryGathersAllChoices) {
  Start();
  v1::GenerateRequest request = Prompt(4);
  request.mutable_sampling()->set_n(3);
  ASSERT_TRUE(Generate(request).ok());
  ASSERT_EQ(response_.choices_size(), 3);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(response_.choices(i).index(), i);
    EXPECT_EQ(response_.choices(i).text(), "abcd");
  }
  EXPECT_EQ(response_.usage().prompt_tokens(), 3);
  EXPECT_EQ(response_.usage().completion_tokens(), 12);
  EXPECT_EQ(response_.usage().cached_tokens(), 2);
}

TEST_F(GrpcServerTest, EverySamplingFieldReachesTheEngine) {
  Start();
  v1::GenerateRequest request = Prompt(6);
  request.set_priority(3);
  v1::SamplingParams* s = request.mutable_sampling();
  s->set_temperature(0.5f);
  s->set_top_k(7);
  s->set_top_p(0.9f);
  s->set_min_p(0.1f);
  s->set_repetition_penalty(1.1f);
  s->set_presence_penalty(0.2f);
  s->set_frequency_penalty(0.3f);
  (*s->mutable_logit_bias())[5] = -1.5f;
  s->set_seed(99);
  s->add_stop("END");
  s->set_include_stop_in_output(true);
  s->add_stop_token_ids(10);
  s->set_min_tokens(2);
  s->set_ignore_eos(true);
  s->set_logprobs(2);
  s->set_echo(true);
  ASSERT_TRUE(Generate(request).ok());
  const Request got = engine_->last_request();
  EXPECT_EQ(got.priority, 3);
  EXPECT_TRUE(got.echo_prompt);
  EXPECT_FLOAT_EQ(got.sampling.temperature, 0.5f);
  EXPECT_EQ(got.sampling.top_k, 7);
  EXPECT_FLOAT_EQ(got.sampling.top_p, 0.9f);
  EXPECT_FLOAT_EQ(got.sampling.min_p, 0.1f);
  EXPECT_FLOAT_EQ(got.sampling.repetition_penalty, 1.1f);
  EXPECT_FLOAT_EQ(got.sampling.presence_penalty, 0.2f);
  EXPECT_FLOAT_EQ(got.sampling.frequency_penalty, 0.3f);
  EXPECT_THAT(got.sampling.logit_bias, ::testing::ElementsAre(std::make_pair(5, -1.5f)));
  EXPECT_EQ(got.sampling.seed, 99u);
  EXPECT_THAT(got.sampling.stop, ::testing::ElementsAre("END"));
  EXPECT_TRUE(got.sampling.include_stop_in_output);
  EXPECT_THAT(got.sampling.stop_token_ids, ::testing::ElementsAre(10));
  EXPECT_EQ(got.sampling.max_tokens, 6);
  EXPECT_EQ(got.sampling.min_tokens, 2);
  EXPECT_TRUE(got.sampling.ignore_eos);
  EXPECT_EQ(got.sampling.logprobs, 2);
  ASSERT_EQ(response_.choices(0).logprobs_size(), 6);
  EXPECT_EQ(response_.choices(0).logprobs(1).text(), "b");
  EXPECT_FLOAT_EQ(response_.choices(0).logprobs(1).logprob(), -0.5f);
  EXPECT_EQ(response_.choices(0).logprobs(1).top(1).text(), "!");
}

TEST_F(GrpcServerTest, ChatAndTokenIdsAreInputsToo) {
  Start();
  v1::GenerateRequest ids;
  ids.mutable_prompt_tokens()->add_ids(65);
  ids.mutable_sampling()->set_max_tokens(1);
  ASSERT_TRUE(Generate(ids).ok());
  EXPECT_THAT(engine_->last_request().prompt, ::testing::ElementsAre(65));
  v1::GenerateRequest chat;
  v1::ChatMessage* message = chat.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("hello");
  chat.mutable_sampling()->set_max_tokens(1);
  ASSERT_TRUE(Generate(chat).ok());
  EXPECT_EQ(engine_->last_request().prompt, *service_->TokenizeChat({{"user", "hello", ""}}));
}

TEST_F(GrpcServerTest, StreamGivesPiecesThenFinishAndUsage) {
  Start();
  v1::GenerateRequest request = Prompt(40);
  request.mutable_sampling()->set_n(2);
  grpc::ClientContext context;
  const auto reader = stub_->GenerateStream(&context, request);
  v1::GenerateStreamResponse message;
  std::string text[2];
  int finished = 0;
  bool has_usage = false;
  while (reader->Read(&message)) {
    EXPECT_FALSE(has_usage) << "usage belongs to the last message";
    EXPECT_THAT(message.request_id(), StartsWith("atp-"));
    ASSERT_LT(message.choice().index(), 2);
    text[message.choice().index()] += message.choice().text();
    if (message.choice().finish_reason() == v1::FINISH_REASON_LENGTH) ++finished;
    has_usage = message.has_usage();
  }
  ASSERT_TRUE(reader->Finish().ok());
  EXPECT_EQ(text[0], "abcdefghijklmnopqrstuvwxyzabcdefghijklmn");
  EXPECT_EQ(text[1], text[0]);
  EXPECT_EQ(finished, 2);
  ASSERT_TRUE(has_usage);
  EXPECT_EQ(message.usage().completion_tokens(), 80);
  EXPECT_EQ(message.usage().atp().kv_bytes(), 2 * 5000);
  EXPECT_EQ(message.usage().atp().exact_kv_bytes(), 2 * 9000);
  EXPECT_EQ(message.usage().prompt_tokens(), 3);
}

TEST_F(GrpcServerTest, FinishReasonsBecomeStatuses) {
  FakeEngine::Options options;
  options.reason = FinishReason::kError;
  Start(options);
  EXPECT_EQ(Generate(Prompt(2)).error_code(), grpc::StatusCode::INTERNAL);
  StreamClient stream(stub_.get(), Prompt(2));
  stream.AwaitDone();
  EXPECT_EQ(stream.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(stream.text, "ab");  // what was computed still arrives
}

TEST_F(GrpcServerTest, AFullQueueSaysWhenToTryAgain) {
  FakeEngine::Options options = Held();
  options.max_requests = 1;
  Start(options);
  StreamClient first(stub_.get(), Endless());
  ASSERT_TRUE(engine_->AwaitLive(1));
  grpc::ClientContext context;
  const grpc::Status status = stub_->Generate(&context, Prompt(1), &response_);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(Value(context.GetServerTrailingMetadata(), "retry-after-ms"), "1500");
  grpc::ClientContext stream_context;
  const auto reader = stub_->GenerateStream(&stream_context, Prompt(1));
  v1::GenerateStreamResponse message;
  EXPECT_FALSE(reader->Read(&message));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(Value(stream_context.GetServerTrailingMetadata(), "retry-after-ms"), "1500");
  first.Cancel();
  first.AwaitDone();
}

TEST_F(GrpcServerTest, ApiKeysGuardEveryMethodButHealth) {
  config_.server.api_keys = {"secret"};
  Start();
  EXPECT_EQ(Generate(Prompt(1)).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  StreamClient stream(stub_.get(), Prompt(1));
  stream.AwaitDone();
  EXPECT_EQ(stream.status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  v1::GetServerInfoResponse info;
  for (const char* header : {"Bearer wrong", "secret", "Basic secret", "Bearer "}) {
    grpc::ClientContext context;
    context.AddMetadata("authorization", header);
    EXPECT_EQ(stub_->GetServerInfo(&context, {}, &info).error_code(), grpc::StatusCode::UNAUTHENTICATED)
        << header;
  }
  grpc::ClientContext context;
  context.AddMetadata("authorization", "Bearer secret");
  EXPECT_TRUE(stub_->Generate(&context, Prompt(1), &response_).ok());
  std::string health;
  EXPECT_TRUE(CallBytes(channel_, "/grpc.health.v1.Health/Check", "", &health).ok());
}

TEST_F(GrpcServerTest, InvalidArgumentsNameTheField) {
  Start();
  v1::GenerateRequest hot = Prompt(1);
  hot.mutable_sampling()->set_temperature(-3);
  v1::GenerateRequest many = Prompt(1);
  many.mutable_sampling()->set_n(1000);
  v1::GenerateRequest outside;
  outside.mutable_prompt_tokens()->add_ids(12345);
  const std::vector<std::pair<std::string, v1::GenerateRequest>> cases = {
      {"temperature:", hot}, {"n:", many}, {"prompt:", outside}, {"prompt:", v1::GenerateRequest()}};
  for (const auto& [field, request] : cases) {
    const grpc::Status status = Generate(request);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), StartsWith(field));
    StreamClient stream(stub_.get(), request);
    stream.AwaitDone();
    EXPECT_EQ(stream.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(stream.status.error_message(), status.error_message());
  }
  v1::GenerateRequest other = Prompt(1);
  other.set_model("other");
  EXPECT_EQ(Generate(other).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(GrpcServerTest, MessagesBeyondTheLimitAreRefused) {
  config_.server.max_body_bytes = 1000;
  Start();
  EXPECT_EQ(Generate(Prompt(1, std::string(2000, 'x'))).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(Generate(Prompt(1, std::string(500, 'x'))).ok());
}

TEST_F(GrpcServerTest, APromptLongerThanTheContextIsInvalid) {
  Start();
  const grpc::Status status = Generate(Prompt(1, std::string(4'000'001, 'x')));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("shorten it"));
}

TEST_F(GrpcServerTest, SmallCalls) {
  Start();
  v1::TokenizeRequest text;
  text.set_text("ok");
  v1::TokenizeResponse tokens;
  grpc::ClientContext c1, c2, c3, c4, c5, c6;
  ASSERT_TRUE(stub_->Tokenize(&c1, text, &tokens).ok());
  EXPECT_THAT(tokens.tokens(), ::testing::ElementsAre(ByteTokenizer::kBos, 'o', 'k'));
  text.set_add_special_tokens(false);
  ASSERT_TRUE(stub_->Tokenize(&c2, text, &tokens).ok());
  EXPECT_THAT(tokens.tokens(), ::testing::ElementsAre('o', 'k'));
  v1::DetokenizeRequest ids;
  ids.add_tokens('o');
  ids.add_tokens('k');
  v1::DetokenizeResponse back;
  ASSERT_TRUE(stub_->Detokenize(&c3, ids, &back).ok());
  EXPECT_EQ(back.text(), "ok");
  ids.add_tokens(-1);
  EXPECT_EQ(stub_->Detokenize(&c4, ids, &back).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  v1::ListModelsResponse models;
  ASSERT_TRUE(stub_->ListModels(&c5, {}, &models).ok());
  ASSERT_EQ(models.models_size(), 1);
  EXPECT_EQ(models.models(0).id(), "tiny");
  EXPECT_EQ(models.models(0).vocab_size(), ByteTokenizer::kVocabSize);
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(stub_->GetServerInfo(&c6, {}, &info).ok());
  EXPECT_EQ(info.version(), std::string(AtpVersion()));
  EXPECT_EQ(info.device(), "fake");
  EXPECT_TRUE(info.ready());
  EXPECT_EQ(info.kv_blocks_total(), 100);
}

TEST_F(GrpcServerTest, HealthFollowsSetServing) {
  Start();
  // HealthCheckRequest{service} and HealthCheckResponse{status: 1 SERVING, 2 NOT_SERVING} of grpc.health.v1
  // as bytes.
  const std::string whole_server,
      inference =
          "\x0a\x10"
          "atp.v1.Inference",
      unknown = "\x0a\x04nope";
  std::string response;
  for (const std::string& name : {whole_server, inference}) {
    ASSERT_TRUE(CallBytes(channel_, "/grpc.health.v1.Health/Check", name, &response).ok());
    EXPECT_EQ(response, "\x08\x01");
  }
  EXPECT_EQ(CallBytes(channel_, "/grpc.health.v1.Health/Check", unknown, &response).error_code(),
            grpc::StatusCode::NOT_FOUND);
  server_->SetServing(false);
  for (const std::string& name : {whole_server, inference}) {
    ASSERT_TRUE(CallBytes(channel_, "/grpc.health.v1.Health/Check", name, &response).ok());
    EXPECT_EQ(response, "\x08\x02");
  }
}

TEST_F(GrpcServerTest, ReflectionListsTheService) {
  Start();
  class Reflection : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
   public:
    void OnReadDone(bool ok) override {
      if (ok) text = ToString(response);
      StartWritesDone();
    }
    void OnDone(const grpc::Status&) override { done.count_down(); }
    grpc::ByteBuffer request, response;
    std::string text;
    std::latch done{1};
  } reflection;
  grpc::Slice list_services(std::string("\x3a\x01*"));  // ServerReflectionRequest{list_services: "*"}
  reflection.request = grpc::ByteBuffer(&list_services, 1);
  grpc::ClientContext context;
  grpc::GenericStub generic(channel_);
  generic.PrepareBidiStreamingCall(&context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                                   grpc::StubOptions(), &reflection);
  reflection.StartWrite(&reflection.request);
  reflection.StartRead(&reflection.response);
  reflection.StartCall();
  reflection.done.wait();
  EXPECT_THAT(reflection.text, HasSubstr("atp.v1.Inference"));
  EXPECT_THAT(reflection.text, HasSubstr("grpc.health.v1.Health"));
}

}  // namespace
}  // namespace atp
