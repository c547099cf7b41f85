// From generated tokens to what one caller sees of one answer: text that never ends inside a character, stop
// strings found and held back, the pieces and the end handed to the request's sink. Used by one thread, the
// engine's.
#ifndef ATP_ENGINE_ANSWER_STREAM_H_
#define ATP_ENGINE_ANSWER_STREAM_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "engine/detokenizer.h"
#include "engine/engine.h"
#include "engine/request.h"
#include "engine/request_queue.h"
#include "engine/sampler.h"
#include "engine/stop_checker.h"
#include "engine/tokenizer.h"

namespace atp {

// A request in flight: what its answers have in common.
struct ActiveRequest {
  explicit ActiveRequest(Submission submission)
      : id(submission.id),
        request(std::move(submission.request)),
        sink(std::move(submission.sink)),
        submitted(submission.submitted),
        answers_left(request->sampling.n) {
    if (request->sampling.repetition_penalty == 1) return;
    prompt_tokens = request->prompt;
    std::sort(prompt_tokens.begin(), prompt_tokens.end());
    prompt_tokens.erase(std::unique(prompt_tokens.begin(), prompt_tokens.end()), prompt_tokens.end());
  }

  RequestId id;
  std::shared_ptr<const Request> request;
  std::vector<TokenId>
      prompt_tokens;  // of a request with a repetition penalty: each once, for every step asks
  std::shared_ptr<OutputSink> sink;
  absl::Time submitted;
  std::optional<absl::Time> started;      // first step of any of its answers
  std::optional<absl::Time> first_token;  // of any of its answers
  int answers_left;
  Usage usage;  // prompt once, completions of all answers that ended

  // What the observer is told, and the log, when the last answer has ended.
  RequestReport Report(FinishReason reason, absl::Time now) const;
};

// The line that every engine logs at the end of a request: at debug level, or as a warning where it ended
// with an error or at its deadline.
void LogFinished(const ActiveRequest& active, const RequestReport& report);

class AnswerStream {
 public:
  // `tokenizer` may be null: then there is no text, and tokens are delivered as they come.
  // `eos`: tokens that end an answer unless the request ignores them; outlives the stream.
  AnswerStream(const Tokenizer* tokenizer, std::span<const TokenId> eos,
               std::shared_ptr<ActiveRequest> active, int index, int max_new_tokens);

  ActiveRequest& active() const { return *active_; }
  const SamplingParams& sampling() const { return active_->request->sampling; }
  uint64_t seed() const { return *sampling().seed + static_cast<uint64_t>(index_); }
  // Tokens that must not be drawn next: those that would end the answer before min_tokens.
  std::span<const TokenId> forbidden() const;

  // Echo: sends the prompt. With log probabilities, they are given one by one first, for the tokens from the
  // second on.
  void SendPrompt();
  void AddPromptLogprob(TokenLogprob logprob) { prompt_logprobs_.push_back(std::move(logprob)); }

  // Takes a generated token and sends what became certain. The reason, when it was the answer's last: then
  // Finish.
  std::optional<FinishReason> Append(Sampled sampled, absl::Time now);

  // Sends the rest and the end. Returns true when it was the request's last answer. `usage`: all but prompt
  // and completion.
  bool Finish(FinishReason reason, std::string message, Usage usage = {});

  int completion_tokens() const { return completion_tokens_; }
  std::optional<absl::Time> last_token_time() const { return last_token_time_; }

 private:
  // A token whose text is not all sent yet.
  struct Held {
    Sampled sampled;
    size_t text_begin = 0;  // offsets in the answer's text
    size_t text_end = 0;
  };

  bool EndsAnswer(TokenId token) const;
  void HoldToken(Sampled sampled, size_t new_text_bytes);
  // Sends `text`, with the held tokens that may go along.
  enum class Release : uint8_t {
    kWhole,  // those whose whole text is out; a token that brought no text (the first bytes of a character, a
             // control token) goes with the text that follows it
    kStarted,  // those of whose text a part is out: a stop string cut the last one
    kAll,
  };
  void Send(std::string text, Release release);

  std::shared_ptr<ActiveRequest> active_;
  const Tokenizer* tokenizer_;
  const int index_;
  const int max_new_tokens_;
  std::optional<Detokenizer> detokenizer_;
  StopChecker stops_;
  std::vector<TokenId> forbidden_;
  std::span<const TokenId> eos_;

  std::vector<Held> held_;  // few: a queue that keeps its memory
  size_t text_bytes_ = 0;   // of the answer, as the stop checker got it
  size_t sent_bytes_ = 0;
  int completion_tokens_ = 0;
  std::string matched_stop_;
  bool text_is_complete_ = false;  // a stop string was found: what follows it is dropped
  std::vector<TokenLogprob> prompt_logprobs_;
  std::optional<absl::Time> last_token_time_;
};

}  // namespace atp

#endif  // ATP_ENGINE_ANSWER_STREAM_H_
