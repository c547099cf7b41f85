// The gRPC front end: callback API, health service, reflection. No thread per stream.
#ifndef ATP_SERVER_GRPC_SERVER_H_
#define ATP_SERVER_GRPC_SERVER_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/generate_service.h"
#include "server/metrics.h"

namespace atp {

class GrpcServer {
 public:
  // Unavailable where Start would fail for its port, to be asked before a long load of a model.
  static absl::Status CheckPort(const ServerConfig& config);
  // Binds server.grpc_port and serves. `service` and `metrics` outlive the server.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(const Config& config, GenerateService* service,
                                                           Metrics* metrics);
  virtual ~GrpcServer() = default;

  virtual int port() const = 0;
  // grpc.health.v1: SERVING or NOT_SERVING, for "" and "atp.v1.Inference".
  virtual void SetServing(bool serving) = 0;
  // Accepts nothing more and tells clients to connect elsewhere (GOAWAY), at once; open calls go on. A call
  // that was on its way meanwhile ends with CANCELLED.
  virtual void StartDrain() = 0;
  // The same, where it was not done yet; lets open calls finish for `grace`, then cancels them.
  virtual void Stop(absl::Duration grace) = 0;
};

}  // namespace atp

#endif  // ATP_SERVER_GRPC_SERVER_H_
