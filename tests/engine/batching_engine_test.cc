// The whole engine on the default model and the cpu backend. That answers do not depend on the batch:
// batch_invariance_test.
#include "engine/batching_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/engine/default_model_engine.h"

namespace atp {
namespace {

using testing::HasSubstr;

class CountingObserver : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override {
    ++steps;
    prefill_tokens += report.prefill_tokens;
    decode_tokens += report.decode_tokens;
  }
  void OnStarted(absl::Duration queue_time) override {
    EXPECT_GE(queue_time, absl::ZeroDuration());
    ++started;
  }
  void OnFirstToken(absl::Duration since_submit) override {
    EXPECT_GT(since_submit, absl::ZeroDuration());
    EXPECT_LE(++first_tokens, started);
  }
  void OnInterTokenLatency(absl::Duration) override { ++intervals; }
  void OnRequestFinished(const RequestReport& report) override {
    ++finished;
    completion_tokens += report.usage.completion_tokens;
  }
  std::atomic<int> steps{0}, prefill_tokens{0}, decode_tokens{0}, started{0}, first_tokens{0}, intervals{0},
      finished{0}, completion_tokens{0};
};

TEST_F(BatchingEngineTest, GreedyIsTheSameForEverySeed) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask(kStory, 20, 1);
  request.sampling.temperature = 0;
  const Answer a = Submit(engine.get(), request)->WaitOne();
  request.sampling.seed.reset();
  const Answer b = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.finish.reason, FinishReason::kLength);
  EXPECT_EQ(a.finish.usage.completion_tokens, 20);
  EXPECT_EQ(a.text, b.text);
  EXPECT_FALSE(a.text.empty());
}

TEST_F(BatchingEngineTest, ARepetitionPenaltySeesThePromptAndTheAnswer) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask(std::string(kStory) + kStory, 20, 1);  // the second time it knows what comes
  request.prompt.resize(request.prompt.size() - 4);
  request.sampling.temperature = 0;
  const TokenId repeated = Submit(engine.get(), request)->WaitOne().tokens.at(0);
  ASSERT_THAT(request.prompt, testing::Contains(repeated));
  request.sampling.repetition_penalty = 100;
  std::vector<TokenId> seen = request.prompt;
  for (const TokenId token : Submit(engine.get(), request)->WaitOne().tokens) {
    EXPECT_THAT(seen, testing::Not(testing::Contains(token)));
    seen.push_back(token);
  }
}

TEST_F(BatchingEngineTest, AnswersDifferAndAnswerIHasSeedPlusI) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Sampled(kStory, 12, 50);
  request.sampling.n = 3;
  const auto answers = Submit(engine.get(), request)->Wait();
  ASSERT_EQ(answers.size(), 3u);
  EXPECT_GT(answers.at(1).finish.usage.cached_tokens, 0);  // they share the prompt
  for (int i = 0; i < 3; ++i) {
    ExpectSame(Submit(engine.get(), Sampled(kStory, 12, 50 + i))->WaitOne(), answers.at(i));
  }
  EXPECT_NE(answers.at(0).tokens, answers.at(1).tokens);
  ExpectNothingLeft(engine.get());
}

TEST_F(BatchingEngineTest, StopStringsStopTokensAndEos) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask(kStory, 40, 7);
  const Answer whole = Submit(engine.get(), request)->WaitOne();
  const std::string stop = whole.text.substr(whole.text.size() / 2, 3);
  request.sampling.stop = {stop};
  const Answer stopped = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(stopped.finish.reason, FinishReason::kStop);
  EXPECT_EQ(stopped.finish.matched_stop, stop);
  EXPECT_EQ(stopped.text, whole.text.substr(0, whole.text.find(stop)));

  request.sampling.stop.clear();
  request.sampling.stop_token_ids = {whole.tokens[9]};
  const Answer by_token = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(by_token.finish.reason, FinishReason::kStop);
  EXPECT_LE(by_token.tokens.size(), 9u);
  request.sampling.min_tokens = 30;
  const Answer later = Submit(engine.get(), request)->WaitOne();
  EXPECT_GE(later.finish.usage.completion_tokens, 30);

  BatchingEngineOptions options = Options();
  options.eos_token_ids = {whole.tokens[5]};
  engine = Make(options);
  request = Ask(kStory, 40, 7);
  request.sampling.ignore_eos = false;
  const Answer ended = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(ended.finish.reason, FinishReason::kStop);
  EXPECT_LE(ended.tokens.size(), 5u);
  EXPECT_TRUE(ended.finish.matched_stop.empty());
}

