#include "server/generate_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/server/byte_tokenizer.h"
#include "tests/server/fake_engine.h"

namespace atp {
namespace {

using testing::ByteTokenizer;
using ::testing::ElementsAre;
using testing::FakeEngine;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::StartsWith;

class NullSink final : public OutputSink {
 public:
  void OnDelta(OutputDelta) override {}
  void OnFinish(OutputFinish) override {}
};

class GenerateServiceTest : public ::testing::Test {
 protected:
  static FakeEngine::Options Held() {
    FakeEngine::Options options;
    options.hold = true;
    options.kv_tokens_capacity = 80;
    return options;
  }
  GenerateService Service(const Tokenizer* tokenizer) {
    ServedModel model;
    model.id = "tiny";
    model.max_context_tokens = 100;
    model.vocab_size = ByteTokenizer::kVocabSize;
    absl::StatusOr<ChatTemplate> chat_template = ChatTemplate::Create("plain");
    EXPECT_TRUE(chat_template.ok()) << chat_template.status();
    return GenerateService(&engine_, tokenizer, *std::move(chat_template), model, config_);
  }
  GenerateService Service() { return Service(&tokenizer_); }
  static GenerateInput Text(std::string text) {
    GenerateInput input;
    input.prompt = std::move(text);
    return input;
  }
  static GenerateInput Ids(std::vector<TokenId> ids) {
    GenerateInput input;
    input.prompt = std::move(ids);
    return input;
  }
  absl::StatusOr<Submitted> Submit(GenerateInput input) {
    return Service().Generate(std::move(input), std::make_shared<NullSink>());
  }
  // The message must begin with the name of the field, so that front ends can tell it apart.
  void ExpectInvalid(GenerateInput input, const std::string& field, const std::string& detail = "",
                     absl::StatusCode code = absl::StatusCode::kInvalidArgument) {
    const absl::Status status = Submit(std::move(input)).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), StartsWith(field + ":"));
    EXPECT_THAT(std::string(status.message()), HasSubstr(detail));
  }

  Config config_;
  ByteTokenizer tokenizer_;
  FakeEngine engine_{Held()};
};

TEST_F(GenerateServiceTest, SubmitsTextWithBosAndDefaults) {
  GenerateInput input = Text("ab");
  input.external_id = "mine";
  input.priority = 7;
  input.echo = true;
  const absl::Time before = absl::Now();
  const absl::StatusOr<Submitted> submitted = Submit(std::move(input));
  ASSERT_TRUE(submitted.ok()) << submitted.status();
  EXPECT_EQ(submitted->prompt_tokens, 3);
  const Request request = engine_.last_request();
  EXPECT_THAT(request.prompt, ElementsAre(ByteTokenizer::kBos, 'a', 'b'));
  EXPECT_EQ(request.external_id, "mine");
  EXPECT_EQ(request.priority, 7);
  EXPECT_TRUE(request.echo_prompt);
  EXPECT_GE(request.deadline, before + absl::Milliseconds(config_.scheduler.default_timeout_ms));
  EXPECT_LT(request.deadline, absl::InfiniteFuture());
}

TEST_F(GenerateServiceTest, CompressionIsCheckedAndPassedOn) {
  ASSERT_TRUE(Submit(Text("ab")).ok());
  EXPECT_FALSE(engine_.last_request().compression.has_value());
  GenerateInput input = Text("ab");
  input.compression.emplace().ratio = 0.25;
  input.compression->bits = 8;
  ASSERT_TRUE(Submit(input).ok());
  ASSERT_TRUE(engine_.last_request().compression.has_value());
  EXPECT_EQ(engine_.last_request().compression->ratio, 0.25);
  EXPECT_EQ(engine_.last_request().compression->bits, 8);
  input.compression->bits = 7;
  ExpectInvalid(input, "atp.bits", "16, 8 or 4");
  input.compression->bits.reset();
  input.compression->ratio = 0;
  ExpectInvalid(input, "atp.ratio");
  input.compression->preset = "compact";
  ExpectInvalid(input, "atp");
  input.compression->ratio.reset();
  ASSERT_TRUE(Submit(input).ok());
  config_.atp.allow_override = false;
  ExpectInvalid(input, "atp", "atp.allow_override");
  EXPECT_TRUE(Submit(Text("ab")).ok());
}

TEST_F(GenerateServiceTest, AConversationNeedNotOpenAnAnswer) {
  GenerateInput input;
  input.prompt = std::vector<ChatMessage>{{"user", "a", ""}};
  ASSERT_TRUE(Submit(input).ok());
  const std::vector<TokenId> opened = engine_.last_request().prompt;
  input.add_generation_prompt = false;
  ASSERT_TRUE(Submit(input).ok());
  const std::vector<TokenId> bare = engine_.last_request().prompt;
  ASSERT_LT(bare.size(), opened.size());
  EXPECT_TRUE(std::equal(bare.begin(), bare.end(), opened.begin()));
}

