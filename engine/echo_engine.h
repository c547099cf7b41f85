// An engine without a model: every answer repeats its prompt's tokens, one per tick, over and over until
// max_tokens. Everything else is as in BatchingEngine — queue, limits, cancellation, deadlines, stop strings,
// drain — so that front ends can be tested alone.
#ifndef ATP_ENGINE_ECHO_ENGINE_H_
#define ATP_ENGINE_ECHO_ENGINE_H_

#include <algorithm>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/answer_stream.h"
#include "engine/engine.h"
#include "engine/request_queue.h"
#include "engine/tokenizer.h"

namespace atp {

struct EchoEngineOptions {
  absl::Duration tick = absl::ZeroDuration();  // between two tokens of an answer; zero: as fast as it goes
  int max_positions = 4096;                    // prompt and answer together
  int max_running_requests = 64;
  int max_waiting_requests = 1024;
};

class EchoEngine : public Engine {
 public:
  // `tokenizer` outlives the engine; null: answers are tokens without text.
  EchoEngine(const Tokenizer* tokenizer, const EchoEngineOptions& options);
  ~EchoEngine() override;

  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<OutputSink> sink) override;
  int MaxNewTokens(int prompt_tokens, const std::optional<CompressionOverride>&) override {
    return std::max(0, options_.max_positions - prompt_tokens);
  }
  void Cancel(RequestId id) override { queue_.Cancel(id); }
  absl::Status Drain(absl::Duration timeout) override { return queue_.Drain(timeout); }
  EngineStats Stats() const override;  // a KV cache it has none of
  absl::Duration RetryAfter() const override { return queue_.RetryAfter(); }

 private:
  struct Running {
    std::shared_ptr<ActiveRequest> active;
    std::vector<std::unique_ptr<AnswerStream>> answers;  // null when ended
    int max_new_tokens = 0;
  };

  void Run();
  void StartWaiting(absl::Time now);
  void Tick(absl::Time now);
  void AppendToken(Running* running, size_t index, absl::Time now);
  // Ends what is left of a request; it can be taken out then.
  void End(Running* running, FinishReason reason);
  void EndAnswer(Running* running, size_t index, FinishReason reason);
  template <typename Condition>
  void EndWhere(FinishReason reason, Condition condition);

  const Tokenizer* const tokenizer_;
  const EchoEngineOptions options_;
  RequestQueue queue_;
  std::list<Running> running_;
  std::list<Running> waiting_;  // oldest first
  std::thread thread_;          // last: it uses everything above
};

}  // namespace atp

#endif  // ATP_ENGINE_ECHO_ENGINE_H_
