// What every gRPC call begins and ends with: API key, request id, deadline, status, retry hint, metrics, log
// line.
#ifndef ATP_SERVER_GRPC_CALL_H_
#define ATP_SERVER_GRPC_CALL_H_

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/generate_service.h"
#include "server/metrics.h"

namespace grpc {
class CallbackServerContext;
class Status;
}  // namespace grpc

namespace atp {

// What the reactors need of the server. Both outlive every call.
struct GrpcFrontEnd {
  GenerateService* service = nullptr;
  Metrics* metrics = nullptr;
};

class GrpcCall {
 public:
  // `route` is a literal. Takes x-request-id over, or makes one, and sets it as initial metadata.
  GrpcCall(GrpcFrontEnd front_end, const char* route, grpc::CallbackServerContext* context);

  absl::Status Authorize() const;  // Unauthenticated without a valid `authorization: Bearer KEY`
  absl::Time deadline() const;     // the client's; infinite when it set none
  const std::string& request_id() const { return request_id_; }
  GenerateService& service() const { return *front_end_.service; }

  // Call exactly once, immediately before Finish().
  grpc::Status End(const absl::Status& status);

 private:
  GrpcFrontEnd front_end_;
  const char* route_;
  grpc::CallbackServerContext* context_;
  absl::Time start_;
  std::string request_id_;
};

}  // namespace atp

#endif  // ATP_SERVER_GRPC_CALL_H_
