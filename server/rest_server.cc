#include "server/rest_server.h"

#include <algorithm>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/http_router.h"
#include "server/http_sessions.h"
#include "spdlog/spdlog.h"

namespace atp {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

// Probes and scrapes: a few at a time, however many clients the other port has.
constexpr int kMaxMetricsConnections = 64;
constexpr auto kAcceptPause = std::chrono::milliseconds(50);
// For handlers that already run; nothing waits for a peer any more.
constexpr absl::Duration kCloseTimeout = absl::Seconds(10);

// One listening port and its connections.
class Port {
 public:
  Port(asio::io_context* io, const asio::any_io_executor& long_bodies, const ServerConfig& config,
       Metrics* metrics, bool metrics_only)
      : io_(*io),
        router_(config, metrics, metrics_only),
        sessions_(config, &router_, long_bodies, metrics,
                  metrics_only ? kMaxMetricsConnections : config.max_connections, !metrics_only),
        acceptor_(asio::make_strand(*io)),
        pause_(acceptor_.get_executor()) {}

  absl::Status Listen(const std::string& host, int port, std::string_view key) {
    error_code error;
    const auto refuse = [&](std::string_view what) {
      return absl::UnavailableError(absl::StrCat("server.", absl::string_view(key.data(), key.size()),
                                                 ": cannot ", absl::string_view(what.data(), what.size()),
                                                 " ", host, ":", port, ": ", error.message(),
                                                 "; choose another port or host"));
    };
    tcp::resolver resolver(io_);
    const auto found = resolver.resolve(host, std::to_string(port), tcp::resolver::passive, error);
    if (error) return refuse("resolve");
    const tcp::endpoint endpoint = found.begin()->endpoint();
    acceptor_.open(endpoint.protocol(), error);
    if (error) return refuse("open a socket for");
    acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
    if (!error) acceptor_.bind(endpoint, error);
    if (error) return refuse("bind");
    acceptor_.listen(asio::socket_base::max_listen_connections, error);
    if (error) return refuse("listen on");
    port_ = acceptor_.local_endpoint(error).port();
    return absl::OkStatus();
  }

  void AcceptNext() {
    acceptor_.async_accept(asio::make_strand(io_), [this](error_code error, tcp::socket socket) {
      if (!acceptor_.is_open()) return;
      if (!error) {
        sessions_.Accept(std::move(socket));
        return AcceptNext();
      }
      // Out of file descriptors, mostly: connections that end will free some.
      spdlog::warn("http_accept_failed port={} error=\"{}\"", port_, error.message());
      pause_.expires_after(kAcceptPause);
      pause_.async_wait([this](error_code stopped) {
        if (!stopped && acceptor_.is_open()) AcceptNext();
      });
    });
  }

  void StopAccepting() {
    asio::post(acceptor_.get_executor(), [this] {
      error_code ignored;
      acceptor_.close(ignored);
      pause_.cancel();
    });
  }

  int port() const { return port_; }
  HttpRouter& router() { return router_; }
  HttpSessions& sessions() { return sessions_; }

 private:
  asio::io_context& io_;
  HttpRouter router_;
  HttpSessions sessions_;
  tcp::acceptor acceptor_;
  asio::steady_timer pause_;
  int port_ = 0;
};

class BeastRestServer final : public RestServer {
 public:
  BeastRestServer(const ServerConfig& config, Metrics* metrics)
      : io_(std::max(1, config.io_threads)),
        work_(io_.get_executor()),
        metrics_work_(metrics_io_.get_executor()),
        http_(&io_, long_bodies_.get_executor(), config, metrics, /*metrics_only=*/false),
        metrics_(&metrics_io_, metrics_io_.get_executor(), config, metrics, /*metrics_only=*/true) {}

  ~BeastRestServer() override { Stop(absl::ZeroDuration()); }

  absl::Status Listen(const ServerConfig& config) {
    if (absl::Status s = http_.Listen(config.host, config.http_port, "http_port"); !s.ok()) return s;
    if (absl::Status s = metrics_.Listen(config.host, config.metrics_port, "metrics_port"); !s.ok()) return s;
    http_.AcceptNext();
    metrics_.AcceptNext();
    for (int i = 0; i < std::max(1, config.io_threads); ++i) threads_.emplace_back([this] { io_.run(); });
    threads_.emplace_back([this] { metrics_io_.run(); });
    return absl::OkStatus();
  }

  void SetService(GenerateService* service) override {
    http_.router().SetService(service);
    metrics_.router().SetService(service);
  }
  int http_port() const override { return http_.port(); }
  int metrics_port() const override { return metrics_.port(); }

  void Stop(absl::Duration grace) override {
    if (threads_.empty()) return;
    const absl::Time end = absl::Now() + grace;
    for (Port* port : {&http_, &metrics_}) {
      port->StopAccepting();
      port->sessions().Drain();
    }
    for (Port* port : {&http_, &metrics_}) {
      port->sessions().WaitUntilGone(std::max(absl::ZeroDuration(), end - absl::Now()));
      port->sessions().CloseAll();
    }
    for (Port* port : {&http_, &metrics_}) port->sessions().WaitUntilGone(kCloseTimeout);
    long_bodies_.join();
    for (Port* port : {&http_, &metrics_}) port->sessions().WaitUntilGone(kCloseTimeout);
    work_.reset();
    metrics_work_.reset();
    io_.stop();
    metrics_io_.stop();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  // Probes have a thread of their own: a load on the other port must not get the process killed. So have
  // requests with long bodies, one at a time: what takes seconds (and, to tokenize, much memory) must not
  // hold up the streams of others.
  asio::io_context io_, metrics_io_{1};
  asio::thread_pool long_bodies_{1};
  asio::executor_work_guard<asio::io_context::executor_type> work_, metrics_work_;
  Port http_;
  Port metrics_;
  std::vector<std::thread> threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RestServer>> RestServer::Start(const Config& config, Metrics* metrics) {
  auto server = std::make_unique<BeastRestServer>(config.server, metrics);
  if (absl::Status s = server->Listen(config.server); !s.ok()) return s;
  return server;
}

}  // namespace atp
