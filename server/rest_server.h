// The OpenAI-style HTTP front end: a few I/O threads and one for metrics and probes, one strand per
// connection, no thread per stream.
#ifndef ATP_SERVER_REST_SERVER_H_
#define ATP_SERVER_REST_SERVER_H_

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/generate_service.h"
#include "server/metrics.h"

namespace atp {

class RestServer {
 public:
  // Binds server.http_port and server.metrics_port (only /metrics and /health*) and serves until Stop().
  // `service` may be null at first: all but /health/live and /metrics answer 503 until SetService().
  static absl::StatusOr<std::unique_ptr<RestServer>> Start(const Config& config, Metrics* metrics);
  virtual ~RestServer() = default;

  virtual void SetService(GenerateService* service) = 0;
  virtual int http_port() const = 0;
  virtual int metrics_port() const = 0;

  // Accepts nothing more, lets open answers finish for `grace`, then closes all.
  virtual void Stop(absl::Duration grace) = 0;
};

}  // namespace atp

#endif  // ATP_SERVER_REST_SERVER_H_
