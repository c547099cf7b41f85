#include "engine/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "engine/gguf_config.h"
#include "tests/engine/gguf_bytes.h"

namespace atp {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

absl::StatusOr<std::shared_ptr<const GgufFile>> Parse(const std::string& bytes) {
  return GgufFile::Parse(std::as_bytes(std::span(bytes.data(), bytes.size())), "f.gguf");
}

std::string ErrorOf(const std::string& bytes) {
  const auto file = Parse(bytes);
  if (file.ok()) return "none";
  const std::string message(file.status().message());
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(message, StartsWith("f.gguf: "));
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  return message.substr(8);
}

GgufBytes Good() {
  GgufBytes gguf;
  gguf.Text("general.architecture", "llama").Int("a.count", 7).Float("a.scale", 0.5f);
  gguf.Texts("a.words", {"one", "", "three"}).Numbers<int32_t>("a.numbers", GgufType::kI32, {-1, 2});
  gguf.Tensor("x", {4, 2}, 0, 0).Tensor("q", {32, 1}, 8, 32);
  gguf.data = std::string(32 + 34, '\1');
  return gguf;
}

TEST(GgufReaderTest, ReadsBothVersions) {
  for (const uint32_t version : {2u, 3u}) {
    GgufBytes gguf = Good();
    gguf.version = version;
    const std::string bytes = gguf.Bytes();
    const auto parsed = Parse(bytes);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    const GgufFile& file = **parsed;
    EXPECT_EQ(*file.String("general.architecture"), "llama");
    EXPECT_EQ(*file.Int("a.count"), 7);
    EXPECT_EQ(*file.Number("a.scale"), 0.5);
    EXPECT_EQ(*file.Number("a.count"), 7);
    EXPECT_THAT(*file.Strings("a.words"), ElementsAre("one", "", "three"));
    EXPECT_THAT(*file.Ints("a.numbers"), ElementsAre(-1, 2));
    const GgufTensor* x = file.FindTensor("x");
    ASSERT_NE(x, nullptr);
    EXPECT_EQ(x->dtype, DType::kF32);
    EXPECT_THAT(x->shape, ElementsAre(2, 4));  // row-major
    EXPECT_EQ(x->data.size(), 32u);
    EXPECT_EQ(file.FindTensor("q")->dtype, DType::kQ8_0);
    EXPECT_EQ(file.FindTensor("q")->data.size(), 34u);
    EXPECT_EQ(reinterpret_cast<const char*>(x->data.data()), bytes.data() + bytes.size() - 66);
    EXPECT_EQ(file.FindTensor("y"), nullptr);
  }
}

TEST(GgufReaderTest, TypedReadsSayWhatIsThere) {
  const std::string bytes = Good().Bytes();
  const auto file = *Parse(bytes);
  EXPECT_EQ(file->Int("a.none").status(),
            absl::NotFoundError("f.gguf: key 'a.none': expected an integer, found no such key"));
  EXPECT_EQ(
      file->Int("a.words").status(),
      absl::InvalidArgumentError("f.gguf: key 'a.words': expected an integer, found an array of string"));
  EXPECT_EQ(file->String("a.count").status(),
            absl::InvalidArgumentError("f.gguf: key 'a.count': expected a string, found u32"));
  EXPECT_FALSE(file->Bool("a.count").ok());
  EXPECT_FALSE(file->Floats("a.numbers").ok());
  EXPECT_FALSE(file->Strings("general.architecture").ok());
}

TEST(GgufReaderTest, EveryCutIsRefused) {
  const std::string bytes = Good().Bytes();
  for (size_t size = 0; size < bytes.size(); ++size)
    EXPECT_NE(ErrorOf(bytes.substr(0, size)), "none") << size;
}

TEST(GgufReaderTest, EveryChangedByteIsReadOrRefused) {
  const std::string good = Good().Bytes();
  for (size_t i = 0; i + 66 < good.size(); ++i) {
    for (const char value : {'\x00', '\x7f', '\xff'}) {
      std::string bytes = good;
      bytes[i] = value;
      ErrorOf(bytes);  // checks its form; the sanitizers check the rest
    }
  }
}

TEST(GgufReaderTest, Header) {
  EXPECT_EQ(ErrorOf("GGML" + Good().Bytes().substr(4)),
            "expected a GGUF file, found one that begins with 'GGML'");
  GgufBytes gguf = Good();
  gguf.version = 1;
  EXPECT_EQ(ErrorOf(gguf.Bytes()), "expected GGUF version 2 or 3, found 1");
  gguf.version = 0x03000000;
  EXPECT_THAT(ErrorOf(gguf.Bytes()), HasSubstr("(a big-endian file?)"));
}

TEST(GgufReaderTest, CountsBeyondTheFile) {
  GgufBytes gguf = Good();
  gguf.tensors = uint64_t{1} << 60;
  EXPECT_THAT(ErrorOf(gguf.Bytes()), HasSubstr("tensors in "));
  gguf = Good();
  gguf.entries = ~uint64_t{0};
  EXPECT_THAT(ErrorOf(gguf.Bytes()), HasSubstr("metadata entries in "));
  gguf = Good();
  gguf.Array("big", GgufType::kU64, uint64_t{1} << 61, "");
  EXPECT_THAT(ErrorOf(gguf.Bytes()), HasSubstr("key 'big': expected at most"));
  gguf = Good();
  gguf.Array("big", GgufType::kString, ~uint64_t{0}, "");
  EXPECT_THAT(ErrorOf(gguf.Bytes()), HasSubstr("key 'big': expected at most"));
  gguf = Good();
  gguf.Entry("long", GgufType::kString, Raw(~uint64_t{0}));
  EXPECT_THAT(ErrorOf(gguf.Bytes()), HasSubstr("bytes of a metadata string at byte"));
}

TEST(GgufReaderTest, Metadata) {
  GgufBytes gguf = Good();
  gguf.Int("a.count", 8);
  EXPECT_EQ(ErrorOf(gguf.Bytes()), "key 'a.count': expected each key once, found it twice");
  gguf = Good();
  gguf.Entry("odd", static_cast<GgufType>(13), "");
  EXPECT_EQ(ErrorOf(gguf.Bytes()),
            "key 'odd': expected a value type from 0 to 12, no array of arrays, found 13");
  gguf = Good();
  gguf.Array("nested", GgufType::kArray, 1, Raw<uint32_t>(4) + Raw<uint64_t>(0));
  EXPECT_THAT(ErrorOf(gguf.Bytes()), HasSubstr("key 'nested': expected a value type"));
  for (const uint32_t alignment : {0u, 24u, 1u << 31}) {
    gguf = Good();
    gguf.Int("general.alignment", alignment);
    EXPECT_THAT(ErrorOf(gguf.Bytes()), HasSubstr("key 'general.alignment': expected a power of two"));
  }
  gguf = Good();
  gguf.Text("general.alignment", "32");
  EXPECT_EQ(ErrorOf(gguf.Bytes()), "key 'general.alignment': expected an integer, found string");
}

TEST(GgufReaderTest, Tensors) {
  const auto error = [](const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset) {
    GgufBytes gguf = Good();
    gguf.Tensor("t", dims, type, offset);
    return ErrorOf(gguf.Bytes());
  };
  EXPECT_EQ(error({}, 0, 0), "tensor 't': expected 1 to 4 dimensions, found 0");
  EXPECT_EQ(error({1, 1, 1, 1, 1}, 0, 0), "tensor 't': expected 1 to 4 dimensions, found 5");
  EXPECT_THAT(error({1}, 6, 0),
              HasSubstr("tensor 't': expected type F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K or Q6_K, "
                        "found Q5_0"));
  EXPECT_THAT(error({1}, 4711, 0), HasSubstr("found type 4711"));
  EXPECT_EQ(error({33}, 8, 0), "tensor 't': expected rows of whole blocks of 32 (q8_0), found 33 elements");
  EXPECT_EQ(error({128}, 12, 0),
            "tensor 't': expected rows of whole blocks of 256 (q4_k), found 128 elements");
  EXPECT_THAT(error({4, 0}, 0, 0), HasSubstr("tensor 't': expected a shape that fits into a file of"));
  EXPECT_THAT(error({uint64_t{1} << 62, 4}, 0, 0), HasSubstr("found [4, 4611686018427387904]"));
  EXPECT_THAT(error({1 << 16, 1 << 16, 1 << 16, 1 << 16}, 0, 0), HasSubstr("expected a shape that fits"));
  EXPECT_EQ(error({1}, 0, 8), "tensor 't': expected an offset that is a multiple of 32, found 8");
  EXPECT_THAT(error({1}, 0, ~uint64_t{31}),
              HasSubstr("tensor 't': expected 4 bytes at offset 18446744073709551584"));
  EXPECT_THAT(error({1}, 0, 96), HasSubstr("tensor 't': expected data up to byte"));
  EXPECT_EQ(error({1}, 0, 0).substr(12),
            "expected its own bytes, found offset 0 inside of another tensor's data");
  GgufBytes gguf = Good();
  gguf.Tensor("x", {1}, 0, 64);
  EXPECT_EQ(ErrorOf(gguf.Bytes()), "tensor 'x': expected each tensor once, found it twice");
}

TEST(GgufReaderTest, FilesThatAreNone) {
  EXPECT_EQ(GgufFile::Open("/nonexistent/x.gguf").status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(GgufFile::Open("/").ok());
}

// --- configuration

struct Shape {
  std::string architecture = "llama";
  uint64_t vocab = 8;
  bool head = false;
};

GgufBytes Model(const Shape& shape = {}) {
  const std::string& a = shape.architecture;
  GgufBytes gguf;
  gguf.Text("general.architecture", a).Int(a + ".embedding_length", 64).Int(a + ".feed_forward_length", 96);
  gguf.Int(a + ".block_count", 2).Int(a + ".context_length", 512).Int(a + ".attention.head_count", 4);
  gguf.Float(a + ".attention.layer_norm_rms_epsilon", 1e-5f);
  gguf.Tensor("token_embd.weight", {64, shape.vocab}, 0, 0);
  gguf.data = std::string(64 * shape.vocab * 4, '\0');
  if (shape.head) gguf.Tensor("output.weight", {32}, 0, gguf.data.size());
  gguf.data += std::string(128, '\0');
  return gguf;
}

absl::StatusOr<LlamaConfig> ConfigOf(const GgufBytes& gguf) {
  const std::string bytes = gguf.Bytes();
  return GgufLlamaConfig(**Parse(bytes));
}

std::string ConfigError(const GgufBytes& gguf) { return std::string(ConfigOf(gguf).status().message()); }

TEST(GgufConfigTest, DefaultsAndGivenKeys) {
  absl::StatusOr<LlamaConfig> config = ConfigOf(Model());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, "LlamaForCausalLM");
  EXPECT_EQ(config->hidden_size, 64);
  EXPECT_EQ(config->intermediate_size, 96);
  EXPECT_EQ(config->layers, 2);
  EXPECT_EQ(config->heads, 4);
  EXPECT_EQ(config->kv_heads, 4);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->vocab_size, 8);
  EXPECT_EQ(config->max_positions, 512);
  EXPECT_FLOAT_EQ(config->rms_norm_eps, 1e-5f);
  EXPECT_TRUE(config->tied_embeddings);
  EXPECT_FALSE(config->qkv_bias);
  EXPECT_EQ(config->inverse_frequency.size(), 8u);
  EXPECT_FLOAT_EQ(config->inverse_frequency[4], 0.01f);  // 10000^(-8/16)

