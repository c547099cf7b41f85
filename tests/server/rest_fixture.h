// A REST server on free ports over an engine of the test's choice, and an HTTP client that shows every byte.
#ifndef ATP_TESTS_SERVER_REST_FIXTURE_H_
#define ATP_TESTS_SERVER_REST_FIXTURE_H_

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/generate_service.h"
#include "server/rest_server.h"
#include "tests/server/byte_tokenizer.h"
#include "tests/server/fake_engine.h"

namespace atp::testing {

struct HttpAnswer {
  int status = 0;  // 0: the connection ended before a whole answer
  std::map<std::string, std::string> headers;
  std::string body;    // of a chunked answer: the chunks' contents
  bool whole = false;  // the body came to its end

  nlohmann::json Json() const { return nlohmann::json::parse(body); }
  // The data of the events of a stream.
  std::vector<std::string> Events() const {
    std::vector<std::string> events;
    for (absl::string_view event : absl::StrSplit(body, "\n\n", absl::SkipEmpty())) {
      EXPECT_EQ(event.substr(0, 6), "data: ");
      events.emplace_back(event.substr(6));
    }
    return events;
  }
};

// One connection. Waits at most a minute for anything (only a broken server takes so long).
class HttpClient {
 public:
  explicit HttpClient(int port, int receive_buffer_bytes = 0) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer_bytes > 0) {
      setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof(receive_buffer_bytes));
    }
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  ~HttpClient() { Close(); }
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  void Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return;  // the server has closed: the answer says so
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
  }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  void Reset() {  // RST instead of FIN
    const linger now = {1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    Close();
  }
  void HalfClose() { shutdown(fd_, SHUT_WR); }

  // False at the end of the connection.
  bool ReadMore() {
    pollfd waiting = {fd_, POLLIN, 0};
    if (poll(&waiting, 1, 60000) <= 0) {
      ADD_FAILURE() << "nothing came for a minute";
      return false;
    }
    char bytes[65536];
    const ssize_t count = recv(fd_, bytes, sizeof(bytes), 0);
    if (count <= 0) return false;
    received_.append(bytes, static_cast<size_t>(count));
    return true;
  }
  // Until `text` has come; false when the connection ends before.
  bool ReadUntil(std::string_view text) {
    while (received_.find(text) == std::string::npos) {
      if (!ReadMore()) return false;
    }
    return true;
  }
  const std::string& ReadToEnd() {
    while (ReadMore()) {
    }
    return received_;
  }
  const std::string& received() const { return received_; }

  HttpAnswer ReadAnswer(bool head = false) {
    HttpAnswer answer;
    if (!ReadUntil("\r\n\r\n")) return answer;
    const std::string text = Take(received_.find("\r\n\r\n") + 4);
    for (absl::string_view line : absl::StrSplit(text, "\r\n", absl::SkipEmpty())) {
      if (answer.status == 0) {
        EXPECT_TRUE(absl::SimpleAtoi(line.substr(9, 3), &answer.status)) << line;
        continue;
      }
      const std::vector<std::string> field = absl::StrSplit(line, absl::MaxSplits(": ", 1));
      answer.headers[absl::AsciiStrToLower(field[0])] = field.at(1);
    }
    if (answer.status == 100) return ReadAnswer(head);
    if (answer.headers.count("transfer-encoding") > 0) {
      ReadChunks(&answer);
    } else if (head || answer.status == 204) {
      answer.whole = true;
    } else if (answer.headers.count("content-length") > 0) {
      answer.whole = ReadExactly(std::stoul(answer.headers["content-length"]), &answer.body);
    } else {
      answer.body = ReadToEnd();
      answer.whole = true;
    }
    return answer;
  }

  static std::string Request(std::string_view method, std::string_view path, std::string_view body = "",
                             std::string_view headers = "") {
    std::string request = absl::StrCat(std::string(method), " ", std::string(path),
                                       " HTTP/1.1\r\nHost: test\r\n", std::string(headers));
    if (!body.empty()) absl::StrAppend(&request, "Content-Length: ", body.size(), "\r\n");
    return absl::StrCat(request, "\r\n", std::string(body));
  }
  HttpAnswer Call(std::string_view method, std::string_view path, std::string_view body = "",
                  std::string_view headers = "") {
    Send(Request(method, path, body, headers));
    return ReadAnswer(method == "HEAD");
  }

 private:
  std::string Take(size_t bytes) {
    std::string taken = received_.substr(0, bytes);
    received_.erase(0, bytes);
    return taken;
  }
  bool ReadExactly(size_t bytes, std::string* out) {
    while (received_.size() < bytes) {
      if (!ReadMore()) return false;
    }
    *out += Take(bytes);
    return true;
  }
  void ReadChunks(HttpAnswer* answer) {
    while (true) {
      while (received_.find("\r\n") == std::string::npos) {
        if (!ReadMore()) return;
      }
      const size_t size = std::stoul(Take(received_.find("\r\n") + 2), nullptr, 16);
      std::string end;
      if (!ReadExactly(size, &answer->body) || !ReadExactly(2, &end)) return;
      if (size == 0) {
        answer->whole = true;
        return;
      }
    }
  }

  int fd_;
  std::string received_;
};

inline Config RestConfig() {
  Config config;
  config.server.http_port = 0;
  config.server.metrics_port = 0;
  return config;
}

// `EngineType` is made first, so that its options can be anything.
template <typename EngineType>
class RestFixture {
 public:
  RestFixture(const Config& config, std::unique_ptr<EngineType> engine)
      : engine_(std::move(engine)),
        service_(engine_.get(), &Tokenizer_(), *ChatTemplate::Create("plain"), Model(), config) {
    auto server = RestServer::Start(config, &metrics_);
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    service_.SetReady(true);
    server_->SetService(&service_);
  }
  ~RestFixture() { server_->Stop(absl::ZeroDuration()); }

  static ServedModel Model() {
    ServedModel model;
    model.id = "tiny";
    model.created_unix_seconds = 1700000000;
    model.max_context_tokens = 4096;
    model.vocab_size = ByteTokenizer::kVocabSize;
    return model;
  }
  static const ByteTokenizer& Tokenizer_() {
    static const ByteTokenizer tokenizer;
    return tokenizer;
  }

  int port() const { return server_->http_port(); }
  EngineType& engine() { return *engine_; }
  GenerateService& service() { return service_; }
  RestServer& server() { return *server_; }
  Metrics& metrics() { return metrics_; }

  HttpAnswer Post(std::string_view path, std::string_view body, std::string_view headers = "") {
    return HttpClient(port()).Call("POST", path, body, headers);
  }
  HttpAnswer Get(std::string_view path, std::string_view headers = "") {
    return HttpClient(port()).Call("GET", path, "", headers);
  }

 private:
  std::unique_ptr<EngineType> engine_;
  GenerateService service_;
  Metrics metrics_;
  std::unique_ptr<RestServer> server_;
};

}  // namespace atp::testing

#endif  // ATP_TESTS_SERVER_REST_FIXTURE_H_
