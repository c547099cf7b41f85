#include "server/openai_json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "engine/utf8.h"
#include "tests/server/byte_tokenizer.h"

namespace atp {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

CompletionCall Completion(const std::string& fields) {
  const auto call = ParseCompletionCall("{\"prompt\":\"x\"" + (fields.empty() ? "" : "," + fields) + "}", {});
  EXPECT_TRUE(call.ok()) << fields << call.status();
  return call.value_or(CompletionCall());
}

CompletionCall Chat(const std::string& fields,
                    const std::string& messages = R"([{"role":"user","content":"x"}])") {
  const auto call =
      ParseChatCall("{\"messages\":" + messages + (fields.empty() ? "" : "," + fields) + "}", {});
  EXPECT_TRUE(call.ok()) << fields << call.status();
  return call.value_or(CompletionCall());
}

std::string ErrorOf(const absl::Status& status) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  return std::string(status.message());
}
std::string CompletionError(const std::string& body) {
  return ErrorOf(ParseCompletionCall(body, {}).status());
}
std::string FieldError(const std::string& fields) {
  return CompletionError("{\"prompt\":\"x\"," + fields + "}");
}
std::string ChatError(const std::string& fields) {
  return ErrorOf(
      ParseChatCall(R"({"messages":[{"role":"user","content":"x"}],)" + fields + "}", {}).status());
}
std::string MessagesError(const std::string& messages) {
  return ErrorOf(ParseChatCall("{\"messages\":" + messages + "}", {}).status());
}

TEST(ParseCompletion, ModelsDefaultsGiveWayToTheBody) {
  SamplingParams defaults;
  defaults.temperature = 0.6f;
  defaults.top_k = 40;
  defaults.top_p = 0.9f;
  const auto completion = ParseCompletionCall(R"({"prompt":"x","top_k":-1,"top_p":null})", {}, defaults);
  const auto chat = ParseChatCall(R"({"messages":[{"role":"user","content":"x"}],"top_k":0})", {}, defaults);
  for (const auto& call : {completion, chat}) {
    ASSERT_TRUE(call.ok()) << call.status();
    EXPECT_EQ(call->sampling.temperature, 0.6f);
    EXPECT_EQ(call->sampling.top_k, 0);
    EXPECT_EQ(call->sampling.top_p, 0.9f);
  }
}

TEST(ParseCompletion, DefaultsAreOpenAis) {
  const CompletionCall call = Completion("");
  EXPECT_FALSE(call.chat);
  EXPECT_EQ(call.sampling.max_tokens, 16);
  EXPECT_TRUE(call.max_tokens_given);
  EXPECT_EQ(call.sampling.n, 1);
  EXPECT_EQ(call.sampling.temperature, 1.0f);
  EXPECT_FALSE(call.sampling.logprobs.has_value());
  EXPECT_FALSE(call.sampling.seed.has_value());
  EXPECT_FALSE(call.stream);
}

TEST(ParseCompletion, Compression) {
  EXPECT_FALSE(Completion("").compression.has_value());
  EXPECT_FALSE(Completion(R"("atp":null)").compression.has_value());
  const auto preset = Chat(R"("atp":{"preset":"compact"})").compression;
  ASSERT_TRUE(preset.has_value());
  EXPECT_EQ(preset->preset, "compact");
  EXPECT_FALSE(preset->ratio.has_value() || preset->bits.has_value());
  const auto ratio = Completion(R"("atp":{"ratio":0.25,"bits":4,"preset":null})").compression;
  ASSERT_TRUE(ratio.has_value());
  EXPECT_EQ(ratio->ratio, 0.25);
  EXPECT_EQ(ratio->bits, 4);
  EXPECT_FALSE(ratio->preset.has_value());
  EXPECT_EQ(Completion(R"("atp":{"ratio":1})").compression->ratio, 1);
  EXPECT_EQ(FieldError(R"("atp":"compact")"), "atp: must be an object with preset or ratio, got a string");
  EXPECT_EQ(FieldError(R"("atp":{"preset":4})"), "atp.preset: must be a string, got 4");
  EXPECT_EQ(FieldError(R"("atp":{"ratio":"0.5"})"), "atp.ratio: must be a number, got a string");
  EXPECT_EQ(FieldError(R"("atp":{"ratio":0.5,"bits":4.5})"), "atp.bits: must be an integer, got 4.5");
  EXPECT_EQ(FieldError(R"("atp":{"ration":0.5})"), "atp: has preset, ratio and bits, but no 'ration'");
  EXPECT_THAT(ChatError(R"("atp":{"bits":true})"), StartsWith("atp.bits: "));
}

