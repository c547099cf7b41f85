// Models written as GGUF and read again, and the tokenizers in such files.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "engine/bpe_model.h"
#include "engine/gguf.h"
#include "engine/gguf_tokenizer.h"
#include "engine/gguf_writer.h"
#include "engine/model_path.h"
#include "engine/quantize_model.h"
#include "tests/engine/gguf_bytes.h"
#include "tests/engine/planned_runner.h"

namespace atp {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::string kSource = ATP_SOURCE_DIR;

class GgufModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "gguf_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string dir_;
};

std::vector<TokenId> Prompt(size_t vocab) {
  std::vector<TokenId> tokens;
  for (size_t i = 0; i < 40; ++i) tokens.push_back(static_cast<TokenId>((i * 7 + i * i) % vocab));
  return tokens;
}

std::vector<float> LogitsOf(const std::string& model, std::optional<DType> dtype = std::nullopt,
                            const std::string& device = "cpu") {
  PlannedRunner runner(model, KvFormat::kF32, device, /*exact_blocks=*/false, dtype);
  return runner.Logits({Prompt(runner.vocab())}, nullptr, 64)[0];
}

// All that differs between the forms: names, order of rows, frequencies, biases, shards, ties.
TEST_F(GgufModelTest, SameLogitsFromBothForms) {
  for (const char* name : {"llama_mha_f32", "llama3_gqa2_bf16", "mistral_gqa2_mixed",
                           "qwen2_bias_sharded_f32", "llama_all_biases_f16", "linear_gqa4_f16"}) {
    SCOPED_TRACE(name);
    const std::string in = kSource + "/tests/golden/" + name;
    const std::string out = dir_ + "/" + name;
    ASSERT_EQ(QuantizeModel(in, out, DType::kF32, nullptr), absl::OkStatus());
    EXPECT_EQ(*FindGguf(out), out + "/model.gguf");
    const LlamaConfig expected = *LoadLlamaConfig(in), actual = *LoadLlamaConfig(out);
    EXPECT_EQ(actual.inverse_frequency, expected.inverse_frequency);
    EXPECT_EQ(actual.eos_token_ids, expected.eos_token_ids);
    EXPECT_EQ(actual.max_positions, expected.max_positions);
    EXPECT_EQ(LogitsOf(out), LogitsOf(in, DType::kF32));
    // Once more, from the file and to a file.
    ASSERT_EQ(QuantizeModel(out, dir_ + "/" + name + ".gguf", DType::kF32, nullptr), absl::OkStatus());
    EXPECT_EQ(LogitsOf(dir_ + "/" + name + ".gguf"), LogitsOf(in, DType::kF32));
  }
}

TEST_F(GgufModelTest, SamplingDefaultsGoAlong) {
  const std::string in = dir_ + "/in";
  std::filesystem::copy(kSource + "/tests/golden/llama_mha_f32", in);
  std::ofstream(in + "/generation_config.json")
      << R"({"temperature":0.5,"top_k":7,"top_p":0.25,"min_p":0.125,"repetition_penalty":1.5})";
  ASSERT_EQ(QuantizeModel(in, dir_ + "/out.gguf", DType::kF32, nullptr), absl::OkStatus());
  ASSERT_EQ(QuantizeModel(dir_ + "/out.gguf", dir_ + "/again.gguf", DType::kF32, nullptr), absl::OkStatus());
  for (const char* name : {"/in", "/out.gguf", "/again.gguf"}) {
    SCOPED_TRACE(name);
    const SamplingParams sampling = *LoadLlamaConfig(dir_ + name)->sampling;
    EXPECT_EQ(sampling.temperature, 0.5f);
    EXPECT_EQ(sampling.top_k, 7);
    EXPECT_EQ(sampling.top_p, 0.25f);
    EXPECT_EQ(sampling.min_p, 0.125f);
    EXPECT_EQ(sampling.repetition_penalty, 1.5f);
  }
}

