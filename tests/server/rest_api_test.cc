// The endpoints: what they answer, and what they refuse.
#include <gmock/gmock.h>

#include "engine/echo_engine.h"
#include "tests/server/rest_fixture.h"

namespace atp::testing {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

using EchoServer = RestFixture<EchoEngine>;
using FakeServer = RestFixture<FakeEngine>;

std::unique_ptr<EchoEngine> Echo() {
  return std::make_unique<EchoEngine>(&EchoServer::Tokenizer_(), EchoEngineOptions());
}
std::unique_ptr<FakeEngine> Fake(FakeEngine::Options options = {}) {
  return std::make_unique<FakeEngine>(options);
}

void ExpectError(const HttpAnswer& answer, int status, const json& param, const json& code) {
  ASSERT_EQ(answer.status, status) << answer.body;
  const json error = answer.Json().at("error");
  EXPECT_EQ(error.size(), 4u);
  EXPECT_FALSE(error.at("message").get<std::string>().empty());
  EXPECT_FALSE(error.at("type").get<std::string>().empty());
  EXPECT_EQ(error.at("param"), param) << answer.body;
  EXPECT_EQ(error.at("code"), code) << answer.body;
  EXPECT_EQ(answer.headers.at("content-type"), "application/json");
}

class Api : public ::testing::Test {
 protected:
  EchoServer server_{RestConfig(), Echo()};
};

TEST_F(Api, Models) {
  const json list = server_.Get("/v1/models").Json();
  EXPECT_EQ(list.at("object"), "list");
  EXPECT_EQ(list.at("data").at(0).at("id"), "tiny");
  const json model = server_.Get("/v1/models/tiny?x=1").Json();
  EXPECT_EQ(model.at("object"), "model");
  EXPECT_EQ(model.at("created"), 1700000000);
  EXPECT_EQ(server_.Get("/v1/models/%74iny").Json().at("id"), "tiny");
  ExpectError(server_.Get("/v1/models/other/name"), 404, "model", "model_not_found");
}

TEST_F(Api, VersionAndHealth) {
  EXPECT_EQ(server_.Get("/version").Json().at("version"), std::string(AtpVersion()));
  for (const char* path : {"/health", "/health/live", "/health/ready"}) {
    EXPECT_EQ(server_.Get(path).status, 200) << path;
    EXPECT_EQ(HttpClient(server_.server().metrics_port()).Call("GET", path).status, 200) << path;
  }
  server_.service().SetReady(false);
  ExpectError(server_.Get("/health"), 503, nullptr, "unavailable");
  EXPECT_EQ(server_.Get("/health/ready").status, 503);
  EXPECT_EQ(server_.Get("/health/live").status, 200);
}

TEST_F(Api, MetricsOnBothPortsAndNothingElseOnTheirs) {
  server_.Get("/v1/models");
  for (int port : {server_.port(), server_.server().metrics_port()}) {
    const HttpAnswer answer = HttpClient(port).Call("GET", "/metrics");
    EXPECT_EQ(answer.status, 200);
    EXPECT_THAT(answer.headers.at("content-type"), HasSubstr("text/plain"));
    EXPECT_THAT(answer.body, HasSubstr("/v1/models"));
  }
  EXPECT_EQ(HttpClient(server_.server().metrics_port()).Call("GET", "/v1/models").status, 404);
}

TEST_F(Api, TokenizeAndDetokenize) {
  const json tokens = server_.Post("/tokenize", R"({"prompt":"ab"})").Json();
  EXPECT_EQ(tokens, json({{"tokens", {256, 97, 98}}, {"count", 3}, {"max_model_len", 4096}}));
  EXPECT_EQ(server_.Post("/tokenize", R"({"content":"a"})").Json().at("tokens"), json({97}));
  EXPECT_GT(server_.Post("/tokenize", R"({"messages":[{"role":"user","content":"a"}]})").Json().at("count"),
            3);
  EXPECT_EQ(server_.Post("/detokenize", R"({"tokens":[97,98]})").Json().at("prompt"), "ab");
  EXPECT_EQ(server_.Post("/detokenize", R"({"tokens":[97,98]})").Json().at("content"), "ab");
  ExpectError(server_.Post("/detokenize", R"({"tokens":[300]})"), 400, "tokens", nullptr);
  ExpectError(server_.Post("/tokenize", R"({"prompt":"a","model":"b"})"), 404, "model", "model_not_found");
}

TEST_F(Api, CompletionEchoesItsPrompt) {
  const HttpAnswer answer =
      server_.Post("/v1/completions", R"({"model":"tiny","prompt":[97,98,99],"max_tokens":5})");
  ASSERT_EQ(answer.status, 200) << answer.body;
  const json body = answer.Json();
  EXPECT_EQ(body.at("object"), "text_completion");
  EXPECT_EQ(body.at("id").get<std::string>().substr(0, 5), "cmpl-");
  EXPECT_EQ(body.at("choices").at(0).at("text"), "abcab");
  EXPECT_EQ(body.at("choices").at(0).at("finish_reason"), "length");
  EXPECT_EQ(body.at("usage").at("prompt_tokens"), 3);
  EXPECT_EQ(body.at("usage").at("completion_tokens"), 5);
  EXPECT_EQ(body.at("usage").at("total_tokens"), 8);
  EXPECT_FALSE(body.contains("atp")) << "this engine has no cache";
  EXPECT_EQ(server_.Post("/v1/completions", R"({"prompt":"a"})").Json().at("usage").at("completion_tokens"),
            16);
}

TEST(Compression, WholeAnswersSayWhatWasCompressed) {
  FakeServer server(RestConfig(), Fake());
  const json body = server.Post("/v1/completions", R"({"prompt":"x","max_tokens":3})").Json();
  EXPECT_EQ(body.at("atp"), json::parse(R"({"preset":"balanced","ratio":0.5,"bits":4.0,"tokens":100,
      "compressed_tokens":64,"entries":68,"kv_bytes":5000,"exact_kv_bytes":9000})"));
  const json sum =
      server.Post("/v1/completions", R"({"prompt":[[97],[98],[99]],"n":2,"max_tokens":2})").Json();
  EXPECT_EQ(sum.at("atp").at("kv_bytes"), 6 * 5000);
  EXPECT_EQ(sum.at("atp").at("ratio"), 0.5);
  const json chat =
      server.Post("/v1/chat/completions", R"({"messages":[{"role":"user","content":"x"}]})").Json();
  EXPECT_EQ(chat.at("atp").at("preset"), "balanced");
}

TEST_F(Api, PromptsTimesAnswersHaveConsecutiveIndices) {
  const json body =
      server_.Post("/v1/completions", R"({"prompt":[[97],[98],[99]],"n":2,"max_tokens":2})").Json();
  ASSERT_EQ(body.at("choices").size(), 6u);
  const char* expected[] = {"aa", "aa", "bb", "bb", "cc", "cc"};
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(body.at("choices").at(i).at("index"), i);
    EXPECT_EQ(body.at("choices").at(i).at("text"), expected[i]);
  }
  EXPECT_EQ(body.at("usage").at("prompt_tokens"), 3);
  EXPECT_EQ(body.at("usage").at("completion_tokens"), 12);
}

