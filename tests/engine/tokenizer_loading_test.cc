// Model directories as they come, whole and broken: each problem is one message that names the file, never a
// crash.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>

#include "absl/strings/escaping.h"
#include "engine/tokenizer.h"
#include "engine/tokenizer_config.h"

namespace atp {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

const std::string kRoot = ATP_SOURCE_DIR;

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

class TokenizerLoading : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = testing::TempDir() + "/tokenizer_loading_" +
                 testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  void Write(const std::string& name, const std::string& bytes) {
    std::ofstream(directory_ + "/" + name, std::ios::binary) << bytes;
  }
  void UseLlama3Json() {
    Write("tokenizer.json", ReadAll(kRoot + "/tests/engine/tokenizer_vectors/llama3.json"));
  }
  void UseSentencePiece() { Write("tokenizer.model", ReadAll(kRoot + "/models/default/tokenizer.model")); }

  std::string Error(int64_t embedding_rows = 0) {
    const auto tokenizer = LoadTokenizer(directory_, embedding_rows);
    return tokenizer.ok() ? "ok" : std::string(tokenizer.status().message());
  }

  std::string directory_;
};

TEST_F(TokenizerLoading, NamesWhatIsMissing) {
  EXPECT_THAT(Error(), HasSubstr("neither tokenizer.model nor tokenizer.json"));
  EXPECT_THAT(Error(), HasSubstr(directory_));
}

TEST_F(TokenizerLoading, VocabularyMustFitTheEmbedding) {
  UseSentencePiece();
  EXPECT_EQ(Error(6144), "ok");
  EXPECT_EQ(Error(7000), "ok");  // embeddings are often padded
  EXPECT_THAT(Error(6143), testing::AllOf(HasSubstr("6144"), HasSubstr("6143")));
}

TEST_F(TokenizerLoading, ConfigGoesBeforeTheTokenizer) {
  UseLlama3Json();
  auto tokenizer = *LoadTokenizer(directory_, 0);
  const TokenId start = *tokenizer->IdOf("<|im_start|>"), end = *tokenizer->IdOf("<|im_end|>");
  const TokenId text_end = *tokenizer->IdOf("<|endoftext|>");
  EXPECT_TRUE(tokenizer->adds_bos());  // its post-processor begins with <|im_start|>
  EXPECT_EQ(tokenizer->special().bos, start);

  Write("tokenizer_config.json",
        R"({"add_bos_token": false, "bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"})");
  Write("generation_config.json", "{\"eos_token_id\": [" + std::to_string(text_end) + "]}");
  Write("config.json", R"({"eos_token_id": 1, "bos_token_id": 2})");
  tokenizer = *LoadTokenizer(directory_, 0);
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->special().bos, text_end);
  EXPECT_THAT(tokenizer->special().eos, ElementsAre(text_end, end));
  EXPECT_NE(tokenizer->Encode("a", true, false)[0], text_end);
}

TEST_F(TokenizerLoading, SentencePieceTakesBosAndAddedTokensFromTheConfig) {
  UseSentencePiece();
  Write("tokenizer_config.json", R"({"add_bos_token": false, "eos_token": "<|end_of_call|>",
      "added_tokens_decoder": {"0": {"content": "<unk>", "special": true},
                               "6144": {"content": "<|call|>", "special": true},
                               "6145": {"content": "<|end_of_call|>", "special": true}}})");
  const auto tokenizer = *LoadTokenizer(directory_, 0);
  EXPECT_EQ(tokenizer->vocab_size(), 6146);
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_THAT(tokenizer->special().eos, ElementsAre(6145, 2));
  EXPECT_THAT(tokenizer->Encode("<|call|>", true, true), ElementsAre(6144));
  EXPECT_EQ(tokenizer->TokenBytes(6144, true), "<|call|>");
  EXPECT_EQ(tokenizer->TokenBytes(6144, false), "");
}

TEST_F(TokenizerLoading, SentencePieceTakesAddedTokensOfOlderModels) {
  UseSentencePiece();
  Write("tokenizer_config.json", R"({"eos_token": "<|end_of_call|>"})");
  Write("added_tokens.json", R"({"<|call|>": 6144, "<|end_of_call|>": 6145})");
  auto tokenizer = *LoadTokenizer(directory_, 0);
  EXPECT_THAT(tokenizer->special().eos, ElementsAre(6145, 2));
  EXPECT_THAT(tokenizer->Encode("<|call|>", false, true), ElementsAre(6144));
  EXPECT_EQ(tokenizer->TokenBytes(6144, false), "");
  Write("added_tokens.json", R"({"<|call|>": "one"})");
  EXPECT_THAT(std::string(LoadTokenizer(directory_, 0).status().message()),
              HasSubstr("added_tokens.json: must map tokens to ids, see '<|call|>'"));
  // A padding token that the model has no embedding for.
  std::filesystem::remove(directory_ + "/tokenizer_config.json");
  Write("added_tokens.json", R"({"<|call|>": 6143, "<pad>": 6144})");
  const auto smaller = LoadTokenizer(directory_, 6144);
  ASSERT_TRUE(smaller.ok()) << smaller.status();
  EXPECT_EQ((*smaller)->vocab_size(), 6144);
  EXPECT_EQ((*smaller)->IdOf("<pad>"), std::nullopt);
  EXPECT_THAT(Error(6143), HasSubstr("the model's embedding has 6143 rows"));
}

