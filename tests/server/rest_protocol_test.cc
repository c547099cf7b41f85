// HTTP itself: connections, framing, limits, and clients that behave badly.
#include <gmock/gmock.h>

#include "tests/server/rest_fixture.h"

namespace atp::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

using Server = RestFixture<FakeEngine>;

class Protocol : public ::testing::Test {
 protected:
  Server& Start(const Config& config = RestConfig(), FakeEngine::Options options = {}) {
    server_ = std::make_unique<Server>(config, std::make_unique<FakeEngine>(options));
    return *server_;
  }
  std::string Raw(std::string_view bytes) {  // all that comes back until the server closes
    HttpClient client(server_->port());
    client.Send(bytes);
    return client.ReadToEnd();
  }

  std::unique_ptr<Server> server_;
};

constexpr char kBody[] = R"({"prompt":"x","max_tokens":2})";

TEST_F(Protocol, KeepAlive) {
  Start();
  HttpClient client(server_->port());
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(client.Call("GET", "/version").status, 200);
    EXPECT_EQ(client.Call("POST", "/v1/completions", kBody).status, 200);
    EXPECT_EQ(client.Call("GET", "/nothing").status, 404);
  }
  EXPECT_EQ(client.Call("GET", "/version", "", "Connection: close\r\n").headers.at("connection"), "close");
  EXPECT_EQ(client.ReadToEnd(), "");
}

TEST_F(Protocol, PipelinedRequestsAreAnsweredInOrder) {
  Start();
  HttpClient client(server_->port());
  std::string requests;
  for (int i = 0; i < 20; ++i) {
    absl::StrAppend(
        &requests,
        HttpClient::Request("POST", "/v1/completions", kBody, absl::StrCat("x-request-id: a", i, "\r\n")),
        HttpClient::Request("GET", "/version", "", absl::StrCat("x-request-id: b", i, "\r\n")));
  }
  client.Send(requests);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(client.ReadAnswer().headers["x-request-id"], absl::StrCat("a", i));
    EXPECT_EQ(client.ReadAnswer().headers["x-request-id"], absl::StrCat("b", i));
  }
}

TEST_F(Protocol, ARequestMayComeByteByByte) {
  Start();
  HttpClient client(server_->port());
  for (char byte : HttpClient::Request("POST", "/v1/completions", kBody)) client.Send({&byte, 1});
  EXPECT_EQ(client.ReadAnswer().status, 200);
}