TEST_F(Api, EchoWithLogprobsScoresThePrompt) {
  const json choice =
      server_.Post("/v1/completions", R"({"prompt":[97,98],"echo":true,"max_tokens":1,"logprobs":1})")
          .Json()
          .at("choices")
          .at(0);
  EXPECT_EQ(choice.at("text"), "aba");
  EXPECT_EQ(choice.at("logprobs").at("tokens"), json({"a", "b", "a"}));
  EXPECT_EQ(choice.at("logprobs").at("text_offset"), json({0, 1, 2}));
  EXPECT_TRUE(choice.at("logprobs").at("token_logprobs").at(0).is_null());
}

TEST_F(Api, StopStringsEndAnAnswer) {
  const json choice = server_.Post("/v1/completions", R"({"prompt":[97,98,99],"max_tokens":9,"stop":"ca"})")
                          .Json()
                          .at("choices")
                          .at(0);
  EXPECT_EQ(choice.at("text"), "ab");
  EXPECT_EQ(choice.at("finish_reason"), "stop");
}

TEST_F(Api, ChatAnswers) {
  const HttpAnswer answer = server_.Post(
      "/v1/chat/completions",
      R"({"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"max_tokens":3,"logprobs":true})");
  ASSERT_EQ(answer.status, 200) << answer.body;
  const json body = answer.Json();
  EXPECT_EQ(body.at("object"), "chat.completion");
  EXPECT_EQ(body.at("id").get<std::string>().substr(0, 9), "chatcmpl-");
  EXPECT_EQ(body.at("choices").at(0).at("message").at("role"), "assistant");
  EXPECT_EQ(body.at("choices").at(0).at("logprobs").at("content").size(), 3u);
}