TEST_F(TokenizerLoading, BrokenConfigsAreNamed) {
  UseLlama3Json();
  const auto with = [&](const std::string& name, const std::string& text) {
    Write(name, text);
    const std::string error = Error();
    std::filesystem::remove(directory_ + "/" + name);
    return error;
  };
  EXPECT_THAT(with("tokenizer_config.json", "{"), HasSubstr("tokenizer_config.json: not JSON"));
  EXPECT_THAT(with("tokenizer_config.json", "[]"), HasSubstr("expected a JSON object"));
  EXPECT_THAT(with("tokenizer_config.json", R"({"bos_token": "<nope>"})"), HasSubstr("'<nope>'"));
  const std::string long_key(5000, 'k');
  EXPECT_LT(with("tokenizer_config.json", R"({"added_tokens_decoder": {")" + long_key + R"(": 1}})").size(),
            500u);
  EXPECT_THAT(with("generation_config.json", "{\"" + long_key),
              HasSubstr("not JSON: a syntax error at byte"));
  EXPECT_THAT(with("tokenizer_config.json", R"({"added_tokens_decoder": {"x": {"content": "y"}}})"),
              HasSubstr("'x'"));
  EXPECT_THAT(with("tokenizer_config.json", R"({"added_tokens_decoder": {"999999999": {"content": "y"}}})"),
              HasSubstr("999999999"));
  EXPECT_THAT(with("generation_config.json", R"({"eos_token_id": 123456})"), HasSubstr("123456"));
  EXPECT_THAT(with("generation_config.json", R"({"eos_token_id": "two"})"), HasSubstr("eos_token_id"));
  EXPECT_THAT(with("config.json", "\x80"), HasSubstr("config.json"));
  EXPECT_EQ(with("config.json", R"({"bos_token_id": -1, "eos_token_id": null})"), "ok");
}

TEST_F(TokenizerLoading, ChatTemplates) {
  EXPECT_EQ(*ReadChatTemplate(directory_), "");
  Write("tokenizer_config.json", R"({"chat_template": "one"})");
  EXPECT_EQ(*ReadChatTemplate(directory_), "one");
  Write(
      "tokenizer_config.json",
      R"({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]})");
  EXPECT_EQ(*ReadChatTemplate(directory_), "d");
  Write("chat_template.jinja", "file");
  EXPECT_EQ(*ReadChatTemplate(directory_), "file");
}

TEST_F(TokenizerLoading, TiktokenRanks) {
  std::string ranks;
  for (int b = 0; b < 256; ++b) {
    ranks += absl::Base64Escape(std::string(1, static_cast<char>(b))) + " " + std::to_string(b) + "\n";
  }
  ranks += absl::Base64Escape("he") + " 256\n" + absl::Base64Escape("llo") + " 258\n" +
           absl::Base64Escape("ll") + " 257";
  Write("tokenizer.model", ranks);
  const auto tokenizer = *LoadTokenizer(directory_, 0);
  EXPECT_EQ(tokenizer->vocab_size(), 259 + 256);
  EXPECT_THAT(tokenizer->Encode("hello", true, false), ElementsAre(259, 256, 258));
  EXPECT_THAT(tokenizer->Encode("<|eot_id|>", false, true), ElementsAre(268));
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode("<|eot_id|>", false, false)), "<|eot_id|>");
  Write("config.json", R"({"bos_token_id": 300})");  // as after losing lines
  EXPECT_THAT(Error(), HasSubstr("is the file complete?"));
  std::filesystem::remove(directory_ + "/config.json");
  Write("tokenizer.model", ranks + "\nbad line\n");
  EXPECT_THAT(Error(), HasSubstr("tokenizer.model:260"));
  Write("tokenizer.model", ranks + "\n" + absl::Base64Escape(std::string(5000, 'a')) + " 259\n");
  EXPECT_THAT(Error(), HasSubstr("tokenizer.model:260: a token of 5000 bytes"));
  Write("tokenizer.model", "IQ== 0\nIg== 1\n");
  EXPECT_THAT(Error(), HasSubstr("byte 0 has no token"));
  Write("tokenizer.model", "IQ== 2000000000\n");
  EXPECT_THAT(Error(), HasSubstr("2000000000"));
}

