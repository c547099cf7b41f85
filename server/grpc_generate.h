// Generate and GenerateStream as reactors of gRPC's callback API: no thread waits for an answer. Each
// function returns a reactor that owns itself until the call is done.
#ifndef ATP_SERVER_GRPC_GENERATE_H_
#define ATP_SERVER_GRPC_GENERATE_H_

#include "absl/time/time.h"
#include "server/grpc_call.h"

namespace grpc {
class ServerUnaryReactor;
template <class Response>
class ServerWriteReactor;
}  // namespace grpc

namespace atp {
namespace v1 {
class GenerateRequest;
class GenerateResponse;
class GenerateStreamResponse;
}  // namespace v1

grpc::ServerUnaryReactor* StartGenerate(GrpcFrontEnd front_end, grpc::CallbackServerContext* context,
                                        const v1::GenerateRequest& request, v1::GenerateResponse* response);

// A client that does not read is cut off: when server.write_timeout_ms passed without progress, or when 4 MiB
// wait.
grpc::ServerWriteReactor<v1::GenerateStreamResponse>* StartGenerateStream(
    GrpcFrontEnd front_end, grpc::CallbackServerContext* context, const v1::GenerateRequest& request);

}  // namespace atp

#endif  // ATP_SERVER_GRPC_GENERATE_H_