TEST(ParseCompletion, EveryFieldArrives) {
  const CompletionCall call = Completion(
      R"("model":"m","temperature":0.5,"top_p":0.9,"top_k":7,"min_p":0.1,"presence_penalty":-1,"frequency_penalty":2,
         "repetition_penalty":1.5,"seed":-3,"stop":["a","b"],"include_stop_str_in_output":true,"stop_token_ids":[1,2],
         "min_tokens":2,"ignore_eos":true,"n":3,"best_of":3,"priority":-4,"user":"u","stream":true,
         "stream_options":{"include_usage":true},"logit_bias":{"5":-100,"6":1.5},"echo":true,"max_tokens":0,"logprobs":4)");
  EXPECT_EQ(call.model, "m");
  EXPECT_EQ(call.sampling.temperature, 0.5f);
  EXPECT_EQ(call.sampling.top_p, 0.9f);
  EXPECT_EQ(call.sampling.top_k, 7);
  EXPECT_EQ(call.sampling.min_p, 0.1f);
  EXPECT_EQ(call.sampling.presence_penalty, -1.0f);
  EXPECT_EQ(call.sampling.frequency_penalty, 2.0f);
  EXPECT_EQ(call.sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(call.sampling.seed, static_cast<uint64_t>(-3));
  EXPECT_THAT(call.sampling.stop, ElementsAre("a", "b"));
  EXPECT_TRUE(call.sampling.include_stop_in_output);
  EXPECT_THAT(call.sampling.stop_token_ids, ElementsAre(1, 2));
  EXPECT_EQ(call.sampling.min_tokens, 2);
  EXPECT_TRUE(call.sampling.ignore_eos);
  EXPECT_EQ(call.sampling.n, 3);
  EXPECT_EQ(call.priority, -4);
  EXPECT_TRUE(call.stream && call.include_usage && call.echo);
  EXPECT_THAT(call.sampling.logit_bias, ElementsAre(std::pair(5, -100.0f), std::pair(6, 1.5f)));
  EXPECT_EQ(call.sampling.max_tokens, 0);
  EXPECT_EQ(call.sampling.logprobs, 4);
}

TEST(ParseCompletion, PromptHasFourForms) {
  EXPECT_EQ(std::get<std::string>(ParseCompletionCall(R"({"prompt":""})", {})->prompts.at(0)), "");
  const auto strings = ParseCompletionCall(R"({"prompt":["a","b"]})", {});
  ASSERT_EQ(strings->prompts.size(), 2u);
  EXPECT_EQ(std::get<std::string>(strings->prompts[1]), "b");
  const auto ids = ParseCompletionCall(R"({"prompt":[1,2.0]})", {});
  ASSERT_EQ(ids->prompts.size(), 1u);
  EXPECT_THAT(std::get<std::vector<TokenId>>(ids->prompts[0]), ElementsAre(1, 2));
  const auto lists = ParseCompletionCall(R"({"prompt":[[1],[2,3]]})", {});
  ASSERT_EQ(lists->prompts.size(), 2u);
  EXPECT_THAT(std::get<std::vector<TokenId>>(lists->prompts[1]), ElementsAre(2, 3));
}

TEST(ParseCompletion, WrongPromptsAreRefused) {
  for (const char* prompt : {"7", "{}", "[]", "null", "[1,\"a\"]", "[\"a\",1]", "[[1],\"a\"]", "[-1]",
                             "[1.5]", "[[\"a\"]]", "[3000000000]", "[null]", "[true]"}) {
    EXPECT_THAT(CompletionError(absl::StrCat("{\"prompt\":", prompt, "}")), StartsWith("prompt: ")) << prompt;
  }
  EXPECT_THAT(CompletionError("{}"), StartsWith("prompt: "));
  LimitsConfig limits;
  limits.max_prompts = 2;
  EXPECT_TRUE(ParseCompletionCall(R"({"prompt":["a","b"]})", limits).ok());
  EXPECT_FALSE(ParseCompletionCall(R"({"prompt":["a","b","c"]})", limits).ok());
}

TEST(ParseCompletion, WrongTypesAndRangesNameTheField) {
  for (const char* fields : {"\"max_tokens\":\"ten\"",
                             "\"max_tokens\":1.5",
                             "\"max_tokens\":-1",
                             "\"max_tokens\":0",
                             "\"max_tokens\":1e300",
                             "\"max_tokens\":99999999999",
                             "\"temperature\":\"warm\"",
                             "\"temperature\":1e300",
                             "\"top_p\":[]",
                             "\"n\":0",
                             "\"n\":1000",
                             "\"n\":true",
                             "\"stream\":\"yes\"",
                             "\"stop\":7",
                             "\"stop\":[1]",
                             "\"stop\":\"\"",
                             "\"logit_bias\":[1]",
                             "\"logit_bias\":{\"x\":1}",
                             "\"logit_bias\":{\"1\":\"a\"}",
                             "\"logit_bias\":{\"1\":101}",
                             "\"logit_bias\":{\"-1\":1}",
                             "\"logprobs\":true",
                             "\"logprobs\":21",
                             "\"best_of\":2",
                             "\"suffix\":\"s\"",
                             "\"seed\":1.5",
                             "\"seed\":\"a\"",
                             "\"user\":7",
                             "\"model\":7",
                             "\"echo\":1",
                             "\"stop_token_ids\":[\"a\"]",
                             "\"stream_options\":{}",
                             "\"priority\":\"high\"",
                             "\"response_format\":{\"type\":\"json_object\"}",
                             "\"response_format\":\"text\"",
                             "\"guided_json\":{\"a\":1}",
                             "\"json_schema\":{\"a\":1}",
                             "\"grammar\":\"root ::= x\"",
                             "\"allowed_token_ids\":[5]",
                             "\"use_beam_search\":true"}) {
    const std::string name = std::string(fields).substr(1, std::string(fields).find('"', 1) - 1);
    EXPECT_THAT(FieldError(fields), StartsWith(name + ": ")) << fields;
  }
}

TEST(ParseCompletion, NullIsAbsentAndUnknownIsIgnored) {
  const CompletionCall call = Completion(
      R"("max_tokens":null,"stop":null,"logprobs":null,"suffix":null,"n":null,"seed":null,"metadata":{"a":[1]},"zzz":1,
         "response_format":{"type":"text"},"suffix2":"x","stream_options":null)");
  EXPECT_EQ(call.sampling.max_tokens, 16);
  EXPECT_FALSE(call.sampling.logprobs.has_value());
}

TEST(ParseCompletion, IntegersMayBeWrittenAsIntegralNumbers) {
  EXPECT_EQ(Completion("\"max_tokens\":1.0").sampling.max_tokens, 1);
  EXPECT_EQ(Completion("\"max_tokens\":1e2").sampling.max_tokens, 100);
  EXPECT_EQ(Completion("\"seed\":18446744073709551615").sampling.seed, UINT64_MAX);
  EXPECT_EQ(Completion("\"top_k\":-1").sampling.top_k, 0);
  EXPECT_FALSE(Completion("\"seed\":-1").sampling.seed.has_value());
  EXPECT_EQ(Completion("\"seed\":-2").sampling.seed, UINT64_MAX - 1);
}

TEST(ParseBody, RefusesWhatIsNotOneFlatUnambiguousObject) {
  for (const std::string& body :
       {std::string(""), std::string("{"), std::string("[1]"), std::string("nul"),
        std::string("{\"prompt\":\"\xff\"}"), std::string("{\"prompt\":\"x\"} x"),
        std::string("{\"prompt\":1e999}"), std::string("{\"prompt\":NaN}"),
        std::string("{\"prompt\":\"x\0\"}", 14), std::string("{\"prompt\":\"\\ud800\"}"),
        std::string(100000, '['),
        "{\"prompt\":\"x\",\"a\":" + std::string(40, '[') + std::string(40, ']') + "}"}) {
    EXPECT_FALSE(ParseCompletionCall(body, {}).ok()) << body.substr(0, 40);
  }
  EXPECT_THAT(CompletionError(R"({"prompt":"x","n":1,"n":2})"), StartsWith("n: is given twice"));
  EXPECT_THAT(FieldError(R"("logit_bias":{"1":1,"1":2})"), HasSubstr("twice"));
  EXPECT_THAT(FieldError(R"("a":[{"b":1},{"c":{"b":1,"b":2}}])"), StartsWith("b: is given twice"));
  // Brackets in strings are no depth.
  EXPECT_TRUE(ParseCompletionCall("{\"prompt\":\"\\\"" + std::string(100, '[') + "\"}", {}).ok());
}

// A parser that looks at all objects so far at the end of each would take hours, on the thread of all
// sockets.
TEST(ParseBody, AMillionObjectsCostWhatTheirBytesCost) {
  std::string body = R"({"prompt":"x","z":[{})";
  for (int i = 0; i < 1'300'000; ++i) body += ",{}";
  EXPECT_TRUE(ParseCompletionCall(body + "]}", {}).ok());
}

TEST(ParseChat, MessagesAndDefaults) {
  const CompletionCall call = Chat(
      "", R"([{"role":"system","content":"s"},{"role":"user","name":"n","content":[{"type":"text","text":"a"},
                {"type":"text","text":"b"}]}])");
  EXPECT_TRUE(call.chat);
  EXPECT_FALSE(call.max_tokens_given);
  const auto& messages = std::get<std::vector<ChatMessage>>(call.prompts.at(0));
  ASSERT_EQ(messages.size(), 2u);
  EXPECT_EQ(messages[0].role, "system");
  EXPECT_EQ(messages[1].name, "n");
  EXPECT_EQ(messages[1].content, "a\nb");
}

