// Any bytes as a GenerateRequest of proto/atp/v1: refused by a status that a client can act on, or submitted
// with every value in the range that the engine may rely on.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "atp/v1/inference.pb.h"
#include "engine/compression_plans.h"
#include "engine/engine.h"
#include "engine/sampler.h"
#include "server/generate_service.h"
#include "server/grpc_convert.h"
#include "tests/server/byte_tokenizer.h"

namespace atp {
namespace {

constexpr int kContext = 512;

void Require(bool condition) {
  if (!condition) std::abort();
}

// Takes every request, after a look at it.
class CheckingEngine final : public Engine {
 public:
  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<OutputSink>) override {
    Require(!request.prompt.empty() && request.prompt.size() <= kContext);
    for (const TokenId id : request.prompt) Require(id >= 0 && id < testing::ByteTokenizer::kVocabSize);
    const SamplingParams& sampling = request.sampling;
    Require(ValidateSampling(sampling, testing::ByteTokenizer::kVocabSize).ok());
    Require(std::isfinite(sampling.temperature) && sampling.max_tokens >= 0 && sampling.n >= 1);
    Require(!request.compression || ValidateOverride(*request.compression).ok());
    return ++last_;
  }
  int MaxNewTokens(int prompt_tokens, const std::optional<CompressionOverride>&) override {
    return kContext - prompt_tokens;
  }
  void Cancel(RequestId) override {}
  absl::Status Drain(absl::Duration) override { return absl::OkStatus(); }
  EngineStats Stats() const override { return {}; }
  absl::Duration RetryAfter() const override { return absl::Seconds(1); }

 private:
  RequestId last_ = 0;
};

void CheckError(const absl::Status& status) {
  Require(absl::IsInvalidArgument(status) || absl::IsNotFound(status) || absl::IsOutOfRange(status));
  Require(status.message().find(':') != absl::string_view::npos && status.message().size() < 2000);
}

}  // namespace
}  // namespace atp

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace atp;  // NOLINT(google-build-using-namespace)
  static CheckingEngine engine;
  static const testing::ByteTokenizer tokenizer;
  static GenerateService service(
      &engine, &tokenizer, *ChatTemplate::Create("chatml"),
      {.id = "m", .max_context_tokens = kContext, .vocab_size = testing::ByteTokenizer::kVocabSize},
      Config());
  v1::GenerateRequest request;
  if (size > std::numeric_limits<int>::max() || !request.ParseFromArray(data, static_cast<int>(size)))
    return 0;
  absl::StatusOr<GenerateInput> input = FromProto(request, SamplingParams());
  if (!input.ok()) return CheckError(input.status()), 0;
  const absl::StatusOr<Submitted> submitted = service.Generate(*std::move(input), nullptr);
  if (!submitted.ok()) return CheckError(submitted.status()), 0;
  Require(submitted->prompt_tokens > 0 && submitted->prompt_tokens <= kContext);
  return 0;
}