TEST_F(GgufModelTest, QuantisedOnceIsQuantisedAtLoad) {
  const std::string in = kSource + "/models/default";
  for (const DType dtype : {DType::kBF16, DType::kQ8_0, DType::kQ4}) {
    SCOPED_TRACE(Name(dtype));
    const std::string out = dir_ + "/" + std::string(Name(dtype));
    ASSERT_EQ(QuantizeModel(in, out, dtype, nullptr), absl::OkStatus());
    PlannedRunner from_file(out), converted(in, KvFormat::kF32, "cpu", /*exact_blocks=*/false, dtype);
    EXPECT_EQ(from_file.model().weight_dtype(), dtype);
    EXPECT_EQ(from_file.model().weight_bytes(), converted.model().weight_bytes());
    const std::vector<TokenId> prompt = Prompt(from_file.vocab());
    EXPECT_EQ(from_file.Logits({prompt}, nullptr, 64)[0], converted.Logits({prompt}, nullptr, 64)[0]);
    EXPECT_EQ((*LoadTokenizer(out, 0))->Encode("Once upon a time", true, false),
              (*LoadTokenizer(in, 0))->Encode("Once upon a time", true, false));
    // Again: what lies beside the weights goes along.
    ASSERT_EQ(QuantizeModel(out, out + "-again", DType::kQ4, nullptr), absl::OkStatus());
    for (const char* name : {"/tokenizer.model", "/tokenizer_config.json", "/atp_budgets.json"}) {
      EXPECT_TRUE(std::filesystem::exists(out + "-again" + name)) << name;
    }
  }
}

TEST_F(GgufModelTest, NothingIsOverwritten) {
  const absl::Status status = QuantizeModel(kSource + "/models/default", dir_, DType::kQ8_0, nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("is there already"));
  EXPECT_FALSE(QuantizeModel(dir_ + "/none", dir_ + "/out", DType::kQ8_0, nullptr).ok());
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/out"));
  // Nor is anything left of a model that cannot be read.
  std::filesystem::create_directory(dir_ + "/broken");
  std::ofstream(dir_ + "/broken/model.gguf") << "GGUF";
  EXPECT_FALSE(QuantizeModel(dir_ + "/broken", dir_ + "/out", DType::kQ8_0, nullptr).ok());
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/out"));
}

TEST_F(GgufModelTest, BudgetsBesideAFileGoAlong) {
  ASSERT_EQ(QuantizeModel(kSource + "/tests/golden/llama_mha_f32", dir_ + "/m", DType::kF32, nullptr),
            absl::OkStatus());
  const std::string in = dir_ + "/m/model.gguf", out = dir_ + "/out.gguf";
  std::ofstream(in + ".atp_budgets.json") << "{}";
  ASSERT_EQ(QuantizeModel(in, out, DType::kQ8_0, nullptr), absl::OkStatus());
  EXPECT_TRUE(std::filesystem::is_regular_file(out));
  EXPECT_TRUE(std::filesystem::exists(out + ".atp_budgets.json"));
}

TEST_F(GgufModelTest, TensorsMissingOrMisshapen) {
  ASSERT_EQ(QuantizeModel(kSource + "/tests/golden/llama_mha_f32", dir_ + "/m", DType::kF32, nullptr),
            absl::OkStatus());
  const std::string path = dir_ + "/m/model.gguf";
  const auto file = *GgufFile::Open(path);
  const auto error_without = [&](std::string_view left_out, bool narrower) {
    GgufWriter writer;
    for (const auto& [key, value] : file->metadata()) writer.AddValue(key, value);
    for (const auto& [name, tensor] : file->tensors()) {
      if (name == left_out && !narrower) continue;
      std::vector<int64_t> shape = tensor.shape;
      if (name == left_out) shape.front() /= 2;
      const auto data = tensor.data.subspan(0, tensor.data.size() / (name == left_out ? 2 : 1));
      writer.AddTensor(name, tensor.dtype, shape, [data](const GgufWriter::Append& append) {
        append(data.data(), data.size());
        return absl::OkStatus();
      });
    }
    EXPECT_EQ(writer.Write(dir_ + "/broken.gguf"), absl::OkStatus());
    const auto backend = *MakeBackend({});
    ModelLimits limits;
    limits.max_batch_rows = limits.max_logit_rows = limits.max_batch_entries = 1;
    return std::string(
        LlamaModel::Load(dir_ + "/broken.gguf", backend.get(), limits, nullptr).status().message());
  };
  EXPECT_THAT(error_without("blk.1.attn_q.weight", false),
              HasSubstr("broken.gguf: tensor 'blk.1.attn_q.weight': expected shape ["));
  EXPECT_THAT(error_without("blk.1.attn_q.weight", false),
              HasSubstr("as the metadata says, found no such tensor"));
  EXPECT_THAT(error_without("output_norm.weight", true),
              HasSubstr("broken.gguf: tensor 'output_norm.weight': expected shape ["));
  EXPECT_THAT(error_without("token_embd.weight", false), HasSubstr("found no such tensor"));
}