TEST(ParseChat, TheNewerNameOfMaxTokensWins) {
  EXPECT_EQ(Chat("\"max_tokens\":5").sampling.max_tokens, 5);
  EXPECT_EQ(Chat("\"max_completion_tokens\":6,\"max_tokens\":5").sampling.max_tokens, 6);
  EXPECT_TRUE(Chat("\"max_completion_tokens\":6").max_tokens_given);
  EXPECT_FALSE(Chat("\"max_completion_tokens\":null").max_tokens_given);
}

TEST(ParseChat, LogprobsIsASwitch) {
  EXPECT_EQ(Chat("\"logprobs\":true").sampling.logprobs, 0);
  EXPECT_EQ(Chat("\"logprobs\":true,\"top_logprobs\":3").sampling.logprobs, 3);
  EXPECT_FALSE(Chat("\"logprobs\":false").sampling.logprobs.has_value());
  EXPECT_THAT(ChatError("\"logprobs\":5"), StartsWith("logprobs: "));
  EXPECT_THAT(ChatError("\"top_logprobs\":3"), StartsWith("top_logprobs: "));
  EXPECT_THAT(ChatError("\"logprobs\":true,\"top_logprobs\":21"), StartsWith("top_logprobs: "));
}

TEST(ParseChat, WhatCannotBeHonouredIsRefused) {
  for (const char* fields :
       {"\"tools\":[{\"type\":\"function\"}]", "\"tool_choice\":\"auto\"", "\"functions\":[{}]",
        "\"function_call\":\"auto\"", "\"modalities\":[\"audio\"]", "\"audio\":{\"voice\":\"x\"}",
        "\"response_format\":{\"type\":\"json_schema\"}", "\"continue_final_message\":true"}) {
    const std::string name = std::string(fields).substr(1, std::string(fields).find('"', 1) - 1);
    EXPECT_THAT(ChatError(fields), StartsWith(name + ": ")) << fields;
    EXPECT_THAT(ChatError(fields), HasSubstr("supported")) << fields;
  }
  Chat(R"("tools":[],"tool_choice":"none","modalities":["text"],"store":true)");
  EXPECT_TRUE(Chat("").add_generation_prompt);
  EXPECT_FALSE(Chat("\"add_generation_prompt\":false").add_generation_prompt);
}

