#include "engine/answer_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tests/engine/byte_vocabulary.h"
#include "tests/engine/recording_sink.h"

namespace atp {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

const absl::Time kNow = absl::FromUnixSeconds(1000);

class AnswerStreamTest : public testing::Test {
 protected:
  AnswerStream Make(const SamplingParams& sampling, std::string_view prompt = "p",
                    const Tokenizer* tokenizer = &kTokens) {
    Submission submission;
    submission.id = 1;
    auto request = std::make_shared<Request>();
    request->prompt = ByteVocabulary::Ids(prompt);
    request->sampling = sampling;
    request->sampling.seed = 5;
    submission.request = request;
    sink_ = std::make_shared<RecordingSink>(sampling.n);
    submission.sink = sink_;
    submission.submitted = kNow;
    active_ = std::make_shared<ActiveRequest>(std::move(submission));
    return AnswerStream(tokenizer, kEos, active_, 0, sampling.max_tokens);
  }
  // Feeds one token per byte until the stream ends itself, then finishes it.
  RecordingSink::Answer Feed(AnswerStream* stream, const std::vector<TokenId>& tokens) {
    std::optional<FinishReason> end;
    for (TokenId token : tokens) {
      Sampled sampled;
      sampled.token = token;
      if (stream->sampling().logprobs) sampled.logprob = TokenLogprob{token, -0.5f, {}};
      end = stream->Append(std::move(sampled), kNow);
      if (end) break;
    }
    stream->Finish(end.value_or(FinishReason::kShutdown), "");
    return sink_->WaitOne();
  }
  RecordingSink::Answer Feed(AnswerStream* stream, std::string_view text) {
    return Feed(stream, ByteVocabulary::Ids(text));
  }
  static SamplingParams Params(int max_tokens, std::vector<std::string> stop = {}) {
    SamplingParams params;
    params.max_tokens = max_tokens;
    params.stop = std::move(stop);
    return params;
  }