TEST_F(Api, ErrorsHaveOpenAisShape) {
  ExpectError(server_.Get("/nothing"), 404, nullptr, "not_found");
  ExpectError(server_.Get("/v1/models%zz"), 404, nullptr, "not_found");
  ExpectError(server_.Post("/v1/completions", "{"), 400, nullptr, nullptr);
  ExpectError(server_.Post("/v1/completions", R"({"prompt":"x","n":0})"), 400, "n", nullptr);
  ExpectError(server_.Post("/v1/completions", R"({"prompt":"x","temperature":-1})"), 400, "temperature",
              nullptr);
  ExpectError(server_.Post("/v1/completions", R"({"prompt":[999]})"), 400, "prompt", nullptr);
  ExpectError(server_.Post("/v1/completions", R"({"prompt":"x","temperature":-1,"stream":true})"), 400,
              "temperature", nullptr);
  ExpectError(server_.Post("/v1/completions", R"({"prompt":"x","model":"gpt-17"})"), 404, "model",
              "model_not_found");
  ExpectError(
      server_.Post("/v1/chat/completions", R"({"messages":[{"role":"user","content":"x"}],"tools":[{}]})"),
      400, "tools", nullptr);
  const HttpAnswer wrong_method = server_.Get("/v1/completions");
  ExpectError(wrong_method, 405, nullptr, "method_not_allowed");
  EXPECT_THAT(wrong_method.headers.at("allow"), HasSubstr("POST"));
  EXPECT_EQ(server_.Post("/v1/models", "{}").status, 405);
  ExpectError(server_.Post("/v1/completions", R"({"prompt":"x"})", "x-request-timeout-ms: soon\r\n"), 400,
              "x-request-timeout-ms", nullptr);
}

TEST_F(Api, RequestIdsGoInAndOut) {
  EXPECT_EQ(server_.Get("/version", "X-Request-ID: mine-1\r\n").headers.at("x-request-id"), "mine-1");
  EXPECT_EQ(server_.Get("/nothing", "x-request-id: mine-2\r\n").headers.at("x-request-id"), "mine-2");
  const std::string fresh = server_.Get("/version").headers.at("x-request-id");
  EXPECT_EQ(fresh.substr(0, 4), "atp-");
  EXPECT_NE(server_.Get("/version").headers.at("x-request-id"), fresh);
  for (const std::string& bad : {std::string(129, 'a'), std::string("caf\xC3\xA9"), std::string("a\tb")}) {
    EXPECT_EQ(
        server_.Get("/version", "x-request-id: " + bad + "\r\n").headers.at("x-request-id").substr(0, 4),
        "atp-");
  }
}

TEST(ApiErrors, AFullQueueIs429WithAHint) {
  FakeEngine::Options options;
  options.hold = true;
  options.max_requests = 2;
  FakeServer server(RestConfig(), Fake(options));
  // Three prompts, room for two: all or none.
  const HttpAnswer answer = server.Post("/v1/completions", R"({"prompt":["a","b","c"]})");
  ExpectError(answer, 429, nullptr, "rate_limit_exceeded");
  EXPECT_EQ(answer.headers.at("retry-after"), "2");
  EXPECT_TRUE(server.engine().AwaitLive(0));
}

TEST(ApiErrors, ADeadlineIs504) {
  FakeEngine::Options options;
  options.hold = true;
  FakeServer server(RestConfig(), Fake(options));
  for (const char* body : {R"({"prompt":"a"})", R"({"prompt":"a","stream":true})"}) {
    const HttpAnswer answer = server.Post("/v1/completions", body, "x-request-timeout-ms: 20\r\n");
    ExpectError(answer, 504, nullptr, "deadline_exceeded");
    // OpenAI's clients look for it, and would else have all of it computed twice more.
    EXPECT_EQ(answer.headers.at("x-should-retry"), "false");
  }
}

TEST(ApiErrors, AFailingEngineIs500) {
  FakeEngine::Options options;
  options.reason = FinishReason::kError;
  FakeServer server(RestConfig(), Fake(options));
  ExpectError(server.Post("/v1/completions", R"({"prompt":"a"})"), 500, nullptr, "internal_error");
}

TEST(ApiErrors, ADrainingEngineIs503) {
  FakeEngine::Options options;
  options.hold = true;
  FakeServer server(RestConfig(), Fake(options));
  HttpClient waiting(server.port());
  waiting.Send(HttpClient::Request("POST", "/v1/completions", R"({"prompt":"a"})"));
  ASSERT_TRUE(server.engine().AwaitLive(1));
  EXPECT_FALSE(server.engine().Drain(absl::ZeroDuration()).ok());
  for (const HttpAnswer& answer :
       {waiting.ReadAnswer(), server.Post("/v1/completions", R"({"prompt":"a"})")}) {
    ExpectError(answer, 503, nullptr, "unavailable");
    EXPECT_EQ(answer.headers.count("retry-after"), 1u);
    // The next try is to find its way to another server.
    ASSERT_EQ(answer.headers.count("connection"), 1u);
    EXPECT_EQ(answer.headers.find("connection")->second, "close");
  }
  EXPECT_EQ(waiting.ReadToEnd(), "");
}

