// Streams: what they say, many at once, slow readers, clients that vanish, and the end of the server.
#include <dirent.h>
#include <gmock/gmock.h>
#include <sys/resource.h>

#include <latch>
#include <thread>

#include "engine/echo_engine.h"
#include "server/completion_answer.h"
#include "tests/server/rest_fixture.h"

namespace atp::testing {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

using Server = RestFixture<FakeEngine>;

std::unique_ptr<FakeEngine> Fake(FakeEngine::Options options = {}) {
  return std::make_unique<FakeEngine>(options);
}
FakeEngine::Options Held() {
  FakeEngine::Options options;
  options.hold = true;
  return options;
}

std::string StreamRequest(std::string_view body) {
  return HttpClient::Request("POST", "/v1/completions", body);
}
constexpr char kEndless[] = R"({"prompt":"x","max_tokens":4000,"stream":true})";

// Without a chunk of usage, the last one that finishes a choice says how history was compressed.
TEST(Stream, TheLastChunkSaysWhatWasCompressed) {
  Server server(RestConfig(), Fake());
  for (const std::string body : {R"({"prompt":"x","max_tokens":5,"stream":true})",
                                 R"({"prompt":["x","y"],"n":2,"max_tokens":5,"stream":true})"}) {
    std::vector<std::string> events = server.Post("/v1/completions", body).Events();
    ASSERT_GT(events.size(), 2u);
    events.pop_back();  // [DONE]
    const json last = json::parse(events.back());
    events.pop_back();
    EXPECT_EQ(last.at("choices").at(0).at("finish_reason"), "length");
    EXPECT_FALSE(last.contains("usage"));
    EXPECT_EQ(last.at("atp").at("compressed_tokens"), body.find("\"n\"") == std::string::npos ? 64 : 4 * 64);
    for (const std::string& event : events) EXPECT_FALSE(json::parse(event).contains("atp"));
  }
}

TEST(Stream, ChatHasRoleContentFinishUsageAndDone) {
  Server server(RestConfig(), Fake());
  const HttpAnswer answer = server.Post(
      "/v1/chat/completions",
      R"({"messages":[{"role":"user","content":"x"}],"max_tokens":5,"n":2,"stream":true,"stream_options":{"include_usage":true}})");
  ASSERT_EQ(answer.status, 200);
  EXPECT_TRUE(answer.whole);
  EXPECT_THAT(answer.headers.at("content-type"), HasSubstr("text/event-stream"));
  std::vector<std::string> events = answer.Events();
  ASSERT_GT(events.size(), 6u);
  EXPECT_EQ(events.back(), "[DONE]");
  events.pop_back();
  const json usage = json::parse(events.back());
  EXPECT_EQ(usage.at("choices"), json::array());
  EXPECT_EQ(usage.at("usage").at("completion_tokens"), 10);
  EXPECT_EQ(usage.at("usage").at("prompt_tokens_details").at("cached_tokens"), 2);
  EXPECT_EQ(usage.at("atp").at("preset"), "balanced");
  EXPECT_EQ(usage.at("atp").at("kv_bytes"), 2 * 5000);
  events.pop_back();
  std::map<int, std::string> texts;
  std::map<int, std::string> stages;
  for (const std::string& event : events) {
    const json chunk = json::parse(event);
    EXPECT_TRUE(chunk.at("usage").is_null());
    EXPECT_FALSE(chunk.contains("atp"));
    EXPECT_EQ(chunk.at("id"), usage.at("id"));
    const json& choice = chunk.at("choices").at(0);
    const json& delta = choice.at("delta");
    const int index = choice.at("index");
    if (delta.contains("role")) {
      stages[index] += "r";
    } else if (!choice.at("finish_reason").is_null()) {
      stages[index] += "f";
    } else {
      if (stages[index].back() != 'c') stages[index] += "c";
      texts[index] += delta.at("content");
    }
  }
  for (int index : {0, 1}) {
    EXPECT_EQ(stages[index], "rcf");
    EXPECT_EQ(texts[index], "abcde");
  }
}

TEST(Stream, CompletionPiecesAreTheWholeText) {
  EchoEngineOptions options;
  RestFixture<EchoEngine> server(
      RestConfig(), std::make_unique<EchoEngine>(&RestFixture<EchoEngine>::Tokenizer_(), options));
  HttpClient client(server.port());
  for (int i = 0; i < 3; ++i) {  // the connection stays
    const HttpAnswer answer = client.Call(
        "POST", "/v1/completions", R"({"prompt":"naïve 東京","max_tokens":40,"logprobs":0,"stream":true})");
    std::string text;
    std::vector<std::string> events = answer.Events();
    EXPECT_EQ(events.back(), "[DONE]");
    events.pop_back();
    size_t tokens = 0;
    for (const std::string& event : events) {
      const json choice = json::parse(event).at("choices").at(0);
      text += choice.at("text");
      if (!choice.at("logprobs").is_null()) tokens += choice.at("logprobs").at("tokens").size();
    }
    const json whole =
        client.Call("POST", "/v1/completions", R"({"prompt":"naïve 東京","max_tokens":40})").Json();
    EXPECT_EQ(text, whole.at("choices").at(0).at("text"));
    EXPECT_EQ(tokens, 40u);
  }
}

TEST(Stream, AnErrorInMidStreamIsAnEventAndTheEnd) {
  FakeEngine::Options options;
  options.reason = FinishReason::kError;
  Server server(RestConfig(), Fake(options));
  HttpClient client(server.port());
  const HttpAnswer answer =
      client.Call("POST", "/v1/completions", R"({"prompt":"x","max_tokens":50,"stream":true})");
  EXPECT_EQ(answer.status, 200);
  const json last = json::parse(answer.Events().back());
  EXPECT_EQ(last.at("error").at("code"), "internal_error");
  EXPECT_EQ(answer.body.find("[DONE]"), std::string::npos);
  EXPECT_EQ(client.ReadToEnd(), "");
}

// The connection asks only when the last piece is written: what came in the meantime is one event.
TEST(Stream, PendingPiecesBecomeOne) {
  FakeEngine engine;
  const ByteTokenizer tokenizer;
  GenerateService service(&engine, &tokenizer, *ChatTemplate::Create("plain"), Server::Model(), RestConfig());
  CompletionCall call;
  call.prompts = {"x"};
  call.stream = true;
  call.max_tokens_given = true;
  call.sampling.max_tokens = 20;
  std::atomic<int> wakes{0};
  auto answer = CompletionAnswer::Start(&service, call, "id", absl::InfiniteFuture(), [&] { ++wakes; });
  ASSERT_TRUE(answer.ok());
  ASSERT_TRUE(engine.AwaitLive(0));
  EXPECT_EQ(wakes, 21);
  const AnswerPiece piece = (*answer)->Next();
  EXPECT_EQ(piece.kind, AnswerPiece::kEnd);
  const std::vector<std::string> events = absl::StrSplit(piece.chunk, "\n\n", absl::SkipEmpty());
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(json::parse(events[0].substr(6)).at("choices").at(0).at("text"), "abcdefghijklmnopqrst");
  EXPECT_EQ((*answer)->Next().kind, AnswerPiece::kNothing);
}

TEST(Stream, WhatASlowClientLeavesPendingIsBounded) {
  FakeEngine::Options options;
  options.token_text = std::string(1 << 20, 'x');
  FakeEngine engine(options);
  const ByteTokenizer tokenizer;
  GenerateService service(&engine, &tokenizer, *ChatTemplate::Create("plain"), Server::Model(), RestConfig());
  CompletionCall call;
  call.prompts = {"x"};
  call.stream = true;
  call.max_tokens_given = true;
  call.sampling.max_tokens = 100;
  auto answer = CompletionAnswer::Start(&service, call, "id", absl::InfiniteFuture(), [] {});
  ASSERT_TRUE(engine.AwaitLive(0));
  EXPECT_EQ((*answer)->Next().kind, AnswerPiece::kTooSlow);
}

TEST(Stream, AnEchoedPromptIsNoSignOfASlowClient) {
  const ByteTokenizer tokenizer;
  EchoEngineOptions options;
  options.max_positions = 1 << 18;
  EchoEngine engine(&tokenizer, options);
  ServedModel model = Server::Model();
  model.max_context_tokens = options.max_positions;
  GenerateService service(&engine, &tokenizer, *ChatTemplate::Create("plain"), model, RestConfig());
  CompletionCall call;
  call.prompts = {std::string(200000, 'x')};  // its log probabilities are 6.4 MB
  call.stream = call.echo = call.max_tokens_given = true;
  call.sampling.max_tokens = 1;
  call.sampling.logprobs = 0;
  auto answer = CompletionAnswer::Start(&service, call, "id", absl::InfiniteFuture(), [] {});
  ASSERT_TRUE(answer.ok()) << answer.status();
  AnswerPiece piece;
  size_t bytes = 0;
  do {
    piece = (*answer)->Next();
    bytes += piece.chunk.size();
    ASSERT_NE(piece.kind, AnswerPiece::kTooSlow);
    ASSERT_NE(piece.kind, AnswerPiece::kBroken);
    if (piece.kind == AnswerPiece::kNothing) absl::SleepFor(absl::Milliseconds(1));
  } while (piece.kind != AnswerPiece::kEnd);
  EXPECT_GT(bytes, 200000u);
}

TEST(Stream, AClientThatDoesNotReadIsCutOff) {
  Config config = RestConfig();
  config.server.write_timeout_ms = 100;
  FakeEngine::Options options;
  options.token_text = std::string(64 << 10, 'x');
  Server server(config, Fake(options));
  HttpClient client(server.port(), /*receive_buffer_bytes=*/4096);
  client.Send(StreamRequest(kEndless));
  ASSERT_TRUE(server.engine().AwaitLive(1));
  EXPECT_TRUE(server.engine().AwaitLive(0));
  EXPECT_EQ(server.engine().cancels(), 1);
  EXPECT_EQ(server.Get("/health").status, 200);
}

TEST(Vanish, AWaitingOrStreamingRequestIsCancelledAtOnce) {
  for (const char* body : {kEndless, R"({"prompt":["x","y"],"max_tokens":4000,"n":2})"}) {
    for (bool reset : {false, true}) {
      Server server(RestConfig(), Fake(Held()));
      HttpClient client(server.port());
      client.Send(StreamRequest(body));
      ASSERT_TRUE(server.engine().AwaitLive(body == std::string(kEndless) ? 1 : 2));
      reset ? client.Reset() : client.Close();
      EXPECT_TRUE(server.engine().AwaitLive(0));
    }
  }
  Server server(RestConfig(), Fake());
  HttpClient streaming(server.port());
  streaming.Send(StreamRequest(kEndless));
  ASSERT_TRUE(streaming.ReadUntil("data: "));
  streaming.Close();
  EXPECT_TRUE(server.engine().AwaitLive(0));
}

TEST(Vanish, IsNoticedBehindPipelinedBytes) {
  Server server(RestConfig(), Fake(Held()));
  HttpClient client(server.port());
  client.Send(StreamRequest(kEndless) + HttpClient::Request("GET", "/version") + "GET /ver");
  ASSERT_TRUE(server.engine().AwaitLive(1));
  client.Close();
  EXPECT_TRUE(server.engine().AwaitLive(0));
}

TEST(Vanish, IsNoticedBehindMoreThanIsKept) {
  Config config = RestConfig();
  config.server.max_body_bytes = 1000;
  config.server.max_header_bytes = 1000;
  Server server(config, Fake(Held()));
  HttpClient client(server.port());
  client.Send(StreamRequest(kEndless) + std::string(100000, 'x'));
  EXPECT_TRUE(server.engine().AwaitLive(0));
  EXPECT_FALSE(client.ReadUntil("HTTP/1.1 200"));
}

int ThreadCount() {
  int count = 0;
  DIR* tasks = opendir("/proc/self/task");
  while (const dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
  closedir(tasks);
  return count;
}

TEST(Stream, FiveHundredAtOnceOnTwoThreads) {
  rlimit files = {};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  Config config = RestConfig();
  config.server.io_threads = 2;
  Server server(config, Fake(Held()));
  const int threads = ThreadCount();
  std::vector<std::unique_ptr<HttpClient>> clients;
  for (int i = 0; i < 500; ++i) {
    clients.push_back(std::make_unique<HttpClient>(server.port()));
    clients.back()->Send(StreamRequest(R"({"prompt":"x","max_tokens":10,"stream":true})"));
  }
  ASSERT_TRUE(server.engine().AwaitLive(500));
  EXPECT_EQ(ThreadCount(), threads);
  server.engine().Release();
  for (auto& client : clients) {
    const HttpAnswer answer = client->ReadAnswer();
    EXPECT_TRUE(answer.whole);
    std::string text;
    std::vector<std::string> events = answer.Events();
    ASSERT_EQ(events.back(), "[DONE]");
    events.pop_back();
    for (const std::string& event : events) text += json::parse(event).at("choices").at(0).at("text");
    EXPECT_EQ(text, "abcdefghij");
  }
}

// Takes a request when it is let, and keeps the thread that brings one until then.
class StuckEngine : public EchoEngine {
 public:
  using EchoEngine::EchoEngine;
  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<OutputSink> sink) override {
    ++submitted;
    if (!busy.try_wait()) busy.count_down();
    let.wait();
    return EchoEngine::Submit(std::move(request), std::move(sink));
  }
  void Cancel(RequestId id) override {
    ++cancelled;
    EchoEngine::Cancel(id);
  }
  std::latch busy{1}, let{1};
  std::atomic<int> submitted{0}, cancelled{0};
};
using Stuck = RestFixture<StuckEngine>;

std::unique_ptr<StuckEngine> NewStuckEngine() {
  return std::make_unique<StuckEngine>(&Stuck::Tokenizer_(), EchoEngineOptions());
}

template <class Condition>
bool Await(const Condition& condition) {
  const absl::Time end = absl::Now() + absl::Minutes(1);
  while (!condition() && absl::Now() < end) absl::SleepFor(absl::Milliseconds(1));
  return condition();
}

bool AwaitConnections(Stuck& server, int open) {
  const std::string line = absl::StrCat("\natp_http_connections ", open, "\n");
  return Await([&] { return server.metrics().Render().find(line) != std::string::npos; });
}

TEST(Metrics, ProbesAreAnsweredWhileTheThreadOfTheClientsIsBusy) {
  Stuck server(RestConfig(), NewStuckEngine());
  ASSERT_EQ(RestConfig().server.io_threads, 1);
  HttpClient client(server.port());
  client.Send(HttpClient::Request("POST", "/v1/completions", R"({"prompt":"x","max_tokens":2})"));
  server.engine().busy.wait();
  for (const char* path : {"/health/live", "/health/ready", "/metrics"}) {
    EXPECT_EQ(HttpClient(server.server().metrics_port()).Call("GET", path).status, 200) << path;
  }
  server.engine().let.count_down();
  EXPECT_EQ(client.ReadAnswer().status, 200);
}

std::string LongRequest(std::string_view headers = "") {
  return HttpClient::Request(
      "POST", "/v1/completions",
      absl::StrCat(R"({"prompt":"x","max_tokens":2,"user":")", std::string(100000, 'u'), "\"}"), headers);
}