  static inline const ByteVocabulary kTokens;
  static inline const std::vector<TokenId> kEos = {ByteVocabulary::kEos};
  std::shared_ptr<RecordingSink> sink_;
  std::shared_ptr<ActiveRequest> active_;
};

// What is left of a character at the end becomes U+FFFD, and that may be a stop string.
TEST_F(AnswerStreamTest, AStopThatTheLastFlushCompletesIsAStop) {
  AnswerStream stream = Make(Params(2, {"\uFFFD"}));
  const RecordingSink::Answer answer = Feed(&stream, "a\xC3");
  EXPECT_EQ(answer.text, "a");
  EXPECT_EQ(answer.finish.reason, FinishReason::kStop);
  EXPECT_EQ(answer.finish.matched_stop, "\uFFFD");
}

TEST_F(AnswerStreamTest, EndsAtMaxTokens) {
  AnswerStream stream = Make(Params(3));
  const RecordingSink::Answer answer = Feed(&stream, "hello");
  EXPECT_EQ(answer.text, "hel");
  EXPECT_EQ(answer.finish.reason, FinishReason::kLength);
  EXPECT_EQ(answer.finish.usage.completion_tokens, 3);
  EXPECT_EQ(answer.finish.usage.prompt_tokens, 1);
  EXPECT_EQ(answer.tokens, ByteVocabulary::Ids("hel"));
}

TEST_F(AnswerStreamTest, EosEndsAndIsCountedButNotDelivered) {
  AnswerStream stream = Make(Params(9));
  const RecordingSink::Answer answer = Feed(&stream, {'h', 'i', ByteVocabulary::kEos, 'x'});
  EXPECT_EQ(answer.text, "hi");
  EXPECT_EQ(answer.finish.reason, FinishReason::kStop);
  EXPECT_EQ(answer.finish.usage.completion_tokens, 3);
  EXPECT_THAT(answer.tokens, ElementsAre('h', 'i'));
}

TEST_F(AnswerStreamTest, IgnoreEos) {
  SamplingParams params = Params(4);
  params.ignore_eos = true;
  AnswerStream stream = Make(params);
  const RecordingSink::Answer answer = Feed(&stream, {'h', ByteVocabulary::kEos, 'i', ByteVocabulary::kEos});
  EXPECT_EQ(answer.text, "hi");
  EXPECT_EQ(answer.finish.reason, FinishReason::kLength);
  EXPECT_EQ(answer.tokens.size(), 4u);
}

TEST_F(AnswerStreamTest, StopTokens) {
  SamplingParams params = Params(9);
  params.stop_token_ids = {'l'};
  AnswerStream stream = Make(params);
  EXPECT_EQ(Feed(&stream, "hello").text, "he");
  params.include_stop_in_output = true;
  AnswerStream including = Make(params);
  EXPECT_EQ(Feed(&including, "hello").text, "hel");
}

TEST_F(AnswerStreamTest, StopStringsAreHeldBackAndNeverLeak) {
  SamplingParams params = Params(30, {"END"});
  params.logprobs = 0;
  AnswerStream stream = Make(params);
  const RecordingSink::Answer answer = Feed(&stream, "an EN and END of it");
  EXPECT_EQ(answer.text, "an EN and ");
  EXPECT_EQ(answer.finish.matched_stop, "END");
  EXPECT_EQ(answer.finish.reason, FinishReason::kStop);
  EXPECT_EQ(answer.tokens, ByteVocabulary::Ids("an EN and "));
  EXPECT_EQ(answer.logprobs.size(), answer.tokens.size());
  EXPECT_EQ(answer.finish.usage.completion_tokens, 13);
  for (const std::string& piece : answer.pieces)
    EXPECT_NE(piece, "E");  // it was not sent before it was certain
}

TEST_F(AnswerStreamTest, IncludeStop) {
  SamplingParams params = Params(30, {"END"});
  params.include_stop_in_output = true;
  AnswerStream stream = Make(params);
  const RecordingSink::Answer answer = Feed(&stream, "the END of it");
  EXPECT_EQ(answer.text, "the END");
  EXPECT_EQ(answer.tokens, ByteVocabulary::Ids("the END"));
}

TEST_F(AnswerStreamTest, HeldTextComesOutAtTheEnd) {
  AnswerStream stream = Make(Params(4, {"END"}));
  const RecordingSink::Answer answer = Feed(&stream, "a EN");
  EXPECT_EQ(answer.text, "a EN");
  EXPECT_EQ(answer.tokens.size(), 4u);
  EXPECT_EQ(answer.finish.reason, FinishReason::kLength);
}

TEST_F(AnswerStreamTest, MinTokensForbidsEndsAndPassesStopStrings) {
  SamplingParams params = Params(10, {"b"});
  params.min_tokens = 4;
  params.stop_token_ids = {'z'};
  AnswerStream stream = Make(params);
  EXPECT_THAT(stream.forbidden(), ElementsAre('z', ByteVocabulary::kEos));
  const RecordingSink::Answer answer = Feed(&stream, "abcabc");
  EXPECT_EQ(answer.text, "abca");
  EXPECT_THAT(stream.forbidden(), IsEmpty());
}

TEST_F(AnswerStreamTest, CharactersAreNeverSplit) {
  AnswerStream stream = Make(Params(20));
  const RecordingSink::Answer answer = Feed(&stream, "a\xE2\x82\xAC!\xF0\x9F\x98\x80");
  EXPECT_THAT(answer.pieces, ElementsAre("a", "\xE2\x82\xAC", "!", "\xF0\x9F\x98\x80"));
  EXPECT_EQ(answer.tokens.size(), 9u);
}

TEST_F(AnswerStreamTest, UnfinishedCharacterBecomesAReplacement) {
  AnswerStream stream = Make(Params(3));
  const RecordingSink::Answer answer = Feed(&stream, "a\xE2\x82\xAC");
  EXPECT_EQ(answer.text, "a\xEF\xBF\xBD");
  EXPECT_EQ(answer.tokens.size(), 3u);
}

TEST_F(AnswerStreamTest, WithoutTokenizerTokensComeAtOnce) {
  AnswerStream stream = Make(Params(3), "p", nullptr);
  const RecordingSink::Answer answer = Feed(&stream, {'a', 'b', 'c'});
  EXPECT_EQ(answer.text, "");
  EXPECT_EQ(answer.pieces.size(), 3u);
  EXPECT_THAT(answer.tokens, ElementsAre('a', 'b', 'c'));
}

TEST_F(AnswerStreamTest, EchoedPromptHasNoLogprobForItsFirstToken) {
  SamplingParams params = Params(1);
  params.logprobs = 0;
  AnswerStream stream = Make(params, "abc");
  stream.AddPromptLogprob({'b', -1.0f, {}});
  stream.AddPromptLogprob({'c', -2.0f, {}});
  stream.SendPrompt();
  const RecordingSink::Answer answer = Feed(&stream, "d");
  EXPECT_EQ(answer.prompt_text, "abc");
  ASSERT_EQ(answer.prompt_logprobs.size(), 3u);
  EXPECT_EQ(answer.prompt_logprobs[0].token, 'a');
  EXPECT_TRUE(std::isnan(answer.prompt_logprobs[0].logprob));
  EXPECT_EQ(answer.prompt_logprobs[2].logprob, -2.0f);
  EXPECT_EQ(answer.text, "d");
}

TEST_F(AnswerStreamTest, ReportsTheRequestOnceItsLastAnswerEnded) {
  SamplingParams params = Params(2);
  params.n = 2;
  AnswerStream first = Make(params);
  AnswerStream second(&kTokens, kEos, active_, 1, 2);
  EXPECT_EQ(first.seed(), 5u);
  EXPECT_EQ(second.seed(), 6u);
  Sampled sampled;
  sampled.token = 'a';
  active_->started = kNow + absl::Seconds(1);
  first.Append(sampled, kNow + absl::Seconds(3));
  second.Append(sampled, kNow + absl::Seconds(4));
  Usage cached;
  cached.cached_tokens = 1;
  cached.atp = {"balanced", 0.5, 4, 100, 64, 68, 5000, 9000};
  Usage other;
  other.atp = {"balanced", 0.5, 4, 10, 0, 10, 1000, 1000};
  EXPECT_FALSE(second.Finish(FinishReason::kStop, "", other));
  EXPECT_TRUE(first.Finish(FinishReason::kCancelled, "", cached));
  const RequestReport report = active_->Report(FinishReason::kCancelled, kNow + absl::Seconds(9));
  EXPECT_EQ(report.usage.prompt_tokens, 1);
  EXPECT_EQ(report.usage.completion_tokens, 2);
  EXPECT_EQ(report.usage.atp.preset, "balanced");
  EXPECT_EQ(report.usage.atp.tokens, 110);
  EXPECT_EQ(report.usage.atp.kv_bytes, 6000);
  EXPECT_EQ(report.usage.cached_tokens, 1);
  EXPECT_EQ(report.queue_time, absl::Seconds(1));
  EXPECT_EQ(report.time_to_first_token, absl::Seconds(3));
  EXPECT_EQ(report.request_time, absl::Seconds(9));
}

}  // namespace
}  // namespace atp
