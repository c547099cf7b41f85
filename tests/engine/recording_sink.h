// A sink that keeps everything it is told and lets a test wait for it.
#ifndef ATP_TESTS_ENGINE_RECORDING_SINK_H_
#define ATP_TESTS_ENGINE_RECORDING_SINK_H_

#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "engine/request.h"

namespace atp {

class RecordingSink : public OutputSink {
 public:
  struct Answer {
    std::string prompt_text;
    std::vector<TokenLogprob> prompt_logprobs;
    std::string text;
    std::vector<TokenId> tokens;
    std::vector<TokenLogprob> logprobs;
    std::vector<std::string> pieces;
    int finishes = 0;
    OutputFinish finish;
  };

  explicit RecordingSink(int answers = 1, std::function<void()> on_delta = nullptr)
      : answers_left_(answers), on_delta_(std::move(on_delta)) {}

  void OnDelta(OutputDelta delta) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Answer& answer = answers_[delta.index];
      if (answer.finishes > 0) late_ = true;
      if (delta.is_prompt) {
        answer.prompt_text = delta.text;
        answer.prompt_logprobs = delta.logprobs;
      } else {
        answer.text += delta.text;
        answer.pieces.push_back(delta.text);
        answer.tokens.insert(answer.tokens.end(), delta.tokens.begin(), delta.tokens.end());
        answer.logprobs.insert(answer.logprobs.end(), delta.logprobs.begin(), delta.logprobs.end());
      }
      ++deltas_;
      changed_.notify_all();
    }
    if (on_delta_) on_delta_();
  }
  void OnFinish(OutputFinish finish) override {
    std::lock_guard<std::mutex> lock(mutex_);
    Answer& answer = answers_[finish.index];
    ++answer.finishes;
    answer.finish = std::move(finish);
    --answers_left_;
    changed_.notify_all();
  }

  // All answers, once each has ended.
  std::map<int, Answer> Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return answers_left_ <= 0; });
    return answers_;
  }
  Answer WaitOne() { return Wait().at(0); }
  void WaitForDeltas(int count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this, count] { return deltas_ >= count || answers_left_ <= 0; });
  }
  bool ended() {
    std::lock_guard<std::mutex> lock(mutex_);
    return answers_left_ <= 0;
  }
  bool late() {  // something came after an end
    std::lock_guard<std::mutex> lock(mutex_);
    return late_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int, Answer> answers_;
  int answers_left_;
  int deltas_ = 0;
  bool late_ = false;
  std::function<void()> on_delta_;
};

}  // namespace atp

#endif  // ATP_TESTS_ENGINE_RECORDING_SINK_H_