TEST(LongBodies, HoldUpNobody) {
  Stuck server(RestConfig(), NewStuckEngine());
  HttpClient client(server.port()), late(server.port()), gone(server.port());
  client.Send(LongRequest() + HttpClient::Request("GET", "/version"));
  server.engine().busy.wait();
  late.Send(LongRequest("x-request-timeout-ms: 200\r\n"));
  gone.Send(LongRequest());
  EXPECT_EQ(HttpClient(server.port()).Call("GET", "/version").status, 200);
  gone.Close();  // while its request waits for those before
  ASSERT_TRUE(AwaitConnections(server, 2));
  absl::SleepFor(absl::Milliseconds(300));
  server.engine().let.count_down();
  const HttpAnswer answer = client.ReadAnswer();
  EXPECT_EQ(answer.status, 200) << answer.body;
  EXPECT_EQ(client.ReadAnswer().status, 200);  // what was sent ahead
  EXPECT_EQ(late.ReadAnswer().status, 504);    // the wait counts
  client.Send(LongRequest());
  EXPECT_EQ(client.ReadAnswer().status, 200);
  EXPECT_EQ(server.engine().submitted, 3) << "nothing is done for who has gone";
}

TEST(LongBodies, OfAClientThatGoesMeanwhileAreCancelled) {
  Stuck server(RestConfig(), NewStuckEngine());
  HttpClient client(server.port());
  client.Send(LongRequest());
  server.engine().busy.wait();
  client.Close();
  ASSERT_TRUE(AwaitConnections(server, 0));
  server.engine().let.count_down();
  EXPECT_TRUE(Await([&] { return server.engine().cancelled == 1; }));
}