  GgufBytes more = Model({.head = true});
  more.Int("llama.attention.head_count_kv", 2).Int("llama.attention.key_length", 32);
  more.Int("llama.attention.value_length", 32).Float("llama.rope.freq_base", 10000.0f);
  more.Text("llama.rope.scaling.type", "linear").Float("llama.rope.scaling.factor", 4.0f);
  more.Int("tokenizer.ggml.bos_token_id", 1).Int("tokenizer.ggml.eos_token_id", 2);
  more.Int("tokenizer.ggml.eot_token_id", 3);
  config = ConfigOf(more);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->kv_heads, 2);
  EXPECT_EQ(config->head_dim, 32);
  EXPECT_FALSE(config->tied_embeddings);
  EXPECT_FLOAT_EQ(config->inverse_frequency[8], 0.0025f);
  EXPECT_EQ(config->bos_token_id, 1);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(2, 3));
}

TEST(GgufConfigTest, Sampling) {
  EXPECT_EQ(ConfigOf(Model())->sampling->temperature, 1.0f);
  GgufBytes gguf = Model();
  gguf.Float("general.sampling.temp", 0.0f).Float("general.sampling.top_p", 0.9f);
  gguf.Float("general.sampling.min_p", 0.05f).Float("general.sampling.penalty_repeat", 1.1f);
  gguf.Int("general.sampling.top_k", 40);
  const absl::StatusOr<LlamaConfig> config = ConfigOf(gguf);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->sampling->temperature, 0.0f);
  EXPECT_EQ(config->sampling->top_p, 0.9f);
  EXPECT_EQ(config->sampling->min_p, 0.05f);
  EXPECT_EQ(config->sampling->repetition_penalty, 1.1f);
  EXPECT_EQ(config->sampling->top_k, 40);
  GgufBytes cold = Model();
  cold.Float("general.sampling.temp", -1.0f);
  const absl::StatusOr<LlamaConfig> wrong = ConfigOf(cold);
  ASSERT_TRUE(wrong.ok()) << wrong.status();
  EXPECT_THAT(std::string(wrong->sampling.status().message()),
              HasSubstr("temperature is -1; it must be between 0 and 100"));
}