TEST_F(GenerateServiceTest, KeepsTheCallersDeadlineAndNoneWhereNoneIsConfigured) {
  GenerateInput input = Text("a");
  const absl::Time deadline = absl::Now() + absl::Hours(5);
  input.deadline = deadline;
  ASSERT_TRUE(Submit(std::move(input)).ok());
  EXPECT_EQ(engine_.last_request().deadline, deadline);
  config_.scheduler.default_timeout_ms = 0;
  ASSERT_TRUE(Submit(Text("a")).ok());
  EXPECT_EQ(engine_.last_request().deadline, absl::InfiniteFuture());
}

TEST_F(GenerateServiceTest, MaxTokensBecomesWhatFitsUnlessGiven) {
  ASSERT_TRUE(Submit(Text("abcd")).ok());
  EXPECT_EQ(engine_.last_request().sampling.max_tokens,
            75);  // the cache's 80 tokens bind before the context's 100
  GenerateInput given = Text("abcd");
  given.max_tokens_given = true;
  given.sampling.max_tokens = 9;
  ASSERT_TRUE(Submit(std::move(given)).ok());
  EXPECT_EQ(engine_.last_request().sampling.max_tokens, 9);
}

TEST_F(GenerateServiceTest, RefusesPromptsThatLeaveNoRoom) {
  ExpectInvalid(Text(std::string(99, 'x')), "prompt", "100 tokens",
                absl::StatusCode::kOutOfRange);  // with BOS exactly the context
  ExpectInvalid(Text(std::string(500, 'x')), "prompt", "501 tokens", absl::StatusCode::kOutOfRange);
  GenerateInput chat;
  chat.prompt = std::vector<ChatMessage>{{"user", std::string(500, 'x'), ""}};
  ExpectInvalid(std::move(chat), "messages", "context", absl::StatusCode::kOutOfRange);
  GenerateInput scored = Text(std::string(99, 'x'));  // echo of a full context, nothing generated
  scored.echo = true;
  scored.max_tokens_given = true;
  scored.sampling.max_tokens = 0;
  EXPECT_TRUE(Submit(std::move(scored)).ok());
}

// Each of them stays in memory until the answer is whole.
TEST_F(GenerateServiceTest, LogProbabilitiesOfPromptsAreBounded) {
  GenerateInput input = Text(std::string(90, 'x'));  // 91 tokens
  input.echo = true;
  input.max_tokens_given = true;
  input.sampling.max_tokens = 0;
  input.sampling.n = 16;
  input.sampling.logprobs = 5;
  const absl::StatusOr<Submitted> submitted = Submit(input);
  ASSERT_TRUE(submitted.ok()) << submitted.status();
  EXPECT_EQ(submitted->scored, 91 * 16 * 6);
  EXPECT_TRUE(GenerateService::CheckScored(1 << 20, 1 << 22).ok());
  EXPECT_FALSE(GenerateService::CheckScored(0, (1 << 22) + 1).ok());
  const absl::Status many = GenerateService::CheckScored((1 << 20) + 1, 0);
  EXPECT_EQ(many.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(many.message()), StartsWith("logprobs: "));
  input.echo = false;
  EXPECT_EQ(Submit(input)->scored, 0);
}

TEST_F(GenerateServiceTest, SoAreThoseOfAnswersThatAreKeptUntilTheyAreWhole) {
  GenerateInput input = Text("abcd");  // 5 tokens; the context has 95 more
  input.sampling.n = 16;
  input.sampling.logprobs = 20;
  input.max_tokens_given = true;
  input.sampling.max_tokens = 9;
  EXPECT_EQ(Submit(input)->kept, 0);
  input.whole = true;
  EXPECT_EQ(Submit(input)->kept, 9 * 16 * 21);
  input.sampling.max_tokens = 1000000;
  EXPECT_EQ(Submit(input).status().code(), absl::StatusCode::kOk);
  EXPECT_EQ(Submit(input)->kept, 95 * 16 * 21);
}

