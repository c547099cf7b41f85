#include <array>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/http_message.h"
#include "server/http_sessions.h"
#include "server/sse_writer.h"

namespace atp {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

namespace {

// Bytes that a client may send ahead of its answers (pipelining).
constexpr size_t kMaxReadAhead = 64 << 10;
constexpr size_t kReadBytes = 8 << 10;
// A longer body is parsed and tokenized on a thread of its own, which takes so long that other connections
// would notice.
constexpr size_t kLongBody = 64 << 10;
// After the last answer we read and drop what still comes: closing with unread bytes would reset the
// connection and could take the answer with it (RFC 9112, 9.6).
constexpr auto kLinger = std::chrono::seconds(2);
}  // namespace

// One connection. All but the three public methods runs on the socket's strand. Reading goes on while an
// answer is being made: that is how a vanished client is noticed, and why bytes of a next request may wait in
// input_.
class HttpSession final : public HttpConnection, public std::enable_shared_from_this<HttpSession> {
 public:
  HttpSession(asio::ip::tcp::socket socket, HttpSessions* owner)
      : presence_(owner),
        owner_(*owner),
        config_(owner->config()),
        socket_(std::move(socket)),
        timer_(socket_.get_executor()) {}

  void Start(bool refused) override;
  void Drain() override;
  void Kill() override;

 private:
  enum class State { kReceiving, kAnswering, kLingering, kClosed };
  enum class Limit { kIdle, kRequest, kWrite, kLinger };
  using Parser = http::request_parser<http::string_body>;

  template <class F>
  void Post(F call) {  // on the strand; any thread
    asio::post(socket_.get_executor(),
               [self = shared_from_this(), call = std::move(call)]() mutable { call(*self); });
  }
  void Arm(Limit limit, std::chrono::milliseconds time);
  void Disarm() { ++timer_turn_, timer_.cancel(); }
  void OnTimeout(Limit limit);
  void Read();
  void OnRead(error_code error, size_t bytes);
  void Advance();
  bool ParseSome();
  void Continue();
  void Malformed(error_code error);
  void Refuse(HttpRequest request, int status, std::string_view message);
  HttpRequest ParsedSoFar() const;
  HttpRequest TakeHeaders(const Parser::value_type& message) const;
  void Dispatch();
  Routed Route(const HttpRequest& request);
  void Begin(HttpRequest request, Routed routed);
  void Wake();
  void Pump();
  std::string Head(const HttpResponse& response, bool stream);
  std::string ChunkOf(const AnswerPiece& piece);
  void Write(std::string bytes, bool limited);
  void WriteSome(bool limited);
  void FinishAnswer();
  void Record(int status) { owner_.Record({request_, route_, status, sent_bytes_, absl::Now() - began_}); }
  void Vanish();
  void Linger();
  void Close();

  const HttpSessions::Presence presence_;  // first: the last to be destroyed
  HttpSessions& owner_;
  const ServerConfig& config_;
  asio::ip::tcp::socket socket_;
  asio::steady_timer timer_;
  uint64_t timer_turn_ = 0;  // of the newest Arm(): an expired wait of an older one means nothing
  State state_ = State::kReceiving;

  std::array<char, kReadBytes> read_chunk_;
  std::string input_;  // received, not parsed
  bool reading_ = false;
  bool eof_ = false;
  std::optional<Parser> parser_;
  bool continued_ = false;  // 100 Continue is sent

  // The answer under way.
  HttpRequest request_;
  absl::Time began_ = absl::Now();
  std::string_view route_;
  HttpHeaders headers_;
  std::optional<HttpResponse> ready_;
  std::shared_ptr<PendingAnswer> pending_;
  std::shared_ptr<HttpRequest> long_request_;  // waits for its route
  bool http11_ = true;
  bool keep_alive_ = true;
  bool streaming_ = false;  // the head of a stream is out
  bool last_ = false;       // all is handed to Write()
  int status_ = 0;
  size_t sent_bytes_ = 0;