TEST_F(GgufModelTest, WhichFileAPathMeans) {
  const auto touch = [&](const std::string& name) { std::ofstream(dir_ + "/" + name) << "x"; };
  EXPECT_EQ(*FindGguf(dir_), "");
  EXPECT_EQ(*FindGguf(dir_ + "/none"), "");
  EXPECT_EQ(FindGguf(dir_ + "/none.gguf").status().code(), absl::StatusCode::kNotFound);
  touch("a.gguf");
  EXPECT_EQ(*FindGguf(dir_), dir_ + "/a.gguf");
  EXPECT_EQ(*FindGguf(dir_ + "/a.gguf"), dir_ + "/a.gguf");
  touch("b.gguf");
  EXPECT_THAT(std::string(FindGguf(dir_).status().message()), HasSubstr("expected one .gguf file, found"));
  touch("model.safetensors");
  EXPECT_EQ(*FindGguf(dir_), "");
  EXPECT_EQ(ModelDirectory(dir_), dir_);
  EXPECT_EQ(ModelDirectory(dir_ + "/a.gguf"), dir_);
  EXPECT_EQ(ModelDirectory("a.gguf"), ".");
}

// --- tokenizers

absl::StatusOr<std::unique_ptr<Tokenizer>> TokenizerOf(const GgufBytes& gguf) {
  const std::string bytes = gguf.Bytes();
  const auto file = GgufFile::Parse(std::as_bytes(std::span(bytes.data(), bytes.size())), "f.gguf");
  EXPECT_TRUE(file.ok()) << file.status();
  return LoadGgufTokenizer(**file);
}
std::string TokenizerError(const GgufBytes& gguf) {
  const auto tokenizer = TokenizerOf(gguf);
  return tokenizer.ok() ? "none" : std::string(tokenizer.status().message());
}

struct Tokens {
  std::vector<std::string> texts;
  std::vector<float> scores;
  std::vector<int32_t> types;

  void Add(const std::string& text, int32_t type, float score = 0) {
    texts.push_back(text);
    scores.push_back(score);
    types.push_back(type);
  }
  void AddTo(GgufBytes* gguf) const {
    gguf->Texts("tokenizer.ggml.tokens", texts).Numbers("tokenizer.ggml.scores", GgufType::kF32, scores);
    gguf->Numbers("tokenizer.ggml.token_type", GgufType::kI32, types);
  }
};

Tokens SentencePieceTokens() {
  Tokens tokens;
  tokens.Add("<unk>", 2);
  tokens.Add("<s>", 3);
  tokens.Add("</s>", 3);
  for (int b = 0; b < 256; ++b) {
    char text[8];
    std::snprintf(text, sizeof(text), "<0x%02X>", static_cast<unsigned>(b));
    tokens.Add(text, 6);
  }
  float score = -1;
  for (const char* text : {"\xE2\x96\x81", "a", "b", "ab",
                           "\xE2\x96\x81"
                           "ab"})
    tokens.Add(text, 1, score--);
  tokens.Add("<|im_end|>", 3);
  return tokens;
}

GgufBytes SentencePiece(const Tokens& tokens) {
  GgufBytes gguf;
  gguf.Text("tokenizer.ggml.model", "llama").Int("tokenizer.ggml.bos_token_id", 1);
  gguf.Int("tokenizer.ggml.eos_token_id", 2);
  tokens.AddTo(&gguf);
  return gguf;
}

TEST(GgufTokenizerTest, SentencePiece) {
  const auto tokenizer = TokenizerOf(SentencePiece(SentencePieceTokens()));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const Tokenizer& t = **tokenizer;
  EXPECT_EQ(t.vocab_size(), 265);
  EXPECT_TRUE(t.adds_bos());
  EXPECT_EQ(t.special().bos, 1);
  EXPECT_THAT(t.special().eos, ElementsAre(2, 264));
  EXPECT_THAT(t.Encode("ab a", true, false), ElementsAre(1, 263, 259, 260));
  EXPECT_THAT(t.Encode("ab  \n", false, false), ElementsAre(263, 259, 259, 3 + '\n'));  // nothing folded
  EXPECT_THAT(t.Encode("<s>", false, true), ElementsAre(1));
  EXPECT_EQ(t.Decode(t.Encode("ba c\xC3\xA9", false, false)), "ba c\xC3\xA9");

  GgufBytes bare = SentencePiece(SentencePieceTokens());
  bare.Entry("tokenizer.ggml.add_bos_token", GgufType::kBool, Raw<uint8_t>(0));
  bare.Entry("tokenizer.ggml.add_space_prefix", GgufType::kBool, Raw<uint8_t>(0));
  EXPECT_THAT((*TokenizerOf(bare))->Encode("ab", true, false), ElementsAre(262));
}

