#include "engine/echo_engine.h"

#include <pthread.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/sampler.h"

namespace atp {

EchoEngine::EchoEngine(const Tokenizer* tokenizer, const EchoEngineOptions& options)
    : tokenizer_(tokenizer),
      options_(options),
      queue_(options.max_waiting_requests),
      thread_([this] { Run(); }) {}

EchoEngine::~EchoEngine() {
  queue_.Stop();
  thread_.join();
}

absl::StatusOr<RequestId> EchoEngine::Submit(Request request, std::shared_ptr<OutputSink> sink) {
  const int vocab_size = tokenizer_ != nullptr ? tokenizer_->vocab_size() : std::numeric_limits<int>::max();
  if (absl::Status s = ValidateSampling(request.sampling, vocab_size); !s.ok()) return s;
  if (request.prompt.empty())
    return absl::InvalidArgumentError("prompt: it has no tokens; give it one at least");
  if (request.prompt.size() >= static_cast<size_t>(options_.max_positions)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the prompt has ", request.prompt.size(), " tokens, but there are ", options_.max_positions,
        " positions: a prompt can have at most ", options_.max_positions - 1, " tokens"));
  }
  if (!request.sampling.seed) request.sampling.seed = 0;  // nothing is drawn
  return queue_.Push(std::move(request), std::move(sink));
}

EngineStats EchoEngine::Stats() const {
  EngineStats stats;
  stats.requests_waiting = queue_.waiting();
  stats.requests_running = std::max(0, queue_.active() - stats.requests_waiting);
  stats.kv_tokens_capacity = options_.max_positions;
  return stats;
}

void EchoEngine::Run() {
  pthread_setname_np(pthread_self(), "atp-engine");
  RequestQueue::Intake intake;
  absl::Time next_tick = absl::InfinitePast();
  while (true) {
    const bool idle = running_.empty() && waiting_.empty();
    queue_.Take(/*wait=*/idle || absl::Now() < next_tick, idle ? absl::InfiniteFuture() : next_tick, &intake);
    for (Submission& submission : intake.submissions) {
      waiting_.push_back({std::make_shared<ActiveRequest>(std::move(submission)), {}, 0});
    }
    for (RequestId id : intake.cancels) {
      EndWhere(FinishReason::kCancelled, [id](const Running& r) { return r.active->id == id; });
    }
    if (intake.end_all) EndWhere(FinishReason::kShutdown, [](const Running&) { return true; });
    if (intake.stop) return;
    const absl::Time now = absl::Now();
    EndWhere(FinishReason::kDeadline, [now](const Running& r) { return r.active->request->deadline <= now; });
    StartWaiting(now);
    if (now < next_tick) continue;
    Tick(now);
    next_tick = now + options_.tick;
  }
}

void EchoEngine::StartWaiting(absl::Time now) {
  while (!waiting_.empty() && running_.size() < static_cast<size_t>(options_.max_running_requests)) {
    running_.splice(running_.end(), waiting_, waiting_.begin());
    Running& running = running_.back();
    const Request& request = *running.active->request;
    running.active->started = now;
    queue_.NoteStarted();
    running.max_new_tokens = std::min(request.sampling.max_tokens,
                                      options_.max_positions - static_cast<int>(request.prompt.size()));
    for (int i = 0; i < request.sampling.n; ++i) {
      running.answers.push_back(std::make_unique<AnswerStream>(tokenizer_, std::span<const TokenId>(),
                                                               running.active, i, running.max_new_tokens));
      if (!request.echo_prompt) continue;
      for (size_t t = 1; request.sampling.logprobs && t < request.prompt.size(); ++t) {
        running.answers.back()->AddPromptLogprob({request.prompt[t], 0.0f, {}});
      }
      running.answers.back()->SendPrompt();
    }
  }
}

void EchoEngine::Tick(absl::Time now) {
  for (auto it = running_.begin(); it != running_.end();) {
    for (size_t i = 0; i < it->answers.size(); ++i) {
      if (it->answers[i] != nullptr) AppendToken(&*it, i, now);
    }
    it = it->active->answers_left == 0 ? running_.erase(it) : std::next(it);
  }
}

void EchoEngine::AppendToken(Running* running, size_t index, absl::Time now) {
  if (running->max_new_tokens == 0) return EndAnswer(running, index, FinishReason::kLength);
  AnswerStream& answer = *running->answers[index];
  const std::vector<TokenId>& prompt = running->active->request->prompt;
  Sampled sampled;
  sampled.token = prompt[static_cast<size_t>(answer.completion_tokens()) % prompt.size()];
  if (answer.sampling().logprobs) sampled.logprob = TokenLogprob{sampled.token, 0.0f, {}};  // it is certain
  const std::optional<FinishReason> end = answer.Append(std::move(sampled), now);
  if (end) EndAnswer(running, index, *end);
}

void EchoEngine::EndAnswer(Running* running, size_t index, FinishReason reason) {
  const std::unique_ptr<AnswerStream> answer = std::move(running->answers[index]);
  const bool last = answer->Finish(reason, reason == FinishReason::kShutdown ? "the server shut down" : "");
  if (!last) return;
  LogFinished(*running->active, running->active->Report(reason, absl::Now()));
  queue_.NoteEnded(running->active->started.has_value());
}

void EchoEngine::End(Running* running, FinishReason reason) {
  if (running->answers.empty()) {  // it was waiting
    for (int i = 0; i < running->active->request->sampling.n; ++i) {
      running->answers.push_back(
          std::make_unique<AnswerStream>(tokenizer_, std::span<const TokenId>(), running->active, i, 0));
    }
  }
  for (size_t i = 0; i < running->answers.size(); ++i) {
    if (running->answers[i] != nullptr) EndAnswer(running, i, reason);
  }
}

template <typename Condition>
void EchoEngine::EndWhere(FinishReason reason, Condition condition) {
  for (std::list<Running>* list : {&running_, &waiting_}) {
    for (auto it = list->begin(); it != list->end();) {
      if (!condition(*it)) {
        ++it;
        continue;
      }
      End(&*it, reason);
      it = list->erase(it);
    }
  }
}

}  // namespace atp
