#include "engine/echo_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "tests/engine/byte_vocabulary.h"
#include "tests/engine/recording_sink.h"

namespace atp {
namespace {

// Slow enough that a test that waits for one token never sees the end of a long answer.
constexpr absl::Duration kSlow = absl::Milliseconds(20);

Request Ask(std::string_view prompt, int max_tokens) {
  Request request;
  request.prompt = ByteVocabulary::Ids(prompt);
  request.sampling.max_tokens = max_tokens;
  return request;
}

class EchoEngineTest : public testing::Test {
 protected:
  ByteVocabulary tokens_;
};

TEST_F(EchoEngineTest, RepeatsThePrompt) {
  EchoEngine engine(&tokens_, {});
  auto sink = std::make_shared<RecordingSink>();
  ASSERT_TRUE(engine.Submit(Ask("abc", 7), sink).ok());
  const RecordingSink::Answer answer = sink->WaitOne();
  EXPECT_EQ(answer.text, "abcabca");
  EXPECT_EQ(answer.finish.reason, FinishReason::kLength);
  EXPECT_EQ(answer.finish.usage.completion_tokens, 7);
  EXPECT_EQ(answer.finishes, 1);
  EXPECT_FALSE(sink->late());
}

TEST_F(EchoEngineTest, ManyAnswersEchoAndLogprobs) {
  EchoEngine engine(&tokens_, {});
  Request request = Ask("ab", 3);
  request.sampling.n = 3;
  request.sampling.logprobs = 1;
  request.echo_prompt = true;
  auto sink = std::make_shared<RecordingSink>(3);
  ASSERT_TRUE(engine.Submit(request, sink).ok());
  const auto answers = sink->Wait();
  ASSERT_EQ(answers.size(), 3u);
  for (const auto& [index, answer] : answers) {
    EXPECT_EQ(answer.prompt_text, "ab");
    EXPECT_EQ(answer.prompt_logprobs.size(), 2u);
    EXPECT_EQ(answer.text, "aba");
    EXPECT_EQ(answer.logprobs.size(), 3u);
  }
}

TEST_F(EchoEngineTest, StopStringsEnd) {
  EchoEngine engine(&tokens_, {});
  Request request = Ask("abcd", 50);
  request.sampling.stop = {"cd"};
  auto sink = std::make_shared<RecordingSink>();
  ASSERT_TRUE(engine.Submit(request, sink).ok());
  EXPECT_EQ(sink->WaitOne().text, "ab");
  EXPECT_EQ(sink->WaitOne().finish.matched_stop, "cd");
}

TEST_F(EchoEngineTest, CancelWhileRunningAndWhileWaiting) {
  EchoEngineOptions options;
  options.tick = kSlow;
  options.max_running_requests = 1;
  EchoEngine engine(&tokens_, options);
  auto first = std::make_shared<RecordingSink>();
  auto second = std::make_shared<RecordingSink>();
  const auto a = engine.Submit(Ask("abc", 4000), first);
  const auto b = engine.Submit(Ask("abc", 4000), second);
  ASSERT_TRUE(a.ok() && b.ok());
  first->WaitForDeltas(2);
  EXPECT_EQ(engine.Stats().requests_running, 1);
  EXPECT_EQ(engine.Stats().requests_waiting, 1);
  engine.Cancel(*b);
  EXPECT_EQ(second->WaitOne().finish.reason, FinishReason::kCancelled);
  EXPECT_FALSE(first->ended());
  engine.Cancel(*a);
  const RecordingSink::Answer answer = first->WaitOne();
  EXPECT_EQ(answer.finish.reason, FinishReason::kCancelled);
  EXPECT_GE(answer.finish.usage.completion_tokens, 2);
  engine.Cancel(12345678);  // nobody
}

TEST_F(EchoEngineTest, DeadlineEnds) {
  EchoEngineOptions options;
  options.tick = kSlow;
  EchoEngine engine(&tokens_, options);
  Request request = Ask("abc", 4000);
  request.deadline = absl::Now() + 3 * kSlow;
  auto sink = std::make_shared<RecordingSink>();
  ASSERT_TRUE(engine.Submit(request, sink).ok());
  EXPECT_EQ(sink->WaitOne().finish.reason, FinishReason::kDeadline);
}

TEST_F(EchoEngineTest, FullQueueRefuses) {
  EchoEngineOptions options;
  options.tick = kSlow;
  options.max_running_requests = 1;
  options.max_waiting_requests = 2;
  EchoEngine engine(&tokens_, options);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  int accepted = 0;
  absl::Status refusal;
  for (int i = 0; i < 6; ++i) {
    sinks.push_back(std::make_shared<RecordingSink>());
    const auto id = engine.Submit(Ask("abc", 4000), sinks.back());
    if (id.ok()) {
      ++accepted;
      if (i == 0) sinks[0]->WaitForDeltas(1);
    } else {
      refusal = id.status();
    }
  }
  EXPECT_EQ(accepted, 3);
  EXPECT_EQ(refusal.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GE(engine.RetryAfter(), absl::Seconds(1));
}

TEST_F(EchoEngineTest, DrainLetsRunningOnesFinish) {
  EchoEngine engine(&tokens_, {});
  auto sink = std::make_shared<RecordingSink>();
  ASSERT_TRUE(engine.Submit(Ask("abc", 3000), sink).ok());
  EXPECT_EQ(engine.Drain(absl::InfiniteDuration()), absl::OkStatus());
  EXPECT_TRUE(sink->ended());
  EXPECT_EQ(sink->WaitOne().finish.reason, FinishReason::kLength);
  EXPECT_EQ(engine.Submit(Ask("abc", 3), sink).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(EchoEngineTest, DrainEndsTheRest) {
  EchoEngineOptions options;
  options.tick = kSlow;
  EchoEngine engine(&tokens_, options);
  auto sink = std::make_shared<RecordingSink>();
  ASSERT_TRUE(engine.Submit(Ask("abc", 4000), sink).ok());
  EXPECT_EQ(engine.Drain(absl::Milliseconds(1)).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(sink->WaitOne().finish.reason, FinishReason::kShutdown);
}

TEST_F(EchoEngineTest, DestructionEndsEverything) {
  auto sink = std::make_shared<RecordingSink>(2);
  {
    EchoEngineOptions options;
    options.tick = kSlow;
    EchoEngine engine(&tokens_, options);
    Request request = Ask("abc", 4000);
    request.sampling.n = 2;
    ASSERT_TRUE(engine.Submit(request, sink).ok());
  }
  EXPECT_TRUE(sink->ended());
  EXPECT_EQ(sink->Wait().at(1).finish.reason, FinishReason::kShutdown);
}

TEST_F(EchoEngineTest, RefusesBadRequests) {
  EchoEngine engine(&tokens_, {});
  EXPECT_EQ(engine.Submit(Ask("", 3), nullptr).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine.Submit(Ask(std::string(5000, 'a'), 3), nullptr).status().code(),
            absl::StatusCode::kInvalidArgument);
  Request hot = Ask("a", 3);
  hot.sampling.temperature = -1;
  EXPECT_EQ(engine.Submit(hot, nullptr).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(EchoEngineTest, ManyClientsAtOnce) {
  EchoEngine engine(&tokens_, {});
  std::vector<std::thread> clients;
  for (int t = 0; t < 8; ++t) {
    clients.emplace_back([&engine, t] {
      for (int i = 0; i < 50; ++i) {
        auto sink = std::make_shared<RecordingSink>();
        const auto id = engine.Submit(Ask("xyz", 5), sink);
        ASSERT_TRUE(id.ok());
        if (t % 2 == 1) engine.Cancel(*id);
        const RecordingSink::Answer answer = sink->WaitOne();
        EXPECT_EQ(answer.finishes, 1);
        EXPECT_TRUE(t % 2 == 1 || answer.text == "xyzxy") << answer.text;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(engine.Drain(absl::InfiniteDuration()), absl::OkStatus());
  EXPECT_EQ(engine.Stats().requests_running, 0);
}

}  // namespace
}  // namespace atp