// As converters of models without a tokenizer.model write them: <unk> is a control token, or anything.
TEST(GgufTokenizerTest, SentencePieceWithoutAnUnknownToken) {
  Tokens tokens = SentencePieceTokens();
  tokens.types[0] = 3;
  const auto tokenizer = TokenizerOf(SentencePiece(tokens));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT((*tokenizer)->Encode("ab a", true, false), ElementsAre(1, 263, 259, 260));
  GgufBytes named = SentencePiece(tokens);
  named.Int("tokenizer.ggml.unknown_token_id", 2);
  EXPECT_EQ(TokenizerError(named), "none");
  GgufBytes far = SentencePiece(tokens);
  far.Int("tokenizer.ggml.unknown_token_id", 265);
  EXPECT_THAT(TokenizerError(far), HasSubstr("unknown_token_id': expected an id below 265, found 265"));
}

// Converters of before 2024-04 gave all added tokens the type 4.
TEST(GgufTokenizerTest, SentencePieceWithUserDefinedControlTokens) {
  Tokens tokens = SentencePieceTokens();
  tokens.types[264] = 4;
  tokens.Add("<|im_start|>", 4);
  GgufBytes gguf;
  gguf.Text("tokenizer.ggml.model", "llama").Int("tokenizer.ggml.bos_token_id", 265);
  gguf.Int("tokenizer.ggml.eos_token_id", 2);
  tokens.AddTo(&gguf);
  const auto tokenizer = TokenizerOf(gguf);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->special().bos, 265);
  EXPECT_THAT((*tokenizer)->special().eos, ElementsAre(2, 264));
}

// Character maps that would lead the library outside of its tables. Units of a double array: the root's
// children lie at 256 ^ label, `a` is 353.
std::string CharacterMapError(const std::map<int, uint32_t>& units) {
  std::string map(4 + 512 * 4, '\0');
  const auto put = [&map](size_t at, uint32_t value) {
    for (size_t i = 0; i < 4; ++i) map[at + i] = static_cast<char>(value >> (8 * i));
  };
  put(0, 512 * 4);
  for (size_t unit = 0; unit < 512; ++unit) put(4 + 4 * unit, 0x80000000);  // a value: of no label
  for (const auto& [unit, value] : units) put(4 + 4 * static_cast<size_t>(unit), value);
  map += std::string("x\0", 2);
  GgufBytes gguf = SentencePiece(SentencePieceTokens());
  gguf.Numbers<uint8_t>("tokenizer.ggml.precompiled_charsmap", GgufType::kU8,
                        std::vector<uint8_t>(map.begin(), map.end()));
  return TokenizerError(gguf);
}

TEST(GgufTokenizerTest, CharacterMapsThatLeadAstray) {
  constexpr uint32_t kRoot = 256 << 10, kHasValue = 1 << 8;
  // a -> x: the child's children lie at 353 ^ 97 = 256, too, where its value is.
  EXPECT_THAT(CharacterMapError({{0, kRoot}, {353, 'a' | kHasValue | 97 << 10}}),
              HasSubstr("leads back into itself"));
  EXPECT_EQ(CharacterMapError({{0, kRoot}, {353, 'a' | kHasValue | 352 << 10}}),
            "none");  // at 1: no child there
  EXPECT_THAT(CharacterMapError({{0, kRoot}, {353, 'a' | 1000 << 10}}), HasSubstr("outside itself"));
  EXPECT_THAT(CharacterMapError({{0, kRoot}, {256, 2000 << 10}}), HasSubstr("outside itself"));  // of a NUL
}

TEST(GgufTokenizerTest, UserDefinedPiecesThatBeginOneAnother) {
  Tokens tokens = SentencePieceTokens();
  for (size_t length = 2; length <= 65; ++length) tokens.Add(std::string(length, 'q'), 4);
  EXPECT_EQ(TokenizerError(SentencePiece(tokens)), "none");
  tokens.Add("q", 4);
  EXPECT_THAT(TokenizerError(SentencePiece(tokens)), HasSubstr("begin one another"));
}