TEST_F(BatchingEngineTest, EchoWithLogprobsAgreesWithGeneration) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask(kStory, 30, 7);
  request.sampling.logprobs = 2;
  request.sampling.temperature = 0;
  const Answer generated = Submit(engine.get(), request)->WaitOne();

  // What was generated, given as a prompt, must get the log probabilities that it had: the same model saw the
  // same text.
  Request scored = request;
  scored.prompt.insert(scored.prompt.end(), generated.tokens.begin(), generated.tokens.end());
  scored.echo_prompt = true;
  scored.sampling.max_tokens = 0;
  const Answer echo = Submit(engine.get(), scored)->WaitOne();
  EXPECT_EQ(echo.finish.reason, FinishReason::kLength);
  EXPECT_EQ(echo.finish.usage.completion_tokens, 0);
  EXPECT_EQ(echo.finish.usage.cached_tokens, 0);
  ASSERT_EQ(echo.prompt_logprobs.size(), scored.prompt.size());
  EXPECT_TRUE(std::isnan(echo.prompt_logprobs[0].logprob));
  for (size_t i = 0; i < scored.prompt.size(); ++i)
    EXPECT_EQ(echo.prompt_logprobs[i].token, scored.prompt[i]);
  for (size_t i = 0; i < generated.logprobs.size(); ++i) {
    const TokenLogprob& e = echo.prompt_logprobs[request.prompt.size() + i];
    EXPECT_TRUE(SameBits(e.logprob, generated.logprobs[i].logprob));
    EXPECT_EQ(e.top, generated.logprobs[i].top);
  }
  EXPECT_THAT(echo.prompt_text, HasSubstr("bright morning"));

  // The same, and an answer behind it.
  scored.sampling.max_tokens = 4;
  const Answer both = Submit(engine.get(), scored)->WaitOne();
  EXPECT_EQ(both.prompt_logprobs.size(), scored.prompt.size());
  EXPECT_EQ(both.tokens.size(), 4u);

  // Echo alone.
  scored.sampling.logprobs.reset();
  scored.sampling.max_tokens = 0;
  const Answer text = Submit(engine.get(), scored)->WaitOne();
  EXPECT_EQ(text.prompt_text, echo.prompt_text);
  EXPECT_TRUE(text.prompt_logprobs.empty());
  ExpectNothingLeft(engine.get());
}

TEST_F(BatchingEngineTest, CancelInMidStreamFreesTheBlocks) {
  BatchingEngineOptions options = Options();
  options.prefix_cache = false;
  std::unique_ptr<BatchingEngine> engine = Make(options);
  auto sink = std::make_shared<RecordingSink>();
  const absl::StatusOr<RequestId> id = engine->Submit(Ask(kStory, 400), sink);
  ASSERT_TRUE(id.ok());
  sink->WaitForDeltas(3);
  EXPECT_GT(engine->Stats().kv_blocks_used, 0);
  engine->Cancel(*id);
  const Answer answer = sink->WaitOne();
  EXPECT_EQ(answer.finish.reason, FinishReason::kCancelled);
  EXPECT_LT(answer.finish.usage.completion_tokens, 400);
  EXPECT_EQ(engine->Stats().kv_blocks_used, 0);  // by the time the caller hears of it
  EXPECT_FALSE(sink->late());
}

TEST_F(BatchingEngineTest, ASinkMayCancelItsOwnRequest) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  std::atomic<RequestId> id{0};
  auto sink = std::make_shared<RecordingSink>(1, [&] {
    if (id != 0) engine->Cancel(id);
  });
  const absl::StatusOr<RequestId> submitted = engine->Submit(Ask(kStory, 400), sink);
  ASSERT_TRUE(submitted.ok());
  id = *submitted;
  EXPECT_EQ(sink->WaitOne().finish.reason, FinishReason::kCancelled);
}

TEST_F(BatchingEngineTest, DeadlineEndsARunningRequest) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask(kStory, 400);
  request.deadline = absl::Now();
  EXPECT_EQ(Submit(engine.get(), request)->WaitOne().finish.reason, FinishReason::kDeadline);
  ExpectNothingLeft(engine.get());
}