// A history that the official client sends back as it came.
TEST(ParseChat, AnAssistantsContentMayBeMissingOrARefusal) {
  const absl::StatusOr<CompletionCall> call = ParseChatCall(
      R"({"messages":[{"role":"assistant","content":null},{"role":"assistant"},
          {"role":"assistant","content":null,"refusal":"no"},
          {"role":"assistant","content":[{"type":"text","text":"a"},{"type":"refusal","refusal":"b"}]}]})",
      {});
  ASSERT_TRUE(call.ok()) << call.status();
  std::vector<std::string> contents;
  for (const ChatMessage& message : std::get<std::vector<ChatMessage>>(call->prompts.at(0)))
    contents.push_back(message.content);
  EXPECT_THAT(contents, ElementsAre("", "", "no", "a\nb"));
  EXPECT_THAT(MessagesError(R"([{"role":"user","content":null}])"), StartsWith("messages[0].content: "));
  EXPECT_THAT(MessagesError(R"([{"role":"user","content":[{"type":"refusal","refusal":"b"}]}])"),
              StartsWith("messages[0].content: "));
}

TEST(ParseChat, WrongMessagesNameThem) {
  EXPECT_THAT(ErrorOf(ParseChatCall("{}", {}).status()), StartsWith("messages: "));
  for (const char* messages : {"\"hello\"", "[]", "{}", "7"}) {
    EXPECT_THAT(MessagesError(messages), StartsWith("messages: ")) << messages;
  }
  EXPECT_THAT(MessagesError("[1]"), StartsWith("messages[0]: "));
  EXPECT_THAT(MessagesError(R"([{"content":"x"}])"), StartsWith("messages[0].role: "));
  EXPECT_THAT(MessagesError(R"([{"role":1,"content":"x"}])"), StartsWith("messages[0].role: "));
  EXPECT_THAT(MessagesError(R"([{"role":"user"}])"), StartsWith("messages[0].content: "));
  EXPECT_THAT(MessagesError(R"([{"role":"user","content":"x"},{"role":"user","content":3}])"),
              StartsWith("messages[1].content: "));
  EXPECT_THAT(MessagesError(R"([{"role":"user","content":[{"type":"image_url","image_url":{}}]}])"),
              StartsWith("messages[0].content: "));
  EXPECT_THAT(MessagesError(R"([{"role":"assistant","content":"x","tool_calls":[{}]}])"),
              StartsWith("messages[0].tool_calls: "));
}

