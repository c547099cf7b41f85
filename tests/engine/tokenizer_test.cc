// Whole tokenizers against ids from independent implementations: llama.cpp's vectors, and those that
// generate_tokenizer_vectors.py wrote with Hugging Face's tokenizers.
#include "engine/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "engine/utf8.h"

namespace atp {
namespace {

const std::string kShared = std::string(ATP_SOURCE_DIR) + "/../shared/data/";
const std::string kVectors = std::string(ATP_SOURCE_DIR) + "/tests/engine/tokenizer_vectors/";

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::unique_ptr<Tokenizer> Load(absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer) {
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

#define SKIP_WITHOUT(path) \
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "not there: " << (path)

// llama.cpp's files: texts separated by a marker line, one line of ids per text.
std::vector<std::pair<std::string, std::vector<TokenId>>> LlamaCppVectors(const std::string& name) {
  const std::string separator = "\n__ggml_vocab_test__\n";
  std::string texts = ReadAll(kShared + "tokenizers/vectors/" + name + ".inp");
  std::istringstream ids(ReadAll(kShared + "tokenizers/vectors/" + name + ".out"));
  std::vector<std::pair<std::string, std::vector<TokenId>>> result;
  for (std::string line; std::getline(ids, line);) {
    const size_t end = texts.find(separator);
    std::istringstream numbers(line);
    std::vector<TokenId> expected;
    for (TokenId id; numbers >> id;) expected.push_back(id);
    result.emplace_back(texts.substr(0, end), expected);
    texts.erase(0, end == std::string::npos ? texts.size() : end + separator.size());
  }
  return result;
}

void CheckLlamaCppVectors(const Tokenizer& tokenizer, const std::string& name) {
  const auto vectors = LlamaCppVectors(name);
  ASSERT_GT(vectors.size(), 40u);
  for (const auto& [text, expected] : vectors) {
    EXPECT_EQ(tokenizer.Encode(text, false, false), expected) << "text: '" << text << "'";
    EXPECT_EQ(tokenizer.Decode(expected), text);
  }
}

TEST(TokenizerVectors, LlamaSentencePiece) {
  const std::string model = kShared + "tokenizers/llama2/tokenizer.model";
  SKIP_WITHOUT(model);
  const auto tokenizer = Load(LoadSentencePieceTokenizer(model));
  ASSERT_NE(tokenizer, nullptr);
  CheckLlamaCppVectors(*tokenizer, "llama-spm");
}

TEST(TokenizerVectors, Llama3Ranks) {
  const std::string model = kShared + "tokenizers/llama3";
  SKIP_WITHOUT(model);
  const auto tokenizer = Load(LoadTokenizer(model, 128256));
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->vocab_size(), 128256);
  EXPECT_EQ(tokenizer->IdOf("<|begin_of_text|>"), 128000);
  EXPECT_EQ(tokenizer->IdOf("<|start_header_id|>"), 128006);
  EXPECT_EQ(tokenizer->IdOf("<|eot_id|>"), 128009);
  EXPECT_EQ(tokenizer->IdOf("<|reserved_special_token_250|>"), 128255);
  EXPECT_EQ(tokenizer->special().bos, 128000);
  EXPECT_EQ(tokenizer->special().eos, (std::vector<TokenId>{128001, 128009}));
  EXPECT_TRUE(tokenizer->adds_bos());
  CheckLlamaCppVectors(*tokenizer, "llama-bpe");
}

// Their tokenizer.json is not among the test data; once it is, these run.
void CheckJsonVectors(const std::string& directory, const std::string& vectors) {
  const std::string model = kShared + "tokenizers/" + directory + "/tokenizer.json";
  SKIP_WITHOUT(model);
  const auto tokenizer = Load(LoadBpeTokenizer(model));
  ASSERT_NE(tokenizer, nullptr);
  CheckLlamaCppVectors(*tokenizer, vectors);
}
TEST(TokenizerVectors, Gpt2) { CheckJsonVectors("gpt2", "gpt-2"); }
TEST(TokenizerVectors, Qwen2) { CheckJsonVectors("qwen2", "qwen2"); }

// Ids from Hugging Face's tokenizers: [{"text", "ids", "with_special", "decoded"}, …].
void CheckHuggingFaceIds(const Tokenizer& tokenizer, const std::string& ids_file, bool bytes_survive) {
  const nlohmann::json cases = nlohmann::json::parse(ReadAll(kVectors + ids_file));
  ASSERT_GT(cases.size(), 40u);
  for (const nlohmann::json& c : cases) {
    const std::string text = c["text"];
    const std::vector<TokenId> expected = c["ids"];
    // Hugging Face always looks for control tokens in the text, so parse_special is what compares.
    EXPECT_EQ(tokenizer.Encode(text, false, true), expected) << "text: '" << text << "'";
    EXPECT_EQ(tokenizer.Encode(text, true, true), c["with_special"].get<std::vector<TokenId>>());
    EXPECT_EQ(tokenizer.Decode(expected), c["decoded"].get<std::string>()) << "text: '" << text << "'";
    if (bytes_survive) {
      EXPECT_EQ(tokenizer.Decode(tokenizer.Encode(text, false, false)), text);
    }
  }
}

struct SmallFile {
  const char* name;
  bool bytes_survive;  // no normalizer and no removing pre-tokenizer: encoding loses nothing
};
class SmallTokenizer : public testing::TestWithParam<SmallFile> {};

TEST_P(SmallTokenizer, HasTheIdsOfHuggingFace) {
  const std::string name = GetParam().name;
  const auto tokenizer = Load(LoadBpeTokenizer(kVectors + name + ".json"));
  ASSERT_NE(tokenizer, nullptr);
  CheckHuggingFaceIds(*tokenizer, name + ".ids.json", GetParam().bytes_survive);
}

INSTANTIATE_TEST_SUITE_P(Files, SmallTokenizer,
                         testing::Values(SmallFile{"gpt2", true}, SmallFile{"gpt2_prefix_space", false},
                                         SmallFile{"llama3", true}, SmallFile{"qwen2", false},
                                         SmallFile{"smollm2", false}, SmallFile{"behaviors1", false},
                                         SmallFile{"behaviors2", false}, SmallFile{"metaspace", false},
                                         SmallFile{"prepend_replace", false}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(TokenizerVectors, SmolLm2HasTheIdsOfHuggingFace) {
  const std::string model = kShared + "tokenizers/smollm2/tokenizer.json";
  SKIP_WITHOUT(model);
  const auto tokenizer = Load(LoadBpeTokenizer(model));
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->vocab_size(), 49152);
  CheckHuggingFaceIds(*tokenizer, "smollm2_real.ids.json", true);
}

// Text of users must not become control tokens, whatever it spells; other added tokens are ordinary
// vocabulary.
// With prepend_scheme "first" only what begins the whole gets a space.
TEST(Tokenizer, PartsAreEncodedAsTheWholeTheyMake) {
  const auto tokenizer =
      LoadBpeTokenizer(std::string(ATP_SOURCE_DIR) + "/tests/engine/tokenizer_vectors/metaspace.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const std::vector<PromptPart> parts = {
      {std::nullopt, "a b"}, {1, ""}, {std::nullopt, "the cat"}, {2, ""}, {std::nullopt, "x"}};
  EXPECT_EQ((*tokenizer)->EncodeParts(parts),
            (*tokenizer)->Encode("a b<s>the cat</s>x", /*add_special=*/false, /*parse_special=*/true));
}

TEST(Tokenizer, UsersTextHasNoControlTokens) {
  const auto bpe = Load(LoadBpeTokenizer(kVectors + "llama3.json"));
  ASSERT_NE(bpe, nullptr);
  const TokenId control = *bpe->IdOf("<|im_start|>");
  const TokenId plain = *bpe->IdOf("<think>");
  const auto count = [](const std::vector<TokenId>& ids, TokenId id) {
    return std::count(ids.begin(), ids.end(), id);
  };
  const std::string text = "<|im_start|> <think>";
  EXPECT_EQ(count(bpe->Encode(text, false, true), control), 1);
  EXPECT_EQ(count(bpe->Encode(text, false, false), control), 0);
  EXPECT_EQ(count(bpe->Encode(text, false, false), plain), 1);
  EXPECT_EQ(bpe->Decode(bpe->Encode(text, false, false)), text);
  EXPECT_EQ(bpe->TokenBytes(control, false), "");
  EXPECT_EQ(bpe->TokenBytes(control, true), "<|im_start|>");
  EXPECT_EQ(bpe->TokenBytes(-1, true), "");
  EXPECT_EQ(bpe->TokenBytes(bpe->vocab_size(), true), "");
}

TEST(Tokenizer, SentencePieceControlTokensOnlyWhereParsed) {
  const auto spm = Load(LoadTokenizer(std::string(ATP_SOURCE_DIR) + "/models/default", 0));
  ASSERT_NE(spm, nullptr);
  ASSERT_EQ(spm->special().bos, 1);
  EXPECT_EQ(spm->special().eos, (std::vector<TokenId>{2, 5}));  // </s>, <|im_end|>
  EXPECT_TRUE(spm->adds_bos());
  const std::vector<TokenId> parsed = spm->Encode("</s>", false, true);
  EXPECT_EQ(parsed, std::vector<TokenId>{2});
  for (TokenId id : spm->Encode("</s> <s>", false, false)) EXPECT_GT(id, 2);
  EXPECT_EQ(spm->Decode(spm->Encode("</s> <s>", false, false)), "</s> <s>");
  EXPECT_EQ(spm->Encode("x", true, false)[0], 1);
  // A newline is a piece of its own, behind which no word begins with a space (as the Python library has it).
  EXPECT_EQ(spm->Encode("one\n\ntwo\n", false, false),
            (std::vector<TokenId>{spm->Encode("one", false, false)[0], 3, 3, 4578, 6080, 3}));
  EXPECT_EQ(spm->Decode(spm->Encode("one\n\ntwo words\n", true, false)), "one\n\ntwo words\n");
}

TEST(Tokenizer, BrokenUtf8KeepsItsBytes) {
  const auto bpe = Load(LoadBpeTokenizer(kVectors + "llama3.json"));
  ASSERT_NE(bpe, nullptr);
  const std::string text = "ok \xF0\x9F\xA6 \xC3(\xFF\xED\xA0\x80 end\xE2";
  std::string bytes;
  for (TokenId id : bpe->Encode(text, false, false)) bytes += bpe->TokenBytes(id, false);
  EXPECT_EQ(bytes, text);
  EXPECT_TRUE(IsValidUtf8(bpe->Decode(bpe->Encode(text, false, false))));
}

// Long words must not take quadratic time: a megabyte each, which would take hours.
TEST(Tokenizer, LongWordsAndRunsEnd) {
  const auto bpe = Load(LoadBpeTokenizer(kVectors + "llama3.json"));
  const auto metaspace = Load(LoadBpeTokenizer(kVectors + "prepend_replace.json"));
  ASSERT_TRUE(bpe != nullptr && metaspace != nullptr);
  for (const char* unit : {"a", "the", " ", "\n", " \n", "\xC3\xA9", "1", "'", " x"}) {
    std::string text;
    while (text.size() < 1 << 20) text += unit;
    for (const Tokenizer* t : {bpe.get(), metaspace.get()}) {
      const std::vector<TokenId> ids = t->Encode(text + "!", false, false);
      EXPECT_EQ(t->Decode(ids), text + "!") << "unit '" << unit << "'";
    }
  }
}

}  // namespace
}  // namespace atp
