// The answer to /v1/completions and /v1/chat/completions, whole or as a stream: gathers what the engine says
// about every prompt and choice, and renders it when the connection asks.
//
// The engine's thread only appends under a short lock; JSON is rendered on the connection's strand.
#ifndef ATP_SERVER_COMPLETION_ANSWER_H_
#define ATP_SERVER_COMPLETION_ANSWER_H_

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/generate_service.h"
#include "server/http_message.h"
#include "server/openai_json.h"

namespace atp {

class CompletionAnswer final : public PendingAnswer, public std::enable_shared_from_this<CompletionAnswer> {
 public:
  // Submits one generation per prompt, all or none. `wake` is called from any thread when Next() has
  // something; it must be cheap and may outlive the connection. `service` outlives the connection.
  static absl::StatusOr<std::shared_ptr<CompletionAnswer>> Start(GenerateService* service,
                                                                 CompletionCall call,
                                                                 const std::string& request_id,
                                                                 absl::Time deadline,
                                                                 std::function<void()> wake);

  AnswerPiece Next() override;
  void Abandon() override;

 private:
  class PromptSink;

  struct Choice {
    explicit Choice(TextPosition start) : position(std::move(start)) {}

    ChoicePiece pending;  // not rendered yet
    bool dirty = false;   // in dirty_
    bool begun = false;   // the role chunk is out
    TextPosition position;
  };

  CompletionAnswer(GenerateService* service, const CompletionCall& call, std::function<void()> wake);
  absl::Status Submit(CompletionCall call, const std::string& request_id, absl::Time deadline);
  void OnDelta(int prompt, OutputDelta delta);
  void OnFinish(int prompt, OutputFinish finish);
  bool TooManyPending() const;  // this and the next with mutex_ held
  void MarkDirty(int index);
  AnswerPiece Failure(const absl::Status& failure, std::string unsent);
  // last: what the stream's last chunk says besides; null: another one is.
  void RenderPiece(ChoicePiece piece, const CompressionUsage* last, std::string* stream);
  AnswerPiece NextOfStream();
  AnswerPiece Whole();

  GenerateService* service_;
  const std::function<void()> wake_;
  const bool stream_;
  const int answers_per_prompt_;
  AnswerHeader header_;
  std::vector<RequestId> ids_;  // strand only
  bool streaming_ = false;      // strand only: something is out already
  bool done_ = false;           // strand only

  std::mutex mutex_;  // guards all below
  std::vector<Choice> choices_;
  std::vector<int> dirty_;  // choices with something pending
  size_t unfinished_ = 0;
  size_t pending_bytes_ = 0;
  size_t prompt_bytes_ = 0;  // of echoed prompts: they come at once, however fast the client reads
  absl::Status failure_;
  Usage usage_;
};

}  // namespace atp

#endif  // ATP_SERVER_COMPLETION_ANSWER_H_
