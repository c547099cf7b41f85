#include "server/grpc_generate.h"

#include <grpcpp/alarm.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/time/clock.h"
#include "atp/v1/inference.pb.h"
#include "server/grpc_convert.h"

namespace atp {
namespace {

using v1::GenerateRequest;
using v1::GenerateResponse;
using v1::GenerateStreamResponse;

constexpr size_t kMaxMessageBytes = 64 << 10;  // pieces that wait are joined up to this size
constexpr size_t kMaxWaitingBytes = 4 << 20;   // of one stream; beyond, its client is too slow

absl::StatusOr<Submitted> Submit(const GrpcCall& call, const GenerateRequest& request, bool whole,
                                 std::shared_ptr<OutputSink> sink) {
  if (absl::Status s = call.Authorize(); !s.ok()) return s;
  absl::StatusOr<GenerateInput> input = FromProto(request, call.service().model().sampling);
  if (!input.ok()) return input.status();
  input->whole = whole;
  input->deadline = call.deadline();
  input->external_id = call.request_id();
  return call.service().Generate(*std::move(input), std::move(sink));
}

// gRPC reports a passed deadline of the client as a cancellation.
absl::Status CancellationOf(const GrpcCall& call) {
  if (absl::Now() >= call.deadline()) return absl::DeadlineExceededError("the call's deadline passed");
  return absl::CancelledError("the client cancelled the call or went away");
}

// Reactor and sink in one. gRPC holds it through `self_` until OnDone, the engine until the last OnFinish;
// whoever is later finds `finished_` set and touches nothing of the call.
class UnaryCall final : public grpc::ServerUnaryReactor, public OutputSink {
 public:
  static UnaryCall* Start(GrpcFrontEnd front_end, grpc::CallbackServerContext* context,
                          const GenerateRequest& request, GenerateResponse* response) {
    std::shared_ptr<UnaryCall> call(new UnaryCall(front_end, context, response));
    call->self_ = call;
    call->Begin(request);
    return call.get();
  }

  void OnDelta(OutputDelta delta) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (finished_) return;
    AppendDelta(delta, call_.service().tokenizer(), ChoiceOf(delta.index));
  }

  void OnFinish(OutputFinish finish) override {
    RequestId to_cancel = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (finished_) return;
      const absl::Status status = ApplyFinish(finish, ChoiceOf(finish.index));
      AddUsage(finish, response_->mutable_usage());
      --answers_left_;
      if (status.ok() && answers_left_ > 0) return;
      if (answers_left_ > 0) to_cancel = id_;
      FinishLocked(status);
    }
    if (to_cancel != 0) call_.service().Cancel(to_cancel);
  }

  void OnCancel() override {
    RequestId id = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      id = id_;
      if (!finished_) FinishLocked(CancellationOf(call_));
    }
    if (id != 0) call_.service().Cancel(id);
  }

  void OnDone() override {
    std::shared_ptr<UnaryCall> last = std::move(self_);  // may delete this at the end of the scope
  }

 private:
  UnaryCall(GrpcFrontEnd front_end, grpc::CallbackServerContext* context, GenerateResponse* response)
      : call_(front_end, "/atp.v1.Inference/Generate", context), response_(response) {}

  void Begin(const GenerateRequest& request) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      answers_left_ = request.sampling().has_n() ? request.sampling().n() : 1;
      response_->set_request_id(call_.request_id());
      response_->set_model(call_.service().model().id);
    }
    absl::StatusOr<Submitted> submitted = Submit(call_, request, /*whole=*/true, self_);
    std::lock_guard<std::mutex> lock(mutex_);
    if (submitted.ok()) {
      id_ = submitted->id;
    } else {
      FinishLocked(submitted.status());
    }
  }

  v1::Choice* ChoiceOf(int index) {
    while (response_->choices_size() <= index)
      response_->add_choices()->set_index(response_->choices_size() - 1);
    return response_->mutable_choices(index);
  }

  void FinishLocked(const absl::Status& status) {
    finished_ = true;
    Finish(call_.End(status));
  }

  std::shared_ptr<UnaryCall> self_;  // set before and cleared after every other use
  GrpcCall call_;
  std::mutex mutex_;            // guards all below, and must be held by …Locked() and ChoiceOf()
  GenerateResponse* response_;  // gRPC's; gone once finished_
  RequestId id_ = 0;
  int answers_left_ = 1;
  bool finished_ = false;
};