TEST_F(TokenizerLoading, BrokenTokenizerJsonIsNamed) {
  const std::string good = ReadAll(kRoot + "/tests/engine/tokenizer_vectors/qwen2.json");
  const auto with = [&](auto&& change) {
    nlohmann::json json = nlohmann::json::parse(good);
    change(json);
    Write("tokenizer.json", json.dump());
    return Error();
  };
  using Json = nlohmann::json;
  EXPECT_EQ(with([](Json&) {}), "ok");
  EXPECT_THAT(with([](Json& j) {
                j["post_processor"] = {{"type", "TemplateProcessing"},
                                       {"single", {{{"SpecialToken", {{"id", "<s>"}}}}}},
                                       {"special_tokens", {{"<s>", {{"ids", {999999}}}}}}};
              }),
              HasSubstr("post_processor: adds token 999999"));
  EXPECT_THAT(with([](Json& j) { j.erase("model"); }), HasSubstr("model"));
  EXPECT_THAT(with([](Json& j) { j["model"]["type"] = "Unigram"; }), HasSubstr("'Unigram' is not supported"));
  EXPECT_THAT(with([](Json& j) { j["model"]["vocab"] = 3; }), HasSubstr("tokenizer.json"));
  EXPECT_THAT(with([](Json& j) { j["model"]["vocab"]["x"] = -3; }), HasSubstr("-3"));
  EXPECT_THAT(with([](Json& j) { j["model"]["vocab"]["x"] = 1 << 30; }), HasSubstr("dense"));
  EXPECT_THAT(with([](Json& j) { j["model"]["vocab"]["x"] = 1e100; }), HasSubstr("not a token id"));
  EXPECT_THAT(with([](Json& j) { j["model"]["merges"].push_back("nospace"); }), HasSubstr("no space"));
  EXPECT_THAT(with([](Json& j) { j["model"]["merges"].push_back({"zzz", "q"}); }), HasSubstr("'zzz'"));
  EXPECT_THAT(with([](Json& j) { j["model"]["merges"].push_back(Json::array()); }),
              HasSubstr("tokenizer.json"));
  EXPECT_THAT(with([](Json& j) {
                j["normalizer"] = {{"type", "BertNormalizer"}};
              }),
              HasSubstr("BertNormalizer"));
  EXPECT_THAT(with([](Json& j) {
                j["pre_tokenizer"] = {{"type", "CharDelimiterSplit"}};
              }),
              HasSubstr("CharDelimiterSplit"));
  EXPECT_THAT(with([](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(("; }),
              HasSubstr("not a regular expression"));
  EXPECT_THAT(with([](Json& j) {
                j["post_processor"] = {{"type", "BertProcessing"}};
              }),
              HasSubstr("BertProcessing"));
  EXPECT_THAT(with([](Json& j) { j["added_tokens"][0]["id"] = 1 << 30; }), HasSubstr("1073741824"));
  EXPECT_THAT(with([](Json& j) {
                for (int i = 0; i < 30; ++i)
                  j["normalizer"] = {{"type", "Sequence"}, {"normalizers", {j["normalizer"]}}};
              }),
              HasSubstr("too deep"));
}

TEST_F(TokenizerLoading, DeeplyNestedJsonDoesNotOverflowTheStack) {
  for (const std::string open : {"[", "{\"a\":"}) {
    std::string deep;
    for (int i = 0; i < 500000; ++i) deep += open;
    Write("tokenizer.json", deep);
    EXPECT_THAT(Error(), HasSubstr("tokenizer.json"));
    for (int i = 0; i < 500000; ++i) deep += open == "[" ? "]" : i == 0 ? "1}" : "}";
    Write("tokenizer.json", deep);
    EXPECT_THAT(Error(), HasSubstr("tokenizer.json"));
    Write("tokenizer_config.json", deep);
    EXPECT_NE(Error(), "ok");
    std::filesystem::remove(directory_ + "/tokenizer_config.json");
  }
}

// Every cut and thousands of flipped bytes: an error or a tokenizer that still answers, never a crash.
TEST_F(TokenizerLoading, TruncatedAndFlippedSentencePieceModels) {
  const std::string good = ReadAll(kRoot + "/models/default/tokenizer.model");
  ASSERT_GT(good.size(), 1000u);
  EXPECT_FALSE(ParseSentencePiece("", "t", {}).ok());
  for (size_t size = 0; size < good.size(); size += good.size() / 60) {
    const auto tokenizer = ParseSentencePiece(good.substr(0, size), "t", {});
    if (tokenizer.ok()) (*tokenizer)->Encode("some text\n\xC3\xA9", true, true);
  }
  std::mt19937 random(1);
  int broken = 0;
  for (int round = 0; round < 100; ++round) {
    std::string bytes = good;
    for (int i = 0; i < 20; ++i) bytes[random() % bytes.size()] = static_cast<char>(random());
    const auto tokenizer = ParseSentencePiece(bytes, "t", {});
    broken += !tokenizer.ok();
    if (tokenizer.ok()) (*tokenizer)->Encode("some text \xEF\xBC\xA1 \xC2\xBD\n\xC3\xA9", true, true);
  }
  EXPECT_GT(broken, 10);
}

TEST_F(TokenizerLoading, NotARegularFile) {
  std::filesystem::create_directories(directory_ + "/tokenizer.model");
  EXPECT_THAT(Error(), HasSubstr("not a regular file"));
}

}  // namespace
}  // namespace atp