TEST_F(BatchingEngineTest, RefusesWhatIsWrongWithTheNumbers) {
  std::unique_ptr<BatchingEngine> engine = Make(Options(128));
  const auto refusal = [&](const Request& request) {
    const absl::StatusOr<RequestId> id = engine->Submit(request, nullptr);
    EXPECT_EQ(id.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(id.status().message());
  };
  EXPECT_THAT(refusal(Ask(kStory, 200)), HasSubstr("kv_cache.memory_bytes"));
  Request request = Ask("a", 5);
  const int64_t positions = model_->config().max_positions;
  request.prompt.assign(static_cast<size_t>(positions) + 1, 5);
  EXPECT_THAT(refusal(request), HasSubstr(absl::StrCat(positions, " positions")));
  request.prompt = {5, 100000};
  EXPECT_THAT(refusal(request), HasSubstr("100000"));
  request.prompt.clear();
  EXPECT_THAT(refusal(request), HasSubstr("prompt"));
  request = Ask("a", 5);
  request.sampling.top_p = 0;
  EXPECT_THAT(refusal(request), HasSubstr("top_p"));
  BatchingEngineOptions tiny = Options(1);
  const auto engine_or = BatchingEngine::Create(backend_, model_, tokenizer_, tiny, nullptr);
  EXPECT_THAT(std::string(engine_or.status().message()), HasSubstr("kv_cache.memory_bytes"));
}

TEST_F(BatchingEngineTest, GenerationEndsWithTheModelsPositions) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask("a", 100);
  request.prompt.assign(static_cast<size_t>(model_->config().max_positions) - 12, 300);
  const Answer answer = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(answer.finish.reason, FinishReason::kLength);
  EXPECT_EQ(answer.finish.usage.completion_tokens, 12);
}

TEST_F(BatchingEngineTest, FullQueueRefusesAndDrainEndsInOrder) {
  BatchingEngineOptions options = Options();
  options.max_running_sequences = 1;
  options.max_waiting_requests = 2;
  std::unique_ptr<BatchingEngine> engine = Make(options);
  auto running = Submit(engine.get(), Ask(kStory, 300));
  running->WaitForDeltas(1);
  auto b = Submit(engine.get(), Ask("b", 3));
  auto c = Submit(engine.get(), Ask("c", 3));
  const absl::StatusOr<RequestId> refused = engine->Submit(Ask("d", 3), std::make_shared<RecordingSink>());
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(engine->Stats().requests_waiting, 2);
  EXPECT_EQ(engine->Stats().requests_running, 1);
  EXPECT_GE(engine->RetryAfter(), absl::Seconds(1));
  EXPECT_EQ(engine->Drain(absl::InfiniteDuration()), absl::OkStatus());
  EXPECT_EQ(running->WaitOne().finish.usage.completion_tokens, 300);
  EXPECT_EQ(b->WaitOne().finish.reason, FinishReason::kLength);
  EXPECT_EQ(c->WaitOne().finish.reason, FinishReason::kLength);
  EXPECT_EQ(engine->Submit(Ask("e", 3), running).status().code(), absl::StatusCode::kUnavailable);
}

// Who is preempted waits, and says so, but not in the queue: there is room in that, and still both count as
// living.
TEST_F(BatchingEngineTest, RisingPrioritiesDoNotGrowWithoutBound) {
  BatchingEngineOptions options = Options();
  options.max_running_sequences = 1;
  options.max_waiting_requests = 1;
  std::unique_ptr<BatchingEngine> engine = Make(options);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int priority = 0; priority < 2; ++priority) {
    Request request = Ask(kStory, 300);
    request.priority = priority;
    sinks.push_back(Submit(engine.get(), request));
    sinks.back()->WaitForDeltas(1);
  }
  EXPECT_EQ(engine->Stats().requests_running, 1);
  EXPECT_EQ(engine->Stats().requests_waiting, 1);
  Request request = Ask(kStory, 300);
  request.priority = 2;
  EXPECT_EQ(engine->Submit(request, std::make_shared<RecordingSink>()).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_F(BatchingEngineTest, DrainEndsTheRestAndDestructionToo) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  auto sink = Submit(engine.get(), Ask(kStory, 400));
  EXPECT_EQ(engine->Drain(absl::ZeroDuration()).code(), absl::StatusCode::kDeadlineExceeded);
  const Answer answer = sink->WaitOne();
  EXPECT_EQ(answer.finish.reason, FinishReason::kShutdown);
  EXPECT_FALSE(answer.finish.message.empty());
  engine = Make(Options());
  sink = Submit(engine.get(), Ask(kStory, 400));
  engine.reset();
  EXPECT_TRUE(sink->ended());
}

