#include "server/http_sessions.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "spdlog/spdlog.h"

namespace atp {

namespace asio = boost::asio;
using boost::system::error_code;

namespace {

// Connections beyond the limit that are being told so; those beyond these are closed without a word.
constexpr int kMaxRefusals = 64;

}  // namespace

HttpSessions::Presence::Presence(HttpSessions* sessions) : sessions_(sessions) {
  std::lock_guard<std::mutex> lock(sessions_->mutex_);
  ++sessions_->present_;
}

HttpSessions::Presence::~Presence() {
  std::lock_guard<std::mutex> lock(sessions_->mutex_);
  if (--sessions_->present_ == 0)
    sessions_->gone_.notify_all();  // under the lock: the owner may go right after
}

void HttpSessions::Accept(asio::ip::tcp::socket socket) {
  error_code ignored;
  socket.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket.set_option(asio::socket_base::keep_alive(true), ignored);  // a peer that lost its power sends no FIN
  std::shared_ptr<HttpConnection> session = NewHttpSession(std::move(socket), this);
  int open = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (draining_ || static_cast<int>(open_.size()) >= max_connections_ + kMaxRefusals) {
      open = -1;
    } else {
      open_.insert(session);
      open = static_cast<int>(open_.size());
      ReportLocked();
    }
  }
  if (open < 0) return;  // outside of the lock: the session takes it when it goes
  session->Start(/*refused=*/open > max_connections_);
}

void HttpSessions::Drain() {
  std::lock_guard<std::mutex> lock(mutex_);
  draining_ = true;
  for (const auto& session : open_) session->Drain();
}

void HttpSessions::CloseAll() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& session : open_) session->Kill();
}

bool HttpSessions::WaitUntilGone(absl::Duration timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  return gone_.wait_for(lock, absl::ToChronoMilliseconds(std::min(timeout, absl::Hours(24))),
                        [this] { return present_ == 0; });
}

void HttpSessions::Remove(const std::shared_ptr<HttpConnection>& session) {
  std::lock_guard<std::mutex> lock(mutex_);
  open_.erase(session);  // the caller still holds it
  ReportLocked();
}

void HttpSessions::Record(const Answered& answered) const {
  metrics_->OnResponse("http", answered.route, absl::StrCat(answered.status), answered.duration);
  const auto level = answered.status == 500 ? spdlog::level::err : spdlog::level::debug;  // our fault
  if (!spdlog::should_log(level)) return;
  spdlog::log(level, "http_request id={} method={} route={} status={} bytes={} duration_ms={:.3f}",
              absl::CEscape(answered.request.request_id), absl::CEscape(answered.request.method),
              answered.route, answered.status, answered.bytes, absl::ToDoubleMilliseconds(answered.duration));
}

void HttpSessions::ReportLocked() const {
  if (report_connections_) metrics_->SetHttpConnections(static_cast<int>(open_.size()));
}

}  // namespace atp