TEST(ParseTokenize, AcceptsVllmsAndLlamaServersForms) {
  EXPECT_TRUE(ParseTokenizeCall(R"({"prompt":"x"})")->add_special);
  EXPECT_FALSE(ParseTokenizeCall(R"({"prompt":"x","add_special_tokens":false})")->add_special);
  EXPECT_FALSE(ParseTokenizeCall(R"({"content":"x"})")->add_special);
  EXPECT_TRUE(ParseTokenizeCall(R"({"content":"x","add_special":true})")->add_special);
  const auto chat = ParseTokenizeCall(R"({"messages":[{"role":"user","content":"x"}]})");
  EXPECT_EQ(std::get<std::vector<ChatMessage>>(chat->input).size(), 1u);
  EXPECT_FALSE(ParseTokenizeCall("{}").ok());
  EXPECT_FALSE(ParseTokenizeCall(R"({"prompt":"x","content":"y"})").ok());
  EXPECT_FALSE(ParseTokenizeCall(R"({"prompt":7})").ok());
  EXPECT_THAT(ParseDetokenizeCall(R"({"tokens":[1,2]})")->tokens, ElementsAre(1, 2));
  EXPECT_FALSE(ParseDetokenizeCall("{}").ok());
  EXPECT_FALSE(ParseDetokenizeCall(R"({"tokens":"x"})").ok());
}