// Tokenizing may take seconds and much memory.
TEST_F(GenerateServiceTest, TextsThatCannotFitAreNotTokenized) {
  class Refusing : public ByteTokenizer {
   public:
    std::vector<TokenId> Encode(std::string_view text, bool add_special, bool parse_special) const override {
      EXPECT_LT(text.size(), 100000u);
      return ByteTokenizer::Encode(text, add_special, parse_special);
    }
  } tokenizer;
  GenerateService service = Service(&tokenizer);
  const auto refusal = [&](PromptInput prompt) {
    GenerateInput input;
    input.prompt = std::move(prompt);
    const absl::Status status = service.Generate(std::move(input), std::make_shared<NullSink>()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(refusal(std::string(200000, 'x')), StartsWith("prompt: has 200000 bytes"));
  const std::string half(100000, 'x');
  EXPECT_THAT(refusal(std::vector<ChatMessage>{{"user", half, ""}, {"user", half, ""}}),
              StartsWith("messages: has 200000 bytes"));
  // White space may be folded: who knows before.
  EXPECT_THAT(refusal(std::string(90000, ' ')), HasSubstr("90001 tokens"));
}

TEST_F(GenerateServiceTest, UnknownModelIsNotFound) {
  GenerateInput input = Text("a");
  input.model = "gpt-5";
  const absl::Status status = Submit(std::move(input)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("'tiny'"));
  GenerateInput good = Text("a");
  good.model = "tiny";
  EXPECT_TRUE(Submit(std::move(good)).ok());
}

TEST_F(GenerateServiceTest, LimitsNameTheFieldAndTheLimit) {
  GenerateInput input = Text("a");
  input.sampling.n = config_.limits.max_n + 1;
  ExpectInvalid(std::move(input), "n", "limits.max_n");
  input = Text("a");
  input.sampling.n = 0;
  ExpectInvalid(std::move(input), "n");
  input = Text("a");
  input.sampling.logprobs = config_.limits.max_logprobs + 1;
  ExpectInvalid(std::move(input), "logprobs", "limits.max_logprobs");
  input = Text("a");
  input.sampling.stop.assign(config_.limits.max_stop_strings + 1, "x");
  ExpectInvalid(std::move(input), "stop", "limits.max_stop_strings");
  input = Text("a");
  input.sampling.min_tokens = 90;
  ExpectInvalid(std::move(input), "min_tokens");
}

TEST_F(GenerateServiceTest, SamplingRangesAreChecked) {
  GenerateInput input = Text("a");
  input.sampling.temperature = -1;
  ExpectInvalid(std::move(input), "temperature", "-1");
  input = Text("a");
  input.sampling.top_p = 0;
  ExpectInvalid(std::move(input), "top_p");
  input = Text("a");
  input.sampling.logit_bias = {{ByteTokenizer::kVocabSize, 1.0f}};
  ExpectInvalid(std::move(input), "logit_bias");
}

TEST_F(GenerateServiceTest, TokenIdsMustBeInTheVocabulary) {
  ExpectInvalid(Ids({1, 2, ByteTokenizer::kVocabSize}), "prompt", "258 at position 2");
  ExpectInvalid(Ids({-1}), "prompt", "-1");
  ASSERT_TRUE(Submit(Ids({0, ByteTokenizer::kVocabSize - 1})).ok());
  EXPECT_THAT(engine_.last_request().prompt, ElementsAre(0, 257));  // as given: no BOS before ids
}

TEST_F(GenerateServiceTest, EmptyPromptStartsFromBosWhereThereIsOne) {
  ASSERT_TRUE(Submit(Ids({})).ok());
  EXPECT_THAT(engine_.last_request().prompt, ElementsAre(ByteTokenizer::kBos));
  const ByteTokenizer bos_only_on_request(/*has_bos=*/true, /*adds_bos=*/false);
  ASSERT_TRUE(Service(&bos_only_on_request).Generate(Text(""), std::make_shared<NullSink>()).ok());
  EXPECT_THAT(engine_.last_request().prompt, ElementsAre(ByteTokenizer::kBos));
  const ByteTokenizer no_bos(/*has_bos=*/false);
  const absl::Status status = Service(&no_bos).Generate(Text(""), std::make_shared<NullSink>()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), StartsWith("prompt:"));
}

TEST_F(GenerateServiceTest, ControlTokensOfAPromptAreSuchAndOfMessagesText) {
  ASSERT_TRUE(Submit(Text("a<eos>")).ok());
  EXPECT_THAT(engine_.last_request().prompt, ElementsAre(ByteTokenizer::kBos, 'a', ByteTokenizer::kEos));
  EXPECT_THAT(*Service().Tokenize("a<eos>", false), ElementsAre('a', ByteTokenizer::kEos));
  GenerateInput chat;
  chat.prompt = std::vector<ChatMessage>{{"user", "<eos>", ""}};
  ASSERT_TRUE(Submit(std::move(chat)).ok());
  EXPECT_THAT(engine_.last_request().prompt, ::testing::Not(::testing::Contains(ByteTokenizer::kEos)));
}

TEST_F(GenerateServiceTest, ChatUsesTheTemplateAndItsStops) {
  const absl::StatusOr<ChatTemplate> plain = ChatTemplate::Create("plain");
  ASSERT_TRUE(plain.ok());
  const std::vector<ChatMessage> messages = {{"user", "hi", ""}};
  GenerateInput input;
  input.prompt = messages;
  input.sampling.stop = {"mine"};
  ASSERT_TRUE(Submit(std::move(input)).ok());
  const Request request = engine_.last_request();
  const absl::StatusOr<std::vector<TokenId>> rendered = plain->Render(messages, tokenizer_, true);
  ASSERT_TRUE(rendered.ok());
  EXPECT_EQ(request.prompt, *rendered);
  EXPECT_EQ(request.sampling.stop.front(), "mine");
  EXPECT_EQ(request.sampling.stop.size() + request.sampling.stop_token_ids.size(),
            1 + plain->StopStrings().size() + plain->StopTokens().size());
  GenerateInput empty;
  empty.prompt = std::vector<ChatMessage>{};
  ExpectInvalid(std::move(empty), "messages");
}

TEST_F(GenerateServiceTest, ControlTokensOfATemplateStopByIdOrByText) {
  const absl::StatusOr<ChatTemplate> chatml = ChatTemplate::Create("chatml");
  ASSERT_TRUE(chatml.ok());
  GenerateService service(&engine_, &tokenizer_, *chatml, Service().model(), config_);
  GenerateInput input;
  input.prompt = std::vector<ChatMessage>{{"user", "hi", ""}};
  ASSERT_TRUE(service.Generate(std::move(input), std::make_shared<NullSink>()).ok());
  const std::vector<std::string> stop = engine_.last_request().sampling.stop;
  for (const std::string& token :
       chatml->StopTokens()) {  // this tokenizer has none of them: their text stops
    EXPECT_THAT(stop, ::testing::Contains(token));
  }
  EXPECT_FALSE(chatml->StopTokens().empty());
}

TEST_F(GenerateServiceTest, TokenizeAndDetokenize) {
  const GenerateService service = Service();
  EXPECT_THAT(*service.Tokenize("ab", true), ElementsAre(ByteTokenizer::kBos, 'a', 'b'));
  EXPECT_THAT(*service.Tokenize("ab", false), ElementsAre('a', 'b'));
  EXPECT_THAT(*service.Tokenize("", false), IsEmpty());
  EXPECT_EQ(*service.Detokenize({'o', 'k'}), "ok");
  const absl::Status status = service.Detokenize({'o', 999}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), StartsWith("tokens:"));
}