  std::string output_;
  size_t written_ = 0;
  bool writing_ = false;
  std::atomic<bool> woken_{false};
};

// --- any thread ---

void HttpSession::Start(bool refused) {
  Post([refused](HttpSession& self) {
    if (self.state_ == State::kClosed) return;
    if (refused) {
      self.Refuse(self.ParsedSoFar(), 503, "too many connections; try again later");
    } else {
      self.Arm(Limit::kIdle, std::chrono::milliseconds(self.config_.idle_timeout_ms));
    }
    self.Read();
  });
}

void HttpSession::Drain() {
  Post([](HttpSession& self) {
    if (self.state_ == State::kReceiving) self.Close();
  });
}

void HttpSession::Kill() {
  Post([](HttpSession& self) {
    if (self.state_ == State::kAnswering && !self.last_) self.Vanish();
    self.Close();
  });
}

void HttpSession::Wake() {
  if (woken_.exchange(true)) return;
  Post([](HttpSession& self) {
    self.woken_ = false;
    self.Pump();
  });
}

// --- time limits ---

void HttpSession::Arm(Limit limit, std::chrono::milliseconds time) {
  timer_.expires_after(time);
  timer_.async_wait([self = shared_from_this(), limit, turn = ++timer_turn_](error_code error) {
    if (!error && turn == self->timer_turn_) self->OnTimeout(limit);
  });
}

void HttpSession::OnTimeout(Limit limit) {
  if (state_ == State::kClosed) return;
  if (limit == Limit::kRequest && state_ == State::kReceiving) {
    return Refuse(ParsedSoFar(), 408,
                  absl::StrCat("the request was not complete within ", config_.header_timeout_ms, " ms"));
  }
  if (limit == Limit::kWrite) return Vanish();
  Close();
}

// --- receiving ---

void HttpSession::Read() {
  if (reading_ || eof_ || state_ == State::kClosed) return;
  reading_ = true;
  socket_.async_read_some(
      asio::buffer(read_chunk_),
      [self = shared_from_this()](error_code error, size_t bytes) { self->OnRead(error, bytes); });
}

void HttpSession::OnRead(error_code error, size_t bytes) {
  reading_ = false;
  if (state_ == State::kClosed) return;
  if (error) {
    eof_ = true;
    // An answer that is being written may still arrive: the client may have closed its side only.
    if (state_ == State::kAnswering && error == asio::error::eof && !long_request_ && (!pending_ || last_))
      return;
    return state_ == State::kAnswering ? Vanish() : Close();
  }
  if (state_ != State::kLingering) input_.append(read_chunk_.data(), bytes);
  if (state_ == State::kReceiving) Advance();
  // Not to read more would be not to see that the client goes.
  if (state_ == State::kAnswering && input_.size() > kMaxReadAhead) return Vanish();
  Read();
}

void HttpSession::Advance() {
  while (state_ == State::kReceiving && !input_.empty()) {
    if (!parser_) {
      input_.erase(0, input_.find_first_not_of("\r\n"));  // empty lines before a request are to be ignored
      if (input_.empty()) return;
      parser_.emplace();
      parser_->eager(true);
      parser_->header_limit(static_cast<uint32_t>(config_.max_header_bytes));
      parser_->body_limit(static_cast<uint64_t>(config_.max_body_bytes));
      continued_ = false;
      began_ = absl::Now();
      Arm(Limit::kRequest, std::chrono::milliseconds(config_.header_timeout_ms));
    }
    if (!ParseSome()) return;
  }
}

// False when more bytes are needed, or the connection has been refused.
bool HttpSession::ParseSome() {
  error_code error;
  const size_t used = parser_->put(asio::buffer(input_), error);
  input_.erase(0, used);
  const bool starved = error == http::error::need_more || used == 0;
  if (error && error != http::error::need_more) {
    Malformed(error);
    return false;
  }
  if (parser_->is_done()) {
    Dispatch();
    return true;
  }
  if (parser_->is_header_done()) Continue();
  if (starved && input_.size() > static_cast<size_t>(config_.max_header_bytes)) {
    Malformed(http::error::header_limit);  // an endless chunk extension or trailer
    return false;
  }
  return !starved;
}

// 100 Continue, once, for a client that waits for it before it sends the body.
void HttpSession::Continue() {
  const auto& message = parser_->get();
  if (continued_ || writing_ || message.version() < 11) return;
  const auto expect = message[http::field::expect];
  if (!absl::EqualsIgnoreCase({expect.data(), expect.size()}, "100-continue")) return;
  continued_ = true;
  Write("HTTP/1.1 100 Continue\r\n\r\n", /*limited=*/false);  // the request's own limit is running
}

void HttpSession::Malformed(error_code error) {
  if (error == http::error::header_limit) {
    return Refuse(ParsedSoFar(), 431,
                  absl::StrCat("the headers are longer than ", config_.max_header_bytes, " bytes"));
  }
  if (error == http::error::body_limit) {
    return Refuse(ParsedSoFar(), 413,
                  absl::StrCat("the body is longer than ", config_.max_body_bytes, " bytes"));
  }
  if (error == http::error::bad_version)
    return Refuse(ParsedSoFar(), 505, "only HTTP/1.0 and HTTP/1.1 are spoken here");
  Refuse(ParsedSoFar(), 400, absl::StrCat("this is not a well-formed HTTP request (", error.message(), ")"));
}

// The connection cannot go on: the rest of the request, if any, is not wanted.
void HttpSession::Refuse(HttpRequest request, int status, std::string_view message) {
  keep_alive_ = false;
  http11_ = true;
  Routed routed = owner_.router().Refuse(request, status, message);
  Begin(std::move(request), std::move(routed));
}

HttpRequest HttpSession::ParsedSoFar() const {
  if (parser_) return TakeHeaders(parser_->get());
  HttpRequest request;
  request.request_id = RequestIdFrom("");
  return request;
}

HttpRequest HttpSession::TakeHeaders(const Parser::value_type& message) const {
  HttpRequest request;
  request.began = began_;
  request.method = std::string(message.method_string());
  request.target = std::string(message.target());
  for (const auto& field : message) {
    const auto name = field.name_string();
    request.headers.emplace_back(absl::AsciiStrToLower({name.data(), name.size()}),
                                 std::string(field.value()));
  }
  request.request_id = RequestIdFrom(request.Header("x-request-id"));
  return request;
}

// --- answering ---

void HttpSession::Dispatch() {
  Parser::value_type message = parser_->release();
  http11_ = message.version() >= 11;
  keep_alive_ = message.keep_alive();
  HttpRequest request = TakeHeaders(message);
  // Without exactly one Host a proxy before us and we could mean different servers (RFC 9112, 3.2).
  if (http11_ && message.count(http::field::host) != 1) {
    return Refuse(std::move(request), 400, "exactly one Host header is needed");
  }
  // Any other coding would leave it open where the body ends, and a proxy before us might think otherwise
  // (RFC 9112, 6.3).
  const auto coding = message.find(http::field::transfer_encoding);
  if (coding != message.end() && (message.count(http::field::transfer_encoding) != 1 ||
                                  !boost::beast::iequals(coding->value(), "chunked"))) {
    return Refuse(std::move(request), 400, "Transfer-Encoding: only chunked is understood");
  }
  request.body = std::move(message.body());
  if (request.body.size() < kLongBody) {
    Routed routed = Route(request);
    return Begin(std::move(request), std::move(routed));
  }
  Disarm();
  state_ = State::kAnswering;
  last_ = false;
  route_ = "unknown";  // this and the next: should the client go before more is known
  sent_bytes_ = 0;
  long_request_ = std::make_shared<HttpRequest>(std::move(request));
  asio::post(owner_.long_bodies(), [self = shared_from_this(), weak = std::weak_ptr(long_request_)] {
    const std::shared_ptr<HttpRequest> whole = weak.lock();
    if (whole == nullptr) return;  // the client has gone
    self->Post([whole, routed = self->Route(*whole)](HttpSession& session) mutable {
      session.long_request_.reset();
      session.Begin(std::move(*whole), std::move(routed));
    });
  });
}

Routed HttpSession::Route(const HttpRequest& request) {
  return owner_.router().Route(request, [weak = weak_from_this()] {
    if (std::shared_ptr<HttpSession> self = weak.lock()) self->Wake();
  });
}

void HttpSession::Begin(HttpRequest request, Routed routed) {
  if (state_ == State::kClosed) {  // while a long body was read
    if (auto* pending = std::get_if<std::shared_ptr<PendingAnswer>>(&routed.answer)) (*pending)->Abandon();
    return;
  }
  Disarm();
  // The answer waits for "100 Continue" to be out, which had only the request's limit until now.
  if (writing_) Arm(Limit::kWrite, std::chrono::milliseconds(config_.write_timeout_ms));
  state_ = State::kAnswering;
  parser_.reset();
  request_ = std::move(request);
  request_.body.clear();
  request_.body.shrink_to_fit();
  route_ = routed.route;
  headers_ = std::move(routed.headers);
  streaming_ = last_ = false;
  status_ = 0;
  sent_bytes_ = 0;
  if (auto* response = std::get_if<HttpResponse>(&routed.answer)) {
    ready_ = std::move(*response);
  } else {
    pending_ = std::move(std::get<std::shared_ptr<PendingAnswer>>(routed.answer));
    if (eof_) return Vanish();
  }
  Pump();
}

void HttpSession::Pump() {
  if (state_ != State::kAnswering || writing_ || last_ || (!ready_ && !pending_)) return;
  AnswerPiece piece;
  if (ready_) {
    piece.kind = AnswerPiece::kWhole;
    piece.response = *std::exchange(ready_, std::nullopt);
  } else {
    piece = pending_->Next();
  }
  switch (piece.kind) {
    case AnswerPiece::kNothing:
      return;
    case AnswerPiece::kTooSlow:
      return Vanish();
    case AnswerPiece::kWhole: {
      last_ = true;
      std::string bytes = Head(piece.response, /*stream=*/false);
      if (request_.method != "HEAD") bytes += piece.response.body;
      return Write(std::move(bytes), /*limited=*/true);
    }
    case AnswerPiece::kStream:
    case AnswerPiece::kEnd:
    case AnswerPiece::kBroken:
      return Write(ChunkOf(piece), /*limited=*/true);
  }
}

std::string HttpSession::ChunkOf(const AnswerPiece& piece) {
  last_ = piece.kind != AnswerPiece::kStream;
  if (piece.kind == AnswerPiece::kBroken) keep_alive_ = false;
  std::string bytes;
  if (!std::exchange(streaming_, true)) {
    HttpResponse response;
    response.content_type = std::string(kSseContentType);
    response.headers = {{"Cache-Control", "no-cache"},
                        {"X-Accel-Buffering", "no"}};  // proxies pass pieces on at once
    bytes = Head(response, /*stream=*/true);
  }
  if (!http11_) return bytes + piece.chunk;  // ends with the connection
  absl::StrAppend(&bytes, absl::Hex(piece.chunk.size()), "\r\n", piece.chunk, "\r\n");
  if (last_) bytes += "0\r\n\r\n";
  return bytes;
}

std::string HttpSession::Head(const HttpResponse& response, bool stream) {
  status_ = response.status;
  HttpBodyEnd end = HttpBodyEnd::kLength;
  if (stream) end = http11_ ? HttpBodyEnd::kChunked : HttpBodyEnd::kClose;
  // 503: who asks again should do so on a new connection, which may lead to another server.
  if (owner_.draining() || end == HttpBodyEnd::kClose || status_ == 503) keep_alive_ = false;
  return RenderHead(response, headers_, end, keep_alive_, http11_);
}

// `limited`: the client must read some of it within write_timeout_ms, again and again.
void HttpSession::Write(std::string bytes, bool limited) {
  output_ = std::move(bytes);
  written_ = 0;
  writing_ = true;
  sent_bytes_ += output_.size();
  WriteSome(limited);
}

void HttpSession::WriteSome(bool limited) {
  if (limited) Arm(Limit::kWrite, std::chrono::milliseconds(config_.write_timeout_ms));
  const auto rest = asio::buffer(output_.data() + written_, output_.size() - written_);
  socket_.async_write_some(rest, [self = shared_from_this(), limited](error_code error, size_t bytes) {
    if (self->state_ == State::kClosed) return;
    if (error) return self->state_ == State::kAnswering ? self->Vanish() : self->Close();
    self->written_ += bytes;
    if (self->written_ < self->output_.size()) return self->WriteSome(limited);
    self->writing_ = false;
    if (limited || self->state_ == State::kAnswering) self->Disarm();
    if (self->state_ != State::kAnswering) return;
    self->last_ ? self->FinishAnswer() : self->Pump();
  });
}

void HttpSession::FinishAnswer() {
  Record(status_);
  pending_.reset();
  output_ = std::string();  // an idle connection keeps nothing
  input_.shrink_to_fit();
  if (!keep_alive_ || owner_.draining()) return Linger();
  state_ = State::kReceiving;
  Arm(Limit::kIdle, std::chrono::milliseconds(config_.idle_timeout_ms));
  Advance();
  if (eof_ && state_ == State::kReceiving) return Close();
  Read();
}

// --- the end ---

// The client has gone, or reads too slowly, before its answer was out. 499 is nginx's name for that, in
// metrics only.
void HttpSession::Vanish() {
  if (state_ == State::kClosed) return;
  if (pending_ != nullptr) pending_->Abandon();
  Record(499);
  Close();
}

void HttpSession::Linger() {
  error_code ignored;
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  if (eof_) return Close();
  state_ = State::kLingering;
  input_.clear();
  Arm(Limit::kLinger, kLinger);
  Read();
}

void HttpSession::Close() {
  if (state_ == State::kClosed) return;
  state_ = State::kClosed;
  Disarm();
  error_code ignored;
  socket_.close(ignored);
  pending_.reset();
  long_request_.reset();
  owner_.Remove(shared_from_this());
}

std::shared_ptr<HttpConnection> NewHttpSession(asio::ip::tcp::socket socket, HttpSessions* owner) {
  return std::make_shared<HttpSession>(std::move(socket), owner);
}

}  // namespace atp