TEST(RenderError, HasOpenAisShape) {
  const json error = json::parse(RenderError(400, "n: must be in [1, 16]")).at("error");
  EXPECT_EQ(error.at("message"), "n: must be in [1, 16]");
  EXPECT_EQ(error.at("type"), "invalid_request_error");
  EXPECT_EQ(error.at("param"), "n");
  EXPECT_EQ(error.at("code"), nullptr);
  EXPECT_EQ(json::parse(RenderError(400, "no field here")).at("error").at("param"), nullptr);
  EXPECT_EQ(json::parse(RenderError(400, "this is prose: not a field")).at("error").at("param"), nullptr);
  EXPECT_EQ(json::parse(RenderError(404, "model: 'x' is not served")).at("error").at("code"),
            "model_not_found");
  EXPECT_EQ(json::parse(RenderError(429, "full")).at("error").at("code"), "rate_limit_exceeded");
  EXPECT_EQ(json::parse(RenderError(400, "long", "context_length_exceeded")).at("error").at("code"),
            "context_length_exceeded");
  EXPECT_EQ(json::parse(RenderError(504, "late")).at("error").at("code"), "deadline_exceeded");
  EXPECT_TRUE(IsValidUtf8(RenderError(400, "bad \xff bytes")));
}

class Render : public ::testing::Test {
 protected:
  AnswerHeader Header(bool chat, bool logprobs, int top) const {
    AnswerHeader header;
    header.chat = chat;
    header.with_logprobs = logprobs;
    header.top_logprobs = top;
    header.id = "id-1";
    header.created_unix_seconds = 5;
    header.model = "m";
    return header;
  }
  json Chunk(const AnswerHeader& header, const ChoicePiece& piece, TextPosition* position) const {
    return json::parse(RenderChunk(header, piece, tokenizer_, position));
  }

  const testing::ByteTokenizer tokenizer_;
};

TEST_F(Render, CompletionLogprobsHaveOffsetsInCharacters) {
  ChoicePiece piece;
  piece.text = "\xC3\xA9z";  // "éz": the first character is two tokens
  piece.logprobs = {
      {0xC3, -1.0f, {{0xC3, -1.0f}, {'a', -2.0f}}}, {0xA9, -0.5f, {{'b', -0.25f}}}, {'z', -INFINITY, {}}};
  TextPosition position(&tokenizer_, /*echo=*/false);
  const json choice = Chunk(Header(false, true, 1), piece, &position).at("choices").at(0);
  const json& logprobs = choice.at("logprobs");
  EXPECT_EQ(choice.at("text"), "\xC3\xA9z");
  EXPECT_EQ(logprobs.at("tokens"), json({"bytes:\\xc3", "bytes:\\xa9", "z"}));
  EXPECT_EQ(logprobs.at("text_offset"), json({0, 0, 1}));
  EXPECT_EQ(logprobs.at("token_logprobs"), json({-1.0, -0.5, -9999.0}));
  EXPECT_EQ(logprobs.at("top_logprobs").at(0), json({{"bytes:\\xc3", -1.0}}));
  EXPECT_EQ(logprobs.at("top_logprobs").at(1),
            json({{"b", -0.25}, {"bytes:\\xa9", -0.5}}));  // and the chosen one
  EXPECT_EQ(position.offset(), 2);
}

