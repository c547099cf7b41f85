#include "server/http_sessions.h"

#include <utility>

namespace atp {

namespace asio = boost::asio;
using boost::system::error_code;

namespace {

// Connections beyond the limit that are being told so; those beyond these are closed without a word.
constexpr int kMaxRefusals = 64;

}  // namespace

HttpSessions::Presence::Presence(HttpSessions* sessions) : sessions_(sessions) {
  absl::MutexLock lock(&sessions_->mutex_);
  ++sessions_->present_;
}

HttpSessions::Presence::~Presence() {
  absl::MutexLock lock(&sessions_->mutex_);
  --sessions_->present_;
}

void HttpSessions::Accept(asio::ip::tcp::socket socket) {
  error_code ignored;
  socket.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket.set_option(asio::socket_base::keep_alive(true), ignored);  // a peer that lost its power sends no FIN
  std::shared_ptr<HttpConnection> session = NewHttpSession(std::move(socket), this);
  int open = 0;
  {
    absl::MutexLock lock(&mutex_);
    if (draining_ || static_cast<int>(open_.size()) >= max_connections_ + kMaxRefusals) {
      open = -1;
    } else {
      open_.insert(session);
      open = static_cast<int>(open_.size());
    }
  }
  if (open < 0) return;  // outside of the lock: the session takes it when it goes
  Report(open);
  session->Start(/*refused=*/open > max_connections_);
}

void HttpSessions::Drain() {
  absl::MutexLock lock(&mutex_);
  draining_ = true;
  for (const auto& session : open_) session->Drain();
}

void HttpSessions::CloseAll() {
  absl::MutexLock lock(&mutex_);
  for (const auto& session : open_) session->Kill();
}

bool HttpSessions::WaitUntilGone(absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  const auto gone = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return present_ == 0; };
  return mutex_.AwaitWithTimeout(absl::Condition(&gone), timeout);
}

void HttpSessions::Remove(const std::shared_ptr<HttpConnection>& session) {
  int open = 0;
  {
    absl::MutexLock lock(&mutex_);
    open_.erase(session);  // the caller still holds it
    open = static_cast<int>(open_.size());
  }
  Report(open);
}

void HttpSessions::Report(int open) const {
  if (report_connections_) metrics_->SetHttpConnections(open);
}

}  // namespace atp