TEST(GgufTokenizerTest, SentencePieceMalformed) {
  Tokens tokens = SentencePieceTokens();
  tokens.types[5] = 9;
  EXPECT_THAT(TokenizerError(SentencePiece(tokens)), HasSubstr("expected types from 1 to 6, found 9"));
  tokens = SentencePieceTokens();
  tokens.scores.pop_back();
  EXPECT_THAT(TokenizerError(SentencePiece(tokens)),
              HasSubstr("key 'tokenizer.ggml.scores': expected one for each of 265 tokens, found 264"));
  tokens = SentencePieceTokens();
  tokens.texts[262] = "a";
  EXPECT_NE(TokenizerError(SentencePiece(tokens)), "none");  // twice the same piece
  tokens.texts[262] = "\xFF";
  EXPECT_THAT(TokenizerError(SentencePiece(tokens)), HasSubstr("not UTF-8"));
  tokens.texts[262] = "";
  EXPECT_NE(TokenizerError(SentencePiece(tokens)), "none");
  GgufBytes far = SentencePiece(SentencePieceTokens());
  far.Int("tokenizer.ggml.eot_token_id", 265);
  EXPECT_THAT(TokenizerError(far),
              HasSubstr("key 'tokenizer.ggml.eot_token_id': expected an id below 265, found 265"));
  GgufBytes map = SentencePiece(SentencePieceTokens());
  map.Numbers<uint8_t>("tokenizer.ggml.precompiled_charsmap", GgufType::kU8, {255, 255, 255, 255, 1});
  EXPECT_THAT(TokenizerError(map), HasSubstr("character map"));
}

GgufBytes Bpe(std::string_view pre, std::vector<std::string> merges = {"a b"}) {
  Tokens tokens;
  for (int b = 0; b < 256; ++b) {
    const char byte = static_cast<char>(b);
    tokens.Add(BytesToPrintable(std::string_view(&byte, 1)), 1);
  }
  tokens.Add("ab", 1);  // 256
  tokens.Add(
      "\xC4\xA0"
      "abc",
      1);                       // 257, " abc"
  tokens.Add("<|eot_id|>", 3);  // 258
  tokens.Add("<tool>", 4);      // 259
  GgufBytes gguf;
  gguf.Text("tokenizer.ggml.model", "gpt2")
      .Text("tokenizer.ggml.pre", pre)
      .Texts("tokenizer.ggml.merges", merges);
  gguf.Int("tokenizer.ggml.bos_token_id", 258);
  tokens.AddTo(&gguf);
  return gguf;
}

TEST(GgufTokenizerTest, ByteLevelBpe) {
  const auto tokenizer = TokenizerOf(Bpe("gpt-2"));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const Tokenizer& t = **tokenizer;
  EXPECT_EQ(t.vocab_size(), 260);
  EXPECT_FALSE(t.adds_bos());
  EXPECT_THAT(t.special().eos, ElementsAre(258));
  EXPECT_THAT(t.Encode("ab abc", true, false), ElementsAre(256, ' ', 256, 'c'));
  EXPECT_THAT(t.Encode("<tool>a<|eot_id|>", false, true), ElementsAre(259, 'a', 258));
  EXPECT_EQ(t.Encode("<|eot_id|>", false, false).size(), 10u);
  EXPECT_EQ(t.Decode(t.Encode("ab \xC3\xA9\n", false, false)), "ab \xC3\xA9\n");

  const auto llama3 = TokenizerOf(Bpe("llama-bpe"));
  ASSERT_TRUE(llama3.ok()) << llama3.status();
  EXPECT_THAT((*llama3)->Encode("ab abc", true, false), ElementsAre(258, 256, 257));  // whole words, BOS
  for (const char* pre : {"qwen2", "smollm", "tekken", "llama3", "starcoder"})
    EXPECT_TRUE(TokenizerOf(Bpe(pre)).ok());
}

TEST(GgufTokenizerTest, ByteLevelBpeMalformed) {
  EXPECT_THAT(TokenizerError(Bpe("chameleon")),
              HasSubstr("key 'tokenizer.ggml.pre': expected one of llama-bpe, qwen2"));
  EXPECT_THAT(TokenizerError(Bpe("gpt-2", {"ab"})),
              HasSubstr("expected two tokens with a space between, found 'ab'"));
  EXPECT_THAT(TokenizerError(Bpe("gpt-2", {"a zz"})), HasSubstr("which is not in the vocabulary"));
  GgufBytes other;
  other.Text("tokenizer.ggml.model", "bert");
  EXPECT_EQ(TokenizerError(other),
            "f.gguf: key 'tokenizer.ggml.model': expected llama or gpt2, found 'bert'");
  GgufBytes empty;
  empty.Text("tokenizer.ggml.model", "gpt2");
  EXPECT_THAT(TokenizerError(empty),
              HasSubstr("key 'tokenizer.ggml.tokens': expected an array of strings, found no"));
}

}  // namespace
}  // namespace atp
