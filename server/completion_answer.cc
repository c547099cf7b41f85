#include "server/completion_answer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "server/sse_writer.h"

namespace atp {
namespace {

// Of one stream, not yet written, beside its prompts. The write time limit ends a slow client long before;
// this bound holds whatever the limits and the model's pace.
constexpr size_t kMaxPendingBytes = 4 << 20;

// What an end other than stop and length means to an HTTP client.
absl::Status FailureOf(const OutputFinish& finish) {
  switch (finish.reason) {
    case FinishReason::kStop:
    case FinishReason::kLength:
      return absl::OkStatus();
    case FinishReason::kDeadline:
      return absl::DeadlineExceededError("the deadline passed before the answer was whole");
    case FinishReason::kCancelled:
      return absl::CancelledError("the request was cancelled");
    case FinishReason::kShutdown:
      return absl::UnavailableError(finish.message.empty() ? "the server is shutting down" : finish.message);
    case FinishReason::kError:
      return absl::InternalError(finish.message.empty() ? "the engine failed" : finish.message);
  }
  return absl::InternalError("unknown end of a request");
}

size_t SizeOf(const OutputDelta& delta) {
  size_t size = delta.text.size();
  for (const TokenLogprob& item : delta.logprobs)
    size += sizeof(item) + item.top.size() * sizeof(item.top[0]);
  return size;
}

std::string RetryAfterSeconds(const GenerateService& service) {
  return absl::StrCat(
      std::max<int64_t>(1, absl::ToInt64Seconds(absl::Ceil(service.RetryAfter(), absl::Seconds(1)))));
}

std::string_view MessageOf(const absl::Status& status) {
  return {status.message().data(), status.message().size()};
}

}  // namespace

class CompletionAnswer::PromptSink final : public OutputSink {
 public:
  PromptSink(std::shared_ptr<CompletionAnswer> answer, int prompt)
      : answer_(std::move(answer)), prompt_(prompt) {}
  void OnDelta(OutputDelta delta) override { answer_->OnDelta(prompt_, std::move(delta)); }
  void OnFinish(OutputFinish finish) override { answer_->OnFinish(prompt_, std::move(finish)); }

 private:
  std::shared_ptr<CompletionAnswer> answer_;
  int prompt_;
};

CompletionAnswer::CompletionAnswer(GenerateService* service, const CompletionCall& call,
                                   std::function<void()> wake)
    : service_(service), wake_(std::move(wake)), stream_(call.stream), answers_per_prompt_(call.sampling.n) {
  // A random id of its own: x-request-id is the client's and need not be unique.
  const std::string unique = NewRequestId();
  header_.chat = call.chat;
  header_.include_usage = call.include_usage;
  header_.with_logprobs = call.sampling.logprobs.has_value();
  header_.top_logprobs = call.sampling.logprobs.value_or(0);
  header_.id = absl::StrCat(call.chat ? "chatcmpl-" : "cmpl-", unique.substr(unique.find('-') + 1));
  header_.created_unix_seconds = absl::ToUnixSeconds(absl::Now());
  header_.model = service->model().id;
  choices_.assign(call.prompts.size() * call.sampling.n,
                  Choice(TextPosition(&service->tokenizer(), call.echo)));
  for (size_t i = 0; i < choices_.size(); ++i) choices_[i].pending.index = static_cast<int>(i);
  unfinished_ = choices_.size();
}

absl::StatusOr<std::shared_ptr<CompletionAnswer>> CompletionAnswer::Start(GenerateService* service,
                                                                          CompletionCall call,
                                                                          const std::string& request_id,
                                                                          absl::Time deadline,
                                                                          std::function<void()> wake) {
  std::shared_ptr<CompletionAnswer> answer(new CompletionAnswer(service, call, std::move(wake)));
  if (absl::Status s = answer->Submit(std::move(call), request_id, deadline); !s.ok()) {
    answer->Abandon();  // those that were accepted before the one that was not
    return s;
  }
  return answer;
}

absl::Status CompletionAnswer::Submit(CompletionCall call, const std::string& request_id,
                                      absl::Time deadline) {
  // More would be told to try again for ever.
  const int most = service_->config().scheduler.max_waiting_requests;
  if (call.prompts.size() > static_cast<size_t>(most)) {
    return absl::InvalidArgumentError(absl::StrCat("prompt: ", call.prompts.size(),
                                                   " prompts are more than the ", most,
                                                   " that may wait (scheduler.max_waiting_requests)"));
  }
  int64_t scored = 0, kept = 0;
  for (size_t i = 0; i < call.prompts.size(); ++i) {
    GenerateInput input;
    input.model = call.model;
    input.prompt = std::move(call.prompts[i]);
    input.sampling = call.sampling;
    input.max_tokens_given = call.max_tokens_given;
    input.add_generation_prompt = call.add_generation_prompt;
    input.echo = call.echo;
    input.whole = !call.stream;
    input.compression = call.compression;
    input.priority = call.priority;
    input.deadline = deadline;
    input.external_id = request_id;
    absl::StatusOr<Submitted> submitted = service_->Generate(
        std::move(input), std::make_shared<PromptSink>(shared_from_this(), static_cast<int>(i)));
    if (!submitted.ok()) return submitted.status();
    ids_.push_back(submitted->id);
    scored += submitted->scored;
    kept += submitted->kept;
    if (absl::Status s = GenerateService::CheckScored(scored, kept); !s.ok()) return s;
  }
  return absl::OkStatus();
}

void CompletionAnswer::MarkDirty(int index) {
  if (std::exchange(choices_[index].dirty, true)) return;
  dirty_.push_back(index);
}

bool CompletionAnswer::TooManyPending() const { return pending_bytes_ > kMaxPendingBytes + prompt_bytes_; }

void CompletionAnswer::OnDelta(int prompt, OutputDelta delta) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const int index = prompt * answers_per_prompt_ + delta.index;
    if (!TooManyPending() || !stream_) {  // else the stream is lost, and keeps nothing more
      pending_bytes_ += SizeOf(delta);
      if (delta.is_prompt) prompt_bytes_ += SizeOf(delta);
      ChoicePiece& pending = choices_[index].pending;
      pending.text += delta.text;
      std::move(delta.logprobs.begin(), delta.logprobs.end(), std::back_inserter(pending.logprobs));
    }
    MarkDirty(index);
  }
  if (stream_) wake_();
}