TEST(ApiErrors, BeforeTheModelIsLoadedOnlyLivenessAndMetricsAnswer) {
  Metrics metrics;
  auto server = RestServer::Start(RestConfig(), &metrics);
  ASSERT_TRUE(server.ok()) << server.status();
  const int port = (*server)->http_port();
  EXPECT_EQ(HttpClient(port).Call("GET", "/health/live").status, 200);
  EXPECT_EQ(HttpClient(port).Call("GET", "/metrics").status, 200);
  for (const char* path : {"/health", "/health/ready", "/v1/models", "/version"}) {
    const HttpAnswer answer = HttpClient(port).Call("GET", path);
    ExpectError(answer, 503, nullptr, "unavailable");
    EXPECT_EQ(answer.headers.count("retry-after"), 1u);
  }
}

TEST(ApiErrors, APortThatIsTakenIsAnErrorThatNamesIt) {
  Metrics metrics;
  auto first = RestServer::Start(RestConfig(), &metrics);
  ASSERT_TRUE(first.ok());
  Config config = RestConfig();
  config.server.http_port = (*first)->http_port();
  const auto second = RestServer::Start(config, &metrics);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("server.http_port"));
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(std::to_string(config.server.http_port)));
}

TEST(ApiKeys, AreNeededWhereThereAreAny) {
  Config config = RestConfig();
  config.server.api_keys = {"first-key", "second-key"};
  EchoServer server(config, Echo());
  for (const char* header : {"", "Authorization: Bearer wrong\r\n", "Authorization: Bearer\r\n",
                             "Authorization: Basic first-key\r\n", "Authorization: Bearer first-ke\r\n"}) {
    for (const char* path : {"/v1/models", "/v1/nothing", "/v1/completions"}) {
      const HttpAnswer answer = server.Get(path, header);
      ExpectError(answer, 401, nullptr, "invalid_api_key");
      EXPECT_EQ(answer.headers.at("www-authenticate"), "Bearer");
      EXPECT_EQ(answer.body.find("first-ke"), std::string::npos);
    }
    EXPECT_EQ(server.Post("/tokenize", R"({"prompt":"a"})", header).status, 401);
    EXPECT_EQ(server.Get("/health", header).status, 200);
  }
  for (const char* key : {"first-key", "second-key"}) {
    EXPECT_EQ(server.Get("/v1/models", absl::StrCat("authorization: bearer ", key, "\r\n")).status, 200);
  }
}

TEST(Cors, OnlyConfiguredOriginsGetHeaders) {
  Config config = RestConfig();
  config.server.cors_allowed_origins = {"https://a.example"};
  config.server.api_keys = {"key"};
  EchoServer server(config, Echo());
  const HttpAnswer good = server.Get("/v1/nothing", "Origin: https://a.example\r\n");
  EXPECT_EQ(good.headers.at("access-control-allow-origin"), "https://a.example");
  EXPECT_EQ(good.headers.at("vary"), "Origin");
  EXPECT_EQ(
      server.Get("/version", "Origin: https://b.example\r\n").headers.count("access-control-allow-origin"),
      0u);
  const std::string preflight =
      "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: x-stainless-os, "
      "authorization\r\n";
  HttpAnswer answer =
      HttpClient(server.port())
          .Call("OPTIONS", "/v1/completions", "", "Origin: https://a.example\r\n" + preflight);
  EXPECT_EQ(answer.status, 204);  // without a key: browsers send none
  EXPECT_THAT(answer.headers.at("access-control-allow-methods"), HasSubstr("POST"));
  EXPECT_EQ(answer.headers.at("access-control-allow-headers"), "x-stainless-os, authorization");
  answer = HttpClient(server.port())
               .Call("OPTIONS", "/v1/completions", "", "Origin: https://b.example\r\n" + preflight);
  EXPECT_EQ(answer.status, 204);
  EXPECT_EQ(answer.headers.count("access-control-allow-methods"), 0u);
}

TEST(Cors, AnyAndNone) {
  Config config = RestConfig();
  config.server.cors_allowed_origins = {"*"};
  EchoServer any(config, Echo());
  EXPECT_EQ(any.Get("/version", "Origin: https://x.example\r\n").headers.at("access-control-allow-origin"),
            "*");
  EchoServer none(RestConfig(), Echo());
  EXPECT_EQ(
      none.Get("/version", "Origin: https://x.example\r\n").headers.count("access-control-allow-origin"), 0u);
}

}  // namespace
}  // namespace atp::testing
