#include "server/grpc_call.h"

#include <grpcpp/server_context.h>
#include <grpcpp/support/status.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace atp {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;

std::optional<std::string_view> Metadata(const grpc::CallbackServerContext& context, const char* key) {
  const auto found = context.client_metadata().find(key);
  if (found == context.client_metadata().end()) return std::nullopt;
  return std::string_view(found->second.data(), found->second.size());
}

// Ids go to logs and back to the client: anything but plain visible ASCII gets a fresh one instead.
bool IsGoodRequestId(std::string_view id) {
  return !id.empty() && id.size() <= kMaxRequestIdBytes &&
         std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c <= '~'; });
}

}  // namespace

GrpcCall::GrpcCall(GrpcFrontEnd front_end, const char* route, grpc::CallbackServerContext* context)
    : front_end_(front_end), route_(route), context_(context), start_(absl::Now()) {
  const std::optional<std::string_view> sent = Metadata(*context, "x-request-id");
  request_id_ = sent && IsGoodRequestId(*sent) ? std::string(*sent) : NewRequestId();
  context_->AddInitialMetadata("x-request-id", request_id_);
}

absl::Status GrpcCall::Authorize() const {
  constexpr std::string_view kScheme = "bearer ";
  std::string_view token;
  if (const std::optional<std::string_view> header = Metadata(*context_, "authorization");
      header && header->size() > kScheme.size() &&
      absl::EqualsIgnoreCase(absl::string_view(header->data(), kScheme.size()),
                             absl::string_view(kScheme.data(), kScheme.size()))) {
    token = header->substr(kScheme.size());
  }
  if (front_end_.service->Authorized(token)) return absl::OkStatus();
  return absl::UnauthenticatedError(
      "this server needs an API key: send the metadata 'authorization: Bearer KEY' with a valid one");
}

absl::Time GrpcCall::deadline() const {
  const std::chrono::system_clock::time_point deadline = context_->deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return absl::InfiniteFuture();
  return absl::FromChrono(deadline);
}

grpc::Status GrpcCall::End(const absl::Status& status) {
  const absl::Duration duration = absl::Now() - start_;
  if (status.code() == absl::StatusCode::kResourceExhausted) {
    const int64_t wait_ms = std::max<int64_t>(1, absl::ToInt64Milliseconds(front_end_.service->RetryAfter()));
    context_->AddTrailingMetadata("retry-after-ms", absl::StrCat(wait_ms));
  }
  const std::string code = absl::StatusCodeToString(
      absl::IsOutOfRange(status) ? absl::StatusCode::kInvalidArgument : status.code());
  front_end_.metrics->OnResponse("grpc", route_, code, duration);
  const bool is_our_fault = status.code() == absl::StatusCode::kInternal;
  spdlog::log(is_our_fault ? spdlog::level::err : spdlog::level::debug,
              "grpc route={} code={} request_id={} duration_ms={} message=\"{}\"", route_, code, request_id_,
              absl::ToInt64Milliseconds(duration), absl::CEscape(status.message()));
  if (status.ok()) return grpc::Status::OK;
  const bool invalid = absl::IsOutOfRange(status);  // REST tells the two apart
  return grpc::Status(
      invalid ? grpc::StatusCode::INVALID_ARGUMENT : static_cast<grpc::StatusCode>(status.code()),
      std::string(status.message()));
}

}  // namespace atp