TEST_F(Render, AnEchoedPromptsFirstTokenHasNoLogprob) {
  ChoicePiece piece;
  piece.logprobs = {{testing::ByteTokenizer::kBos, NAN, {}}, {'a', -1.0f, {}}};
  TextPosition position(&tokenizer_, /*echo=*/false);
  const json logprobs = Chunk(Header(false, true, 0), piece, &position).at("choices").at(0).at("logprobs");
  EXPECT_EQ(logprobs.at("token_logprobs"), json({nullptr, -1.0}));
  EXPECT_EQ(logprobs.at("top_logprobs"), json({nullptr, {{"a", -1.0}}}));
  EXPECT_EQ(logprobs.at("text_offset"), json({0, 0}));
}

TEST_F(Render, ChatLogprobsHaveBytes) {
  ChoicePiece piece;
  piece.text = "\xC3\xA9";
  piece.logprobs = {{0xC3, -1.0f, {{'a', -0.5f}, {0xC3, -1.0f}}}};
  TextPosition position(&tokenizer_, /*echo=*/false);
  const json choice = Chunk(Header(true, true, 2), piece, &position).at("choices").at(0);
  const json entry = choice.at("logprobs").at("content").at(0);
  EXPECT_EQ(entry.at("token"), "\xEF\xBF\xBD");
  EXPECT_EQ(entry.at("bytes"), json({0xC3}));
  EXPECT_EQ(entry.at("top_logprobs").size(), 2u);
  EXPECT_EQ(entry.at("top_logprobs").at(0).at("token"), "a");
  EXPECT_EQ(choice.at("delta"), json({{"content", "\xC3\xA9"}}));
}

TEST_F(Render, ChunksOfAChat) {
  AnswerHeader header = Header(true, false, 0);
  const json role = json::parse(RenderRoleChunk(header, 2));
  EXPECT_EQ(role.at("object"), "chat.completion.chunk");
  EXPECT_EQ(role.at("choices").at(0).at("index"), 2);
  EXPECT_EQ(role.at("choices").at(0).at("delta").at("role"), "assistant");
  EXPECT_FALSE(role.contains("usage"));
  header.include_usage = true;
  ChoicePiece last;
  last.finish = FinishReason::kLength;
  TextPosition position(&tokenizer_, /*echo=*/false);
  const json finish = Chunk(header, last, &position);
  EXPECT_EQ(finish.at("choices").at(0).at("finish_reason"), "length");
  EXPECT_EQ(finish.at("choices").at(0).at("delta"), json::object());
  EXPECT_TRUE(finish.at("usage").is_null());
  const json usage = json::parse(RenderUsageChunk(header, Usage{3, 4, 1}));
  EXPECT_EQ(usage.at("choices"), json::array());
  EXPECT_EQ(usage.at("usage").at("total_tokens"), 7);
  EXPECT_EQ(usage.at("usage").at("prompt_tokens_details").at("cached_tokens"), 1);
}

TEST_F(Render, WholeAnswersAreValidUtf8WhateverTheTextIs) {
  ChoicePiece piece;
  piece.text = "bad \xff\xfe \"quotes\" \n";
  piece.finish = FinishReason::kStop;
  for (bool chat : {false, true}) {
    const std::string text = RenderAnswer(Header(chat, false, 0), {piece}, Usage{1, 2, 0}, tokenizer_,
                                          {TextPosition(&tokenizer_, false)});
    EXPECT_TRUE(IsValidUtf8(text));
    const json answer = json::parse(text);
    EXPECT_EQ(answer.at("object"), chat ? "chat.completion" : "text_completion");
    EXPECT_EQ(answer.at("choices").at(0).at("finish_reason"), "stop");
    EXPECT_TRUE(answer.at("choices").at(0).at("logprobs").is_null());
    EXPECT_EQ(answer.at("usage").at("completion_tokens"), 2);
  }
}

}  // namespace
}  // namespace atp
