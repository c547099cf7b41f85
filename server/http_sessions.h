// HTTP connections over Boost.Asio, parsed by Boost.Beast: one strand each, no thread each. Only
// rest_server.cc and http_session.cc include this: nothing else of the project meets a Boost header.
#ifndef ATP_SERVER_HTTP_SESSIONS_H_
#define ATP_SERVER_HTTP_SESSIONS_H_

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "absl/time/time.h"
#include "config/config.h"
#include "server/http_router.h"
#include "server/metrics.h"

namespace atp {

// One connection, on one strand. All methods may be called from any thread.
class HttpConnection {
 public:
  virtual ~HttpConnection() = default;
  virtual void Start(bool refused) = 0;  // refused: answers 503, whatever is asked, and closes
  virtual void Drain() = 0;              // closes where no answer is under way; else when it is out
  virtual void Kill() = 0;               // closes now, and cancels what is under way
};

class HttpSessions;
std::shared_ptr<HttpConnection> NewHttpSession(boost::asio::ip::tcp::socket socket, HttpSessions* owner);

// The connections of one port. Thread-safe. Outlives its sessions: WaitUntilGone() says when.
class HttpSessions {
 public:
  // `report_connections`: Metrics::SetHttpConnections follows this port. Everything outlives the sessions.
  HttpSessions(const ServerConfig& config, const HttpRouter* router, boost::asio::any_io_executor long_bodies,
               Metrics* metrics, int max_connections, bool report_connections)
      : config_(config),
        router_(router),
        long_bodies_(std::move(long_bodies)),
        metrics_(metrics),
        max_connections_(max_connections),
        report_connections_(report_connections) {}

  // Serves the connection; beyond the limit it gets a 503 and is closed. The socket's executor is a strand.
  void Accept(boost::asio::ip::tcp::socket socket);

  // Closes idle connections; the others as soon as their answer is written.
  void Drain();
  void CloseAll();
  bool WaitUntilGone(absl::Duration timeout);

  // For connections.
  const ServerConfig& config() const { return config_; }
  const HttpRouter& router() const { return *router_; }
  const boost::asio::any_io_executor& long_bodies() const { return long_bodies_; }
  Metrics& metrics() const { return *metrics_; }
  bool draining() const { return draining_.load(); }
  void Remove(const std::shared_ptr<HttpConnection>& connection);
  // What a connection answered, for metrics and the log.
  struct Answered {
    const HttpRequest& request;
    std::string_view route;
    int status;
    size_t bytes;
    absl::Duration duration;
  };
  void Record(const Answered& answered) const;

  // A connection's first member: counts it until it is destroyed, not only until it is closed.
  class Presence {
   public:
    explicit Presence(HttpSessions* sessions);
    ~Presence();
    Presence(const Presence&) = delete;
    Presence& operator=(const Presence&) = delete;

   private:
    HttpSessions* sessions_;
  };

 private:
  void ReportLocked() const;

  const ServerConfig config_;
  const HttpRouter* const router_;
  const boost::asio::any_io_executor long_bodies_;  // where requests with long bodies are routed
  Metrics* const metrics_;
  const int max_connections_;
  const bool report_connections_;
  std::atomic<bool> draining_{false};

  std::mutex mutex_;  // guards all below
  std::condition_variable gone_;
  std::unordered_set<std::shared_ptr<HttpConnection>> open_;
  int present_ = 0;
};

}  // namespace atp

#endif  // ATP_SERVER_HTTP_SESSIONS_H_