TEST_F(Protocol, ChunkedBodies) {
  Start();
  HttpClient client(server_->port());
  client.Send("\r\nPOST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
  client.Send("8;ext=1\r\n{\"prompt\r\n6\r\n\":\"a\"}\r\n0\r\nTrailer: 1\r\n\r\n");
  EXPECT_EQ(client.ReadAnswer().Json().at("count"), 2);
  EXPECT_EQ(client.Call("GET", "/version").status, 200);
}

TEST_F(Protocol, ExpectContinue) {
  Start();
  HttpClient client(server_->port());
  client.Send("POST /tokenize HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 14\r\n\r\n");
  EXPECT_TRUE(client.ReadUntil("HTTP/1.1 100 Continue\r\n\r\n"));
  client.Send("{\"prompt\":\"a\"}");
  EXPECT_EQ(client.ReadAnswer().status, 200);
  Config config = RestConfig();
  config.server.max_body_bytes = 1000;
  Start(config);
  EXPECT_THAT(
      Raw("POST /tokenize HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1001\r\n\r\n"),
      StartsWith("HTTP/1.1 413"));
}

TEST_F(Protocol, Http10ClosesUnlessAskedToStay) {
  Start();
  const std::string closed = Raw("GET /version HTTP/1.0\r\n\r\n");
  EXPECT_THAT(closed, HasSubstr("Connection: close"));
  HttpClient stays(server_->port());
  for (int i = 0; i < 2; ++i) {
    stays.Send("GET /version HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    EXPECT_EQ(stays.ReadAnswer().headers["connection"], "keep-alive");
  }
  const std::string body = R"({"prompt":"x","max_tokens":2,"stream":true})";
  const std::string stream =
      Raw(absl::StrCat("POST /v1/completions HTTP/1.0\r\nContent-Length: ", body.size(), "\r\n\r\n", body));
  EXPECT_THAT(stream, Not(HasSubstr("chunked")));
  EXPECT_THAT(stream, HasSubstr("\r\n\r\ndata: {"));
  EXPECT_EQ(stream.substr(stream.size() - 14), "data: [DONE]\n\n");
}

TEST_F(Protocol, HeadAndOptions) {
  Start();
  HttpClient client(server_->port());
  const HttpAnswer head = client.Call("HEAD", "/version");
  EXPECT_EQ(head.status, 200);
  EXPECT_NE(head.headers.at("content-length"), "0");
  const HttpAnswer options = client.Call("OPTIONS", "/v1/completions");
  EXPECT_EQ(options.status, 204);
  EXPECT_EQ(options.headers.at("allow"), "POST, OPTIONS");
  EXPECT_EQ(client.Call("DELETE", "/version").status, 405);
  EXPECT_EQ(client.Call("HEAD", "/v1/completions").status, 405);
}

TEST_F(Protocol, TargetsMayBeAbsolute) {
  Start();
  EXPECT_EQ(HttpClient(server_->port()).Call("GET", "http://host:1/version?a=b").status, 200);
}

TEST_F(Protocol, MalformedRequestsAre400AndTheConnectionEnds) {
  Start();
  for (const char* bytes :
       {"\x16\x03\x01\x02 hello\r\n\r\n", "GET\r\n\r\n", "GET /version\r\n\r\n",
        "GET /version HTTP/1.1\r\nHost x\r\n\r\n", "GET /version HTTP/1.1\r\n\r\n",
        "GET /version HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: "
        "chunked\r\n\r\n0\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}",
        "POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"}) {
    const std::string answer = Raw(bytes);
    EXPECT_THAT(answer, StartsWith("HTTP/1.1 400")) << bytes;
    EXPECT_THAT(answer, HasSubstr("\"error\"")) << bytes;
    EXPECT_THAT(answer, HasSubstr("x-request-id: ")) << bytes;
    EXPECT_EQ(answer.find("HTTP/1.1", 1), std::string::npos) << bytes;  // one answer, and the connection ends
  }
  EXPECT_THAT(Raw("GET /version HTTP/2.0\r\nHost: a\r\n\r\n"), StartsWith("HTTP/1.1 505"));
  EXPECT_EQ(server_->Get("/version").status, 200);
}

TEST_F(Protocol, LimitsOfHeadersAndBody) {
  Config config = RestConfig();
  config.server.max_header_bytes = 1024;
  config.server.max_body_bytes = 2000;
  Start(config);
  const std::string long_header = "X-Long: " + std::string(5000, 'a');
  EXPECT_THAT(Raw("GET /version HTTP/1.1\r\nHost: x\r\n" + long_header + "\r\n\r\n"),
              StartsWith("HTTP/1.1 431"));
  EXPECT_THAT(Raw("GET /" + std::string(5000, 'a')), StartsWith("HTTP/1.1 431"));
  const std::string large(3000, ' ');
  const std::string answer = Raw(HttpClient::Request("POST", "/tokenize", large, "x-request-id: big\r\n"));
  EXPECT_THAT(answer, StartsWith("HTTP/1.1 413"));
  EXPECT_THAT(answer, HasSubstr("2000"));
  EXPECT_THAT(answer, HasSubstr("x-request-id: big"));
  std::string chunked = "POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  for (int i = 0; i < 3; ++i) chunked += "3e8\r\n" + std::string(1000, ' ') + "\r\n";
  EXPECT_THAT(Raw(chunked), StartsWith("HTTP/1.1 413"));
  EXPECT_THAT(Raw("POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;" +
                  std::string(5000, 'x')),
              StartsWith("HTTP/1.1 431"));
  EXPECT_EQ(server_->Post("/tokenize", R"({"prompt":")" + std::string(1900, 'a') + "\"}").status, 200);
}

TEST_F(Protocol, ASlowRequestIsCutOff) {
  Config config = RestConfig();
  config.server.header_timeout_ms = 50;
  Start(config);
  EXPECT_THAT(Raw("GET /ver"), StartsWith("HTTP/1.1 408"));
  EXPECT_THAT(Raw("POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"),
              StartsWith("HTTP/1.1 408"));
  EXPECT_THAT(Raw("POST /tokenize HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n"),
              HasSubstr("HTTP/1.1 408"));
}

TEST_F(Protocol, AnIdleConnectionIsClosed) {
  Config config = RestConfig();
  config.server.idle_timeout_ms = 50;
  Start(config);
  EXPECT_EQ(Raw(""), "");
  HttpClient client(server_->port());
  EXPECT_EQ(client.Call("GET", "/version").status, 200);
  EXPECT_EQ(client.ReadToEnd(), "");
}

TEST_F(Protocol, ConnectionsBeyondTheLimitAreRefused) {
  Config config = RestConfig();
  config.server.max_connections = 2;
  Start(config);
  HttpClient first(server_->port());
  HttpClient second(server_->port());
  EXPECT_EQ(first.Call("GET", "/version").status, 200);
  EXPECT_EQ(second.Call("GET", "/version").status, 200);
  {
    HttpClient third(server_->port());
    const HttpAnswer answer = third.Call("GET", "/version");
    EXPECT_EQ(answer.status, 503);
    EXPECT_EQ(answer.headers.count("retry-after"), 1u);
    EXPECT_EQ(third.ReadToEnd(), "");
  }
  EXPECT_EQ(HttpClient(server_->server().metrics_port()).Call("GET", "/health").status, 200);
  EXPECT_EQ(first.Call("GET", "/version").status, 200);
  first.Close();
  int status = 0;  // the place is free as soon as the server has seen the FIN
  for (int i = 0; i < 1000 && status != 200; ++i) {
    status = HttpClient(server_->port()).Call("GET", "/version").status;
    if (status != 200) absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_EQ(status, 200);
}

TEST_F(Protocol, AHalfClosedClientStillGetsAnImmediateAnswer) {
  Start();
  HttpClient client(server_->port());
  client.Send(HttpClient::Request("GET", "/version") + HttpClient::Request("GET", "/health"));
  client.HalfClose();
  EXPECT_EQ(client.ReadAnswer().status, 200);
  EXPECT_EQ(client.ReadAnswer().status, 200);
  EXPECT_EQ(client.ReadToEnd(), "");
}

TEST_F(Protocol, ResponsesAreCountedByRoutePattern) {
  Start();
  server_->Get("/v1/models/tiny");
  server_->Get("/secret-path");
  const std::string metrics = server_->metrics().Render();
  EXPECT_THAT(metrics, HasSubstr("/v1/models/{id}"));
  EXPECT_THAT(metrics, Not(HasSubstr("secret-path")));
}

}  // namespace
}  // namespace atp::testing