TEST(GgufConfigTest, FrequencyFactors) {
  GgufBytes gguf = Model();
  gguf.Tensor("rope_freqs.weight", {8}, 0, gguf.data.size());
  std::string factors;
  for (int i = 0; i < 8; ++i) factors += Raw(i < 4 ? 1.0f : 8.0f);
  gguf.data += factors;
  const absl::StatusOr<LlamaConfig> config = ConfigOf(gguf);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FLOAT_EQ(config->inverse_frequency[0], 1.0f);
  EXPECT_FLOAT_EQ(config->inverse_frequency[4], 0.01f / 8);

  GgufBytes zero = Model();
  zero.Tensor("rope_freqs.weight", {8}, 0, zero.data.size());
  zero.data += std::string(32, '\0');
  EXPECT_THAT(ConfigError(zero),
              HasSubstr("tensor 'rope_freqs.weight': expected factors from 1e-6 to 1e6, found 0"));
  GgufBytes few = Model();
  few.Tensor("rope_freqs.weight", {4}, 0, few.data.size() - 32);
  EXPECT_THAT(ConfigError(few), HasSubstr("tensor 'rope_freqs.weight': expected 8 values of F32"));
}

TEST(GgufConfigTest, Refusals) {
  EXPECT_THAT(ConfigError(Model({.architecture = "gemma"})),
              HasSubstr("expected llama or qwen2, found 'gemma'"));
  EXPECT_THAT(ConfigError(GgufBytes()),
              HasSubstr("key 'general.architecture': expected a string, found no such key"));
  const auto with = [](std::string_view key, uint32_t value) {
    GgufBytes gguf = Model();
    gguf.Int(key, value);
    return ConfigError(gguf);
  };
  EXPECT_THAT(with("llama.expert_count", 8), HasSubstr("mixture of experts"));
  EXPECT_THAT(with("llama.attention.head_count_kv", 3),
              HasSubstr("expected a divisor of attention.head_count, 4"));
  EXPECT_THAT(with("llama.attention.key_length", 7), HasSubstr("expected an even number"));
  EXPECT_THAT(with("llama.attention.key_length", 1u << 30), HasSubstr("expected an integer from 2 to 1024"));
  EXPECT_THAT(with("llama.rope.dimension_count", 8), HasSubstr("expected the head's size, 16, found 8"));
  EXPECT_THAT(with("tokenizer.ggml.eos_token_id", 8), HasSubstr("expected an integer from 0 to 7, found 8"));
  EXPECT_THAT(with("split.count", 3), HasSubstr("expected a model in one file, found 3 parts"));
  GgufBytes yarn = Model();
  yarn.Text("llama.rope.scaling.type", "yarn");
  EXPECT_THAT(ConfigError(yarn), HasSubstr("expected none or linear, found 'yarn'"));
  GgufBytes missing;
  missing.Text("general.architecture", "llama");
  EXPECT_THAT(ConfigError(missing),
              HasSubstr("key 'llama.embedding_length': expected an integer, found no such key"));
}

TEST(GgufConfigTest, TensorNames) {
  EXPECT_EQ(GgufTensorName("model.embed_tokens.weight"), "token_embd.weight");
  EXPECT_EQ(GgufTensorName("model.layers.12.self_attn.k_proj.bias"), "blk.12.attn_k.bias");
  EXPECT_EQ(GgufTensorName("model.layers.0.post_attention_layernorm.weight"), "blk.0.ffn_norm.weight");
  EXPECT_EQ(GgufTensorName("model.layers.0.other.weight"), "");
  EXPECT_EQ(GgufTensorName("model.layers."), "");
  EXPECT_EQ(GgufTensorName("x"), "");
}

TEST(GgufConfigTest, InterleavedRows) {
  // A head of six rows: pairs (0, 3), (1, 4), (2, 5) lie side by side in the file.
  const int64_t expected[] = {0, 2, 4, 1, 3, 5};
  for (int64_t row = 0; row < 6; ++row) {
    EXPECT_EQ(InterleavedRow(row, 6), expected[row]);
    EXPECT_EQ(InterleavedRow(row + 12, 6), expected[row] + 12);
  }
}

}  // namespace
}  // namespace atp
