// Between the wire messages of proto/atp/v1 and the transport-neutral types. Nothing here knows a call or a
// socket.
#ifndef ATP_SERVER_GRPC_CONVERT_H_
#define ATP_SERVER_GRPC_CONVERT_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/request.h"
#include "engine/tokenizer.h"
#include "server/generate_service.h"

namespace atp {
namespace v1 {
class Choice;
class GenerateRequest;
class ModelInfo;
class Usage;
}  // namespace v1

// InvalidArgument naming the field when there is no input. Values are checked later, by GenerateService.
absl::StatusOr<GenerateInput> FromProto(const v1::GenerateRequest& request, const SamplingParams& defaults);

// Appends a piece of an answer; choice->index is left alone. Returns about how many bytes the message grew
// by.
size_t AppendDelta(const OutputDelta& delta, const Tokenizer& tokenizer, v1::Choice* choice);

// OK for an answer that is whole (and fills in reason and stop string), else the status that ends the call:
// kDeadline DeadlineExceeded, kCancelled Cancelled, kShutdown Unavailable, kError Internal.
absl::Status ApplyFinish(const OutputFinish& finish, v1::Choice* choice);

// Adds one answer's usage to the call's: the prompt counts once, as the first answer found it in the prefix
// cache.
void AddUsage(const OutputFinish& finish, v1::Usage* usage);

void FillModelInfo(const ServedModel& model, v1::ModelInfo* info);

}  // namespace atp

#endif  // ATP_SERVER_GRPC_CONVERT_H_