// As UnaryCall, with one write in flight at a time. What the engine says meanwhile waits in pieces_, joined
// per answer.
class StreamCall final : public grpc::ServerWriteReactor<GenerateStreamResponse>, public OutputSink {
 public:
  static StreamCall* Start(GrpcFrontEnd front_end, grpc::CallbackServerContext* context,
                           const GenerateRequest& request) {
    std::shared_ptr<StreamCall> call(new StreamCall(front_end, context));
    call->self_ = call;
    call->Begin(request);
    return call.get();
  }

  void OnDelta(OutputDelta delta) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (end_) return;
    Piece* piece = PieceFor(delta.index);
    const size_t bytes = AppendDelta(delta, call_.service().tokenizer(), piece->message.mutable_choice());
    piece->bytes += bytes;
    waiting_bytes_ += bytes;
    if (delta.is_prompt) prompt_bytes_ += bytes;  // comes at once, however fast the client reads
    CutOffSlowClientLocked();
    WriteNextLocked();
  }

  void OnFinish(OutputFinish finish) override {
    RequestId to_cancel = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (end_) return;
      Piece* piece = PieceFor(finish.index);
      const absl::Status status = ApplyFinish(finish, piece->message.mutable_choice());
      AddUsage(finish, &usage_);
      --answers_left_;
      if (!status.ok() && answers_left_ > 0) to_cancel = id_;
      // The last message is not always this answer's: what waited of another one may stand behind it.
      if (status.ok() && answers_left_ == 0) *pieces_.back().message.mutable_usage() = usage_;
      if (!status.ok() || answers_left_ == 0) EndLocked(status);
      WriteNextLocked();
    }
    if (to_cancel != 0) call_.service().Cancel(to_cancel);
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    write_in_flight_ = false;
    if (!ok) {  // the call is dead; OnCancel comes or came
      pieces_.clear();
      if (!end_) EndLocked(CancellationOf(call_));
    }
    last_write_ = absl::Now();
    WriteNextLocked();
  }

  void OnCancel() override {
    RequestId id = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      id = id_;
      pieces_.clear();
      if (!end_) EndLocked(CancellationOf(call_));
      WriteNextLocked();
    }
    if (id != 0) call_.service().Cancel(id);
  }

  void OnDone() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
      if (end_alarm_) end_alarm_->Cancel();
    }
    std::shared_ptr<StreamCall> last = std::move(self_);  // may delete this at the end of the scope
  }

 private:
  struct Piece {
    GenerateStreamResponse message;
    size_t bytes = 0;
  };

  StreamCall(GrpcFrontEnd front_end, grpc::CallbackServerContext* context)
      : call_(front_end, "/atp.v1.Inference/GenerateStream", context),
        context_(context),
        write_timeout_(absl::Milliseconds(front_end.service->config().server.write_timeout_ms)) {}

  void Begin(const GenerateRequest& request) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      answers_left_ = request.sampling().has_n() ? request.sampling().n() : 1;
    }
    absl::StatusOr<Submitted> submitted = Submit(call_, request, /*whole=*/false, self_);
    std::lock_guard<std::mutex> lock(mutex_);
    if (submitted.ok()) {
      id_ = submitted->id;
    } else {
      EndLocked(submitted.status());
      WriteNextLocked();
    }
  }

  Piece* PieceFor(int index) {
    for (auto piece = pieces_.rbegin(); piece != pieces_.rend(); ++piece) {
      if (piece->message.choice().index() != index) continue;
      if (piece->bytes >= kMaxMessageBytes) break;
      return &*piece;
    }
    Piece& piece = pieces_.emplace_back();
    piece.message.set_request_id(call_.request_id());
    piece.message.mutable_choice()->set_index(index);
    return &piece;
  }

  void EndLocked(const absl::Status& status) {
    end_ = status;
    last_write_ = absl::Now();
    ArmEndLocked(last_write_ + write_timeout_);
  }

  // The rest of the answer may be stuck behind a client that does not read: nothing else would ever end the
  // call. (Weak: an alarm keeps its callback for as long as it lives, and it lives here. Each time another
  // one: none can be set anew while it calls back.)
  void ArmEndLocked(absl::Time when) {
    end_alarm_.emplace();
    end_alarm_->Set(absl::ToChronoTime(when), [weak = std::weak_ptr(self_)](bool expired) {
      std::shared_ptr<StreamCall> self = expired ? weak.lock() : nullptr;
      if (self == nullptr) return;
      std::lock_guard<std::mutex> lock(self->mutex_);
      if (self->done_) return;
      const absl::Time limit = self->last_write_ + self->write_timeout_;
      if (absl::Now() < limit) return self->ArmEndLocked(limit);
      self->context_->TryCancel();
    });
  }

  void CutOffSlowClientLocked() {
    const bool is_stuck = write_in_flight_ && absl::Now() - write_start_ > write_timeout_;
    if (is_stuck || waiting_bytes_ > kMaxWaitingBytes + prompt_bytes_)
      context_->TryCancel();  // OnCancel does the rest
  }

  void WriteNextLocked() {
    if (write_in_flight_ || finished_) return;
    if (pieces_.empty()) {
      if (!end_) return;
      finished_ = true;
      Finish(call_.End(*end_));
      return;
    }
    waiting_bytes_ -= pieces_.front().bytes;
    writing_ = std::move(pieces_.front().message);
    pieces_.pop_front();
    if (end_ && pieces_.empty()) {
      finished_ = true;
      StartWriteAndFinish(&writing_, grpc::WriteOptions(), call_.End(*end_));
      return;
    }
    write_in_flight_ = true;
    write_start_ = absl::Now();
    StartWrite(&writing_);
  }

  std::shared_ptr<StreamCall> self_;  // set before and cleared after every other use
  GrpcCall call_;
  grpc::CallbackServerContext* context_;  // gRPC's; gone once done_
  const absl::Duration write_timeout_;
  std::mutex mutex_;  // guards all below, and must be held by …Locked() and PieceFor()
  std::deque<Piece> pieces_;
  size_t waiting_bytes_ = 0;
  size_t prompt_bytes_ = 0;         // of echoed prompts
  GenerateStreamResponse writing_;  // gRPC reads it until OnWriteDone
  bool write_in_flight_ = false;
  absl::Time write_start_;
  v1::Usage usage_;
  RequestId id_ = 0;
  int answers_left_ = 1;
  std::optional<absl::Status> end_;  // known: nothing more is taken from the engine
  bool finished_ = false;            // Finish() was called
  bool done_ = false;                // gRPC has forgotten the call
  absl::Time last_write_;            // when one was done, or the end was known
  std::optional<grpc::Alarm> end_alarm_;
};

}  // namespace

grpc::ServerUnaryReactor* StartGenerate(GrpcFrontEnd front_end, grpc::CallbackServerContext* context,
                                        const GenerateRequest& request, GenerateResponse* response) {
  return UnaryCall::Start(front_end, context, request, response);
}

grpc::ServerWriteReactor<GenerateStreamResponse>* StartGenerateStream(GrpcFrontEnd front_end,
                                                                      grpc::CallbackServerContext* context,
                                                                      const GenerateRequest& request) {
  return StreamCall::Start(front_end, context, request);
}

}  // namespace atp