TEST(Stop, OpenAnswersFinishIdleConnectionsEndAndNewOnesAreRefused) {
  Server server(RestConfig(), Fake(Held()));
  HttpClient idle(server.port());
  EXPECT_EQ(idle.Call("GET", "/version").status, 200);
  HttpClient streaming(server.port());
  streaming.Send(StreamRequest(R"({"prompt":"x","max_tokens":10,"stream":true})"));
  HttpClient waiting(server.port());
  waiting.Send(StreamRequest(R"({"prompt":"x","max_tokens":10})"));
  ASSERT_TRUE(server.engine().AwaitLive(2));
  std::thread stopping([&] { server.server().Stop(absl::Minutes(1)); });
  EXPECT_EQ(idle.ReadToEnd(), "");
  server.engine().Release();
  EXPECT_TRUE(streaming.ReadAnswer().whole);
  const HttpAnswer answer = waiting.ReadAnswer();
  EXPECT_TRUE(answer.whole);
  EXPECT_EQ(answer.headers.at("connection"), "close");
  streaming.Close();
  waiting.Close();
  stopping.join();
}

TEST(Stop, AfterTheGraceTheRestIsCancelled) {
  Server server(RestConfig(), Fake(Held()));
  HttpClient client(server.port());
  client.Send(StreamRequest(kEndless));
  ASSERT_TRUE(server.engine().AwaitLive(1));
  server.server().Stop(absl::Milliseconds(20));
  EXPECT_TRUE(server.engine().AwaitLive(0));
  EXPECT_EQ(client.ReadAnswer().status, 0);
}

}  // namespace
}  // namespace atp::testing