void CompletionAnswer::OnFinish(int prompt, OutputFinish finish) {
  bool tell = stream_;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const int index = prompt * answers_per_prompt_ + finish.index;
    choices_[index].pending.finish = finish.reason;
    if (failure_.ok()) failure_ = FailureOf(finish);
    if (finish.index == 0) {  // the answers of a prompt share it
      usage_.prompt_tokens += finish.usage.prompt_tokens;
      usage_.cached_tokens += finish.usage.cached_tokens;
    }
    usage_.completion_tokens += finish.usage.completion_tokens;
    AddCompression(finish.usage.atp, &usage_.atp);
    --unfinished_;
    MarkDirty(index);
    tell |= unfinished_ == 0 || !failure_.ok();
  }
  if (tell) wake_();
}

void CompletionAnswer::Abandon() {
  done_ = true;
  for (RequestId id : ids_) service_->Cancel(id);
}

AnswerPiece CompletionAnswer::Next() {
  if (done_) return {};
  if (stream_) return NextOfStream();
  absl::Status failure;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    failure = failure_;
    if (failure.ok() && unfinished_ > 0) return {};
  }
  return failure.ok() ? Whole() : Failure(failure, {});
}

// The first failure of any choice is the answer's; what still runs for it is of no use to anybody.
AnswerPiece CompletionAnswer::Failure(const absl::Status& failure, std::string unsent) {
  AnswerPiece piece;
  const int status = HttpStatusOf(failure);
  const std::string error = RenderError(status, MessageOf(failure));
  if (streaming_) {
    piece.kind = AnswerPiece::kBroken;
    piece.chunk = std::move(unsent);
    AppendSseEvent(error, &piece.chunk);
  } else {
    piece.kind = AnswerPiece::kWhole;
    piece.response.status = status;
    piece.response.body = error;
    if (status == 503) piece.response.headers.emplace_back("Retry-After", RetryAfterSeconds(*service_));
    // OpenAI's clients would have all of it computed again.
    if (status == 504) piece.response.headers.emplace_back("x-should-retry", "false");
  }
  Abandon();
  return piece;
}

// All is finished: the engine touches nothing any more.
AnswerPiece CompletionAnswer::Whole() {
  AnswerPiece piece;
  std::vector<ChoicePiece> pieces;
  std::vector<TextPosition> positions;
  for (Choice& choice : choices_) {
    pieces.push_back(std::move(choice.pending));
    positions.push_back(choice.position);
  }
  piece.kind = AnswerPiece::kWhole;
  piece.response.body = RenderAnswer(header_, pieces, usage_, service_->tokenizer(), std::move(positions));
  done_ = true;
  return piece;
}

AnswerPiece CompletionAnswer::NextOfStream() {
  AnswerPiece piece;
  std::vector<ChoicePiece> pieces;
  absl::Status failure;
  bool ended = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (TooManyPending()) {
      piece.kind = AnswerPiece::kTooSlow;
      return piece;
    }
    for (int index : dirty_) {
      Choice& choice = choices_[index];
      choice.dirty = false;
      ChoicePiece rest;
      rest.index = index;
      pieces.push_back(std::exchange(choice.pending, std::move(rest)));
    }
    dirty_.clear();
    pending_bytes_ = 0;
    failure = failure_;
    ended = unfinished_ == 0;
  }
  for (ChoicePiece& part : pieces) {
    const bool last = ended && !header_.include_usage && &part == &pieces.back();
    RenderPiece(std::move(part), last ? &usage_.atp : nullptr, &piece.chunk);
  }
  if (!failure.ok()) return Failure(failure, std::move(piece.chunk));
  if (ended) {
    if (header_.include_usage) AppendSseEvent(RenderUsageChunk(header_, usage_), &piece.chunk);
    AppendSseDone(&piece.chunk);
    done_ = true;
  }
  if (piece.chunk.empty()) return piece;
  streaming_ = true;
  piece.kind = ended ? AnswerPiece::kEnd : AnswerPiece::kStream;
  return piece;
}

void CompletionAnswer::RenderPiece(ChoicePiece piece, const CompressionUsage* last, std::string* stream) {
  const Tokenizer& tokenizer = service_->tokenizer();
  Choice& choice = choices_[piece.index];  // `begun` and `position` are the strand's alone
  if (header_.chat && !std::exchange(choice.begun, true)) {
    AppendSseEvent(RenderRoleChunk(header_, piece.index), stream);
  }
  const std::optional<FinishReason> finish = std::exchange(piece.finish, std::nullopt);
  if (!piece.text.empty() || !piece.logprobs.empty()) {
    AppendSseEvent(RenderChunk(header_, piece, tokenizer, &choice.position), stream);
  }
  if (finish && (*finish == FinishReason::kStop || *finish == FinishReason::kLength)) {
    ChoicePiece end;
    end.index = piece.index;
    end.finish = finish;
    AppendSseEvent(RenderChunk(header_, end, tokenizer, &choice.position, last), stream);
  }
}

}  // namespace atp