TEST_F(BatchingEngineTest, DeviceFailureEndsWhatRunsWithAMessage) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  auto sink = Submit(engine.get(), Ask(kStory, 400));
  sink->WaitForDeltas(2);
  backend_->broken = true;
  const Answer answer = sink->WaitOne();
  backend_->broken = false;
  EXPECT_EQ(answer.finish.reason, FinishReason::kError);
  EXPECT_THAT(answer.finish.message, HasSubstr("fell off the bus"));
  EXPECT_EQ(engine->Stats().kv_blocks_used, 0);
  EXPECT_EQ(engine->Stats().kv_blocks_cached, 0);
  EXPECT_EQ(Submit(engine.get(), Ask(kStory, 3))->WaitOne().finish.reason, FinishReason::kLength);
}

TEST_F(BatchingEngineTest, LostDeviceEndsAllAndRefusesWhatComes) {
  BatchingEngineOptions options = Options();
  options.max_running_sequences = 1;
  std::atomic<int> told{0};
  options.on_device_lost = [&] { ++told; };
  std::unique_ptr<BatchingEngine> engine = Make(options);
  auto running = Submit(engine.get(), Ask(kStory, 400));
  auto waiting = Submit(engine.get(), Ask(kStory, 400));
  running->WaitForDeltas(2);
  backend_->lost = true;
  EXPECT_EQ(running->WaitOne().finish.reason, FinishReason::kError);
  const Answer answer = waiting->WaitOne();
  EXPECT_EQ(answer.finish.reason, FinishReason::kError);
  EXPECT_THAT(answer.finish.message, HasSubstr("fell off the bus for good"));
  const absl::Status refused = engine->Submit(Ask("a", 3), nullptr).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("fell off the bus for good"));
  EXPECT_TRUE(engine->Drain(absl::InfiniteDuration()).ok());
  engine.reset();  // joins the thread that tells
  backend_->lost = false;
  EXPECT_EQ(told, 1);
}

TEST_F(BatchingEngineTest, WithoutTokenizerTokensAreDelivered) {
  auto engine = BatchingEngine::Create(backend_, model_, nullptr, Options(), nullptr);
  ASSERT_TRUE(engine.ok());
  Request request = Ask("a", 6);
  const Answer answer = Submit(engine->get(), request)->WaitOne();
  EXPECT_EQ(answer.tokens.size(), 6u);
  EXPECT_EQ(answer.text, "");
  request.sampling.stop = {"x"};
  EXPECT_EQ((*engine)->Submit(request, nullptr).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(BatchingEngineTest, HundredsOfRequestsLeakNothing) {
  CountingObserver observer;
  BatchingEngineOptions options = Options(320);
  options.max_running_sequences = 12;
  std::unique_ptr<BatchingEngine> engine = Make(options, &observer);
  std::atomic<int> completion_tokens{0};
  std::vector<std::thread> clients;
  for (int t = 0; t < 6; ++t) {
    clients.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        const std::string prompt(static_cast<size_t>(5 + (i * 13 + t * 7) % 60),
                                 static_cast<char>('a' + i % 5));
        Request request = Ask(prompt, 1 + (i + t) % 9, i);
        request.sampling.n = 1 + i % 2;
        request.priority = t % 2;
        if (i % 11 == 0) request.deadline = absl::Now() + absl::Milliseconds(1);
        auto sink = std::make_shared<RecordingSink>(request.sampling.n);
        const absl::StatusOr<RequestId> id = engine->Submit(request, sink);
        ASSERT_TRUE(id.ok()) << id.status();
        if (i % 7 == 3) {
          sink->WaitForDeltas(1);
          engine->Cancel(*id);
        }
        for (const auto& [index, answer] : sink->Wait()) {
          EXPECT_EQ(answer.finishes, 1);
          completion_tokens += answer.finish.usage.completion_tokens;
        }
        EXPECT_FALSE(sink->late());
      }
    });
  }
  for (std::thread& client : clients) client.join();
  ExpectNothingLeft(engine.get());
  EXPECT_EQ(observer.finished, 300);
  EXPECT_EQ(observer.completion_tokens, completion_tokens);
  EXPECT_GT(observer.steps, 0);
  EXPECT_GT(observer.prefill_tokens, 0);
  EXPECT_GT(observer.decode_tokens, 0);
  EXPECT_GT(observer.intervals, 0);
  EXPECT_GT(observer.first_tokens, 0);
  EXPECT_LE(observer.started, 300);  // each request once, however many answers it has
}

}  // namespace
}  // namespace atp
