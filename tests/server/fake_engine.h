// An engine without model or cache for tests of front ends: every step gives every live request one token,
// "a", "b", …. Obeys the contract of engine/engine.h (one thread calls the sinks; cancel, deadline, drain,
// bounded number).
#ifndef ATP_TESTS_SERVER_FAKE_ENGINE_H_
#define ATP_TESTS_SERVER_FAKE_ENGINE_H_

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "engine/engine.h"

namespace atp::testing {

class FakeEngine final : public Engine {
 public:
  struct Options {
    int max_requests = 1024;                      // beyond: ResourceExhausted
    absl::Status refusal;                         // not OK: of every Submit
    bool hold = false;                            // no tokens until Release()
    std::string token_text;                       // of every token, instead of letters
    FinishReason reason = FinishReason::kLength;  // how answers end after max_tokens
    int64_t kv_tokens_capacity = 1 << 20;
    bool scores_prompts = false;  // log probabilities of echoed prompts, in one piece, before the answer
  };

  FakeEngine() : FakeEngine(Options()) {}
  explicit FakeEngine(Options options) : options_(std::move(options)), thread_([this] { Run(); }) {}
  ~FakeEngine() override {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      stop_ = true;
    }
    thread_.join();
  }

  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<OutputSink> sink) override {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!options_.refusal.ok()) return options_.refusal;
    if (draining_) return absl::UnavailableError("draining");
    if (static_cast<int>(live_.size()) >= options_.max_requests) {
      return absl::ResourceExhaustedError("the queue is full");
    }
    last_request_ = request;
    const RequestId id = ++last_id_;
    live_[id] = Live{std::move(request), std::move(sink), 0, false};
    changed_.notify_all();
    return id;
  }

  int MaxNewTokens(int prompt_tokens, const std::optional<CompressionOverride>&) override {
    return static_cast<int>(options_.kv_tokens_capacity) - prompt_tokens;
  }

  void Cancel(RequestId id) override {
    std::unique_lock<std::mutex> lock(mutex_);
    ++cancels_;
    if (auto found = live_.find(id); found != live_.end()) found->second.cancelled = true;
  }

  absl::Status Drain(absl::Duration timeout) override {
    std::unique_lock<std::mutex> lock(mutex_);
    draining_ = true;
    if (changed_.wait_for(lock, absl::ToChronoMilliseconds(std::min(timeout, absl::Hours(24))),
                          [this] { return live_.empty(); })) {
      return absl::OkStatus();
    }
    shutdown_ = true;
    changed_.wait(lock, [this] { return live_.empty(); });
    return absl::DeadlineExceededError("some requests were ended");
  }

  EngineStats Stats() const override {
    std::unique_lock<std::mutex> lock(mutex_);
    EngineStats stats;
    stats.requests_running = static_cast<int>(live_.size());
    stats.kv_blocks_total = 100;
    stats.kv_blocks_used = static_cast<int64_t>(live_.size());
    stats.kv_tokens_capacity = options_.kv_tokens_capacity;
    stats.preemptions_total = 3;
    stats.prefix_cache_queries_tokens_total = 40;
    stats.prefix_cache_hits_tokens_total = 10;
    stats.kv_exact_entries = 640;
    stats.kv_principal_entries = 96;
    stats.kv_principal_blocks = 6;
    stats.kv_tokens_compressed = 128;
    stats.kv_bytes_saved = 4096;
    stats.tokens_compressed_total = 256;
    return stats;
  }

  absl::Duration RetryAfter() const override { return absl::Milliseconds(1500); }

  void Release() {
    std::unique_lock<std::mutex> lock(mutex_);
    options_.hold = false;
  }
  // Whether `count` requests live before a minute is over (a minute: only a broken server takes so long).
  bool AwaitLive(int count) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::minutes(1),
                             [&] { return static_cast<int>(live_.size()) == count; });
  }
  Request last_request() {
    std::unique_lock<std::mutex> lock(mutex_);
    return last_request_;
  }
  int cancels() {
    std::unique_lock<std::mutex> lock(mutex_);
    return cancels_;
  }

 private:
  struct Live {
    Request request;
    std::shared_ptr<OutputSink> sink;
    int generated = 0;
    bool cancelled = false;
  };

  void Run() {
    while (true) {
      std::vector<std::pair<RequestId, Live>> batch;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        if (stop_) return;
        batch.assign(live_.begin(), live_.end());
      }
      for (auto& entry : batch) Step(entry.first, entry.second);
      absl::SleepFor(absl::Milliseconds(1));
    }
  }

  void Step(RequestId id,
            Live& live) {  // a copy: sinks are called without the lock, for they may call Cancel
    bool hold = false;
    bool shutdown = false;
    std::string text;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      hold = options_.hold;
      shutdown = shutdown_;
      text = options_.token_text;
      live.cancelled = live_[id].cancelled;
    }
    if (shutdown) return End(id, live, FinishReason::kShutdown);
    if (live.cancelled) return End(id, live, FinishReason::kCancelled);
    if (absl::Now() >= live.request.deadline) return End(id, live, FinishReason::kDeadline);
    if (hold) return;
    const SamplingParams& sampling = live.request.sampling;
    if (options_.scores_prompts && live.generated == 0 && live.request.echo_prompt) {
      OutputDelta prompt;
      prompt.is_prompt = true;
      prompt.text = "(prompt)";
      for (TokenId token : live.request.prompt) prompt.logprobs.push_back({token, -0.5f, {}});
      live.sink->OnDelta(std::move(prompt));
    }
    if (live.generated < sampling.max_tokens) {
      for (int index = 0; index < sampling.n; ++index) {
        OutputDelta delta;
        delta.index = index;
        const char letter = static_cast<char>('a' + live.generated % 26);
        delta.text = text.empty() ? std::string(1, letter) : text;
        delta.tokens = {letter};
        if (sampling.logprobs)
          delta.logprobs = {TokenLogprob{letter, -0.5f, {{letter, -0.5f}, {'!', -2.0f}}}};
        live.sink->OnDelta(std::move(delta));
      }
      ++live.generated;
    }
    if (live.generated >= sampling.max_tokens) return End(id, live, options_.reason);
    std::unique_lock<std::mutex> lock(mutex_);
    live_[id].generated = live.generated;
  }

  void End(RequestId id, const Live& live, FinishReason reason) {
    for (int index = 0; index < live.request.sampling.n; ++index) {
      OutputFinish finish;
      finish.index = index;
      finish.reason = reason;
      finish.usage = {static_cast<int>(live.request.prompt.size()), live.generated, index == 0 ? 2 : 4};
      finish.usage.atp = {"balanced", 0.5, 4, 100, 64, 68, 5000, 9000};
      live.sink->OnFinish(std::move(finish));
    }
    std::unique_lock<std::mutex> lock(mutex_);
    live_.erase(id);
    changed_.notify_all();
  }

  // std::mutex: ThreadSanitizer sees nothing of locks inside a library that it did not compile.
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Options options_;
  std::map<RequestId, Live> live_;
  Request last_request_;
  RequestId last_id_ = 0;
  int cancels_ = 0;
  bool draining_ = false;
  bool shutdown_ = false;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace atp::testing

#endif  // ATP_TESTS_SERVER_FAKE_ENGINE_H_