TEST_F(GenerateServiceTest, AuthorizationKnowsEveryKeyAndNoOther) {
  EXPECT_TRUE(Service().Authorized(""));
  config_.server.api_keys = {"alpha", "beta"};
  const GenerateService service = Service();
  EXPECT_TRUE(service.Authorized("alpha"));
  EXPECT_TRUE(service.Authorized("beta"));
  for (const char* wrong : {"", "alph", "alpha ", "Alpha", "gamma"})
    EXPECT_FALSE(service.Authorized(wrong)) << wrong;
}

TEST_F(GenerateServiceTest, PassesTheEnginesRefusalOn) {
  FakeEngine::Options options = Held();
  options.max_requests = 0;
  FakeEngine full(options);
  GenerateService service(&full, &tokenizer_, *ChatTemplate::Create("plain"), Service().model(), config_);
  EXPECT_EQ(service.Generate(Text("a"), std::make_shared<NullSink>()).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(service.RetryAfter(), full.RetryAfter());
}

TEST_F(GenerateServiceTest, TheEnginesInvalidArgumentsNameAFieldToo) {
  const auto refused = [this](const std::string& message, PromptInput prompt) {
    FakeEngine::Options options = Held();
    options.refusal = absl::InvalidArgumentError(message);
    FakeEngine engine(options);
    GenerateService service(&engine, &tokenizer_, *ChatTemplate::Create("plain"), Service().model(), config_);
    GenerateInput input;
    input.prompt = std::move(prompt);
    return std::string(service.Generate(std::move(input), std::make_shared<NullSink>()).status().message());
  };
  EXPECT_EQ(refused("it needs 9 blocks: too many", "a"), "prompt: it needs 9 blocks: too many");
  EXPECT_EQ(refused("it needs 9 blocks", std::vector<ChatMessage>{{"user", "hi", ""}}),
            "messages: it needs 9 blocks");
  EXPECT_EQ(refused("stop: not here", "a"), "stop: not here");
}

TEST(RequestIdTest, AreFreshAndWellFormed) {
  std::set<std::string> seen;
  for (int i = 0; i < 1000; ++i) {
    const std::string id = NewRequestId();
    EXPECT_THAT(id, StartsWith("atp-"));
    EXPECT_EQ(id.substr(4).find_first_not_of("0123456789abcdef"), std::string::npos);
    EXPECT_THAT(id, SizeIs(28));
    seen.insert(id);
  }
  EXPECT_THAT(seen, SizeIs(1000));
  EXPECT_FALSE(AtpVersion().empty());
}

}  // namespace
}  // namespace atp
