#include "engine/llama_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "absl/status/status.h"

namespace atp {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

// A config.json as key -> JSON text, so that a test states only what differs.
using Keys = std::map<std::string, std::string>;

std::string ConfigJson(const Keys& changes) {
  Keys keys = {{"architectures", R"(["LlamaForCausalLM"])"},
               {"hidden_size", "64"},
               {"intermediate_size", "160"},
               {"num_hidden_layers", "3"},
               {"num_attention_heads", "8"},
               {"num_key_value_heads", "2"},
               {"vocab_size", "1000"},
               {"max_position_embeddings", "2048"},
               {"rms_norm_eps", "1e-05"},
               {"hidden_act", "\"silu\""},
               {"tie_word_embeddings", "false"}};
  for (const auto& [key, value] : changes) {
    keys[key] = value;
    if (value == "-") keys.erase(key);
  }
  std::string json;
  for (const auto& [key, value] : keys) json += (json.empty() ? "{\"" : ",\"") + key + "\":" + value;
  return json + "}";
}

LlamaConfig Parsed(const Keys& changes) {
  const absl::StatusOr<LlamaConfig> config = ParseLlamaConfig(ConfigJson(changes), "c.json");
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : LlamaConfig();
}

std::string RefusalOf(const std::string& json) {
  const absl::StatusOr<LlamaConfig> config = ParseLlamaConfig(json, "c.json");
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << json;
  const std::string message(config.status().message());
  EXPECT_EQ(message.rfind("c.json: ", 0), 0u) << message;
  EXPECT_THAT(message, Not(HasSubstr("\n")));
  return message;
}
std::string Refusal(const Keys& changes) { return RefusalOf(ConfigJson(changes)); }

TEST(LlamaConfig, Llama) {
  const LlamaConfig config = Parsed({{"bos_token_id", "1"}, {"eos_token_id", "2"}});
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.hidden_size, 64);
  EXPECT_EQ(config.intermediate_size, 160);
  EXPECT_EQ(config.layers, 3);
  EXPECT_EQ(config.heads, 8);
  EXPECT_EQ(config.kv_heads, 2);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.vocab_size, 1000);
  EXPECT_EQ(config.max_positions, 2048);
  EXPECT_EQ(config.sliding_window, 0);
  EXPECT_FLOAT_EQ(config.rms_norm_eps, 1e-5f);
  EXPECT_FALSE(config.tied_embeddings || config.qkv_bias || config.output_bias || config.mlp_bias);
  EXPECT_EQ(config.bos_token_id, 1);
  EXPECT_THAT(config.eos_token_ids, ElementsAre(2));
  ASSERT_EQ(config.inverse_frequency.size(), 4u);
  for (int i = 0; i < 4; ++i) {
    EXPECT_FLOAT_EQ(config.inverse_frequency[static_cast<size_t>(i)], std::pow(10000.0, -i / 4.0));
  }
}

TEST(LlamaConfig, AbsentAndNullKeysMeanTheDefault) {
  for (const char* value : {"-", "null"}) {
    const LlamaConfig config = Parsed({{"num_key_value_heads", value},
                                       {"head_dim", value},
                                       {"hidden_act", value},
                                       {"rope_scaling", value},
                                       {"rope_theta", value},
                                       {"tie_word_embeddings", value},
                                       {"bos_token_id", value},
                                       {"eos_token_id", value},
                                       {"rms_norm_eps", value}});
    EXPECT_EQ(config.kv_heads, 8);
    EXPECT_EQ(config.head_dim, 8);
    EXPECT_EQ(config.bos_token_id, -1);
    EXPECT_TRUE(config.eos_token_ids.empty());
    EXPECT_FLOAT_EQ(config.rms_norm_eps, 1e-6f);
  }
}

TEST(LlamaConfig, ExplicitHeadDimBiasesAndEosList) {
  const LlamaConfig config = Parsed({{"head_dim", "32"},
                                     {"attention_bias", "true"},
                                     {"mlp_bias", "true"},
                                     {"tie_word_embeddings", "true"},
                                     {"eos_token_id", "[7,8,7]"}});
  EXPECT_EQ(config.head_dim, 32);
  EXPECT_EQ(config.inverse_frequency.size(), 16u);
  EXPECT_TRUE(config.qkv_bias && config.output_bias && config.mlp_bias && config.tied_embeddings);
  EXPECT_THAT(config.eos_token_ids, ElementsAre(7, 8));
}

TEST(LlamaConfig, Mistral) {
  const Keys mistral = {{"architectures", R"(["MistralForCausalLM"])"}, {"max_position_embeddings", "32768"}};
  Keys keys = mistral;
  EXPECT_EQ(Parsed(keys).sliding_window, 4096);  // what the architecture assumes of a file without the key
  keys["sliding_window"] = "null";
  EXPECT_EQ(Parsed(keys).sliding_window, 0);
  EXPECT_EQ(Parsed(keys).max_positions, 32768);
  keys["sliding_window"] = "1024";
  EXPECT_EQ(Parsed(keys).sliding_window, 1024);
  EXPECT_EQ(Parsed(keys).max_positions, 1024);
  keys["sliding_window"] = "0";
  EXPECT_THAT(Refusal(keys), HasSubstr("sliding_window: expected an integer from 1 to 134217728, found 0"));
}

TEST(LlamaConfig, Qwen2) {
  Keys keys = {{"architectures", R"(["Qwen2ForCausalLM"])"},
               {"sliding_window", "512"},
               {"use_sliding_window", "false"}};
  const LlamaConfig config = Parsed(keys);
  EXPECT_TRUE(config.qkv_bias);
  EXPECT_FALSE(config.output_bias || config.mlp_bias);
  EXPECT_EQ(config.sliding_window, 0);
  EXPECT_EQ(config.max_positions, 2048);
  keys["use_sliding_window"] = "true";
  EXPECT_EQ(Parsed(keys).max_positions, 512);
}

TEST(LlamaConfig, ArchitectureFromModelType) {
  EXPECT_EQ(Parsed({{"architectures", "-"}, {"model_type", "\"qwen2\""}}).architecture, "Qwen2ForCausalLM");
  EXPECT_EQ(Parsed({{"architectures", "null"}, {"model_type", "\"llama\""}}).architecture,
            "LlamaForCausalLM");
}

TEST(LlamaConfig, UnsupportedArchitecture) {
  constexpr char kList[] =
      "is not supported; supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM";
  EXPECT_EQ(Refusal({{"architectures", R"(["GPT2LMHeadModel"])"}}),
            std::string("c.json: architecture \"GPT2LMHeadModel\" ") + kList);
  EXPECT_EQ(Refusal({{"architectures", "-"}, {"model_type", "\"mamba\""}}),
            std::string("c.json: architecture \"mamba\" ") + kList);
  EXPECT_THAT(Refusal({{"architectures", "-"}}),
              HasSubstr("architecture \"(none: the file has no key architectures)\""));
  EXPECT_THAT(Refusal({{"architectures", "[]"}}),
              HasSubstr("architectures: expected an array of names, found an array"));
  EXPECT_THAT(Refusal({{"architectures", "3"}}),
              HasSubstr("architectures: expected an array of names, found 3"));
  EXPECT_THAT(Refusal({{"quantization_config", R"({"quant_method":"gptq"})"}}),
              HasSubstr("quantization_config: expected none, found one; only F32, BF16 and F16 weights"));
}

TEST(LlamaConfig, LinearScaling) {
  for (const char* scaling : {R"({"type":"linear","factor":4.0})", R"({"rope_type":"linear","factor":4})"}) {
    const LlamaConfig config = Parsed({{"rope_scaling", scaling}, {"rope_theta", "500"}});
    for (int i = 0; i < 4; ++i) {
      EXPECT_FLOAT_EQ(config.inverse_frequency[static_cast<size_t>(i)], std::pow(500.0, -i / 4.0) / 4)
          << scaling;
    }
  }
}

// Values computed by hand from the definition in Llama 3.1's reference implementation.
TEST(LlamaConfig, Llama3Scaling) {
  const LlamaConfig config = Parsed(
      {{"head_dim", "8"},
       {"rope_theta", "10000.0"},
       {"rope_scaling", R"({"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,)"
                        R"("original_max_position_embeddings":128})"}});
  ASSERT_EQ(config.inverse_frequency.size(), 4u);
  EXPECT_FLOAT_EQ(config.inverse_frequency[0], 1.0f);  // wavelength 6.28 < 128 / 4: kept
  // wavelength 62.8: 128 / 62.8 = 2.0372 turns, a share of (2.0372 - 1) / 3 = 0.34573 is kept
  EXPECT_NEAR(config.inverse_frequency[1], 0.1 * (0.345726 + (1 - 0.345726) / 8), 1e-6);
  EXPECT_FLOAT_EQ(config.inverse_frequency[2], 0.01f / 8);  // wavelength 628 > 128: slowed down in full
  EXPECT_FLOAT_EQ(config.inverse_frequency[3], 0.001f / 8);
}

TEST(LlamaConfig, RopeParametersOfNewerExports) {
  const LlamaConfig config = Parsed({{"rope_parameters", R"({"rope_type":"default","rope_theta":500.0})"}});
  EXPECT_FLOAT_EQ(config.inverse_frequency[1], std::pow(500.0, -0.25));
}

TEST(LlamaConfig, BadScaling) {
  for (const char* type : {"yarn", "dynamic", "longrope"}) {
    EXPECT_EQ(Refusal({{"rope_scaling", std::string(R"({"factor":2.0,"type":")") + type + "\"}"}}),
              std::string("c.json: rope_scaling: rope_type \"") + type +
                  "\" is not supported; supported are default, linear, llama3");
  }
  EXPECT_THAT(Refusal({{"rope_scaling", "7"}}),
              HasSubstr("rope_scaling: expected an object or null, found 7"));
  EXPECT_THAT(
      Refusal({{"rope_scaling", R"({"type":"linear"})"}}),
      HasSubstr("rope_scaling: factor: expected a number above 0 and at most 1e+06, found no such key"));
  EXPECT_THAT(Refusal({{"rope_scaling", R"({"type":"linear","factor":0})"}}),
              HasSubstr("factor: expected a number above 0"));
  EXPECT_THAT(Refusal({{"rope_scaling", R"({"type":4})"}}),
              HasSubstr("rope_scaling: type: expected a string, found 4"));
  EXPECT_THAT(Refusal({{"rope_scaling", R"({"rope_type":"llama3","factor":8.0,"low_freq_factor":4.0,)"
                                        R"("high_freq_factor":4.0,"original_max_position_embeddings":64})"}}),
              HasSubstr("rope_scaling: high_freq_factor: expected more than low_freq_factor, 4, found 4"));
  EXPECT_THAT(
      Refusal({{"rope_scaling",
                R"({"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0})"}}),
      HasSubstr("rope_scaling: original_max_position_embeddings: expected an integer from 1 to 134217728, "
                "found no such key"));
  EXPECT_THAT(Refusal({{"rope_theta", "0"}}),
              HasSubstr("rope_theta: expected a number above 0 and at most 1e+15, found 0"));
  EXPECT_THAT(Refusal({{"partial_rotary_factor", "0.5"}}), HasSubstr("partial_rotary_factor: expected 1"));
}

TEST(LlamaConfig, EverySizeIsChecked) {
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "vocab_size", "max_position_embeddings"}) {
    const std::string start = std::string("c.json: ") + key + ": expected an integer from 1 to ";
    for (const char* bad : {"0", "-1", "-9223372036854775808", "4294967297", "9223372036854775808", "1e3",
                            "64.0", "true", "\"64\"", "[64]", "{}", "36893488147419103232"}) {
      EXPECT_EQ(Refusal({{key, bad}}).rfind(start, 0), 0u)
          << key << " " << bad << ": " << Refusal({{key, bad}});
    }
  }
  EXPECT_EQ(Refusal({{"num_attention_heads", "0"}}),
            "c.json: num_attention_heads: expected an integer from 1 to 1024, found 0");
  EXPECT_EQ(Refusal({{"vocab_size", "\"x\\n\""}}),
            "c.json: vocab_size: expected an integer from 1 to 16777216, found \"x\\n\"");
  EXPECT_THAT(Refusal({{"hidden_size", "-"}}),
              HasSubstr("hidden_size: expected an integer from 1 to 131072, found no such key"));
  EXPECT_THAT(Refusal({{"architectures", R"(["MistralForCausalLM"])"}, {"num_key_value_heads", "-"}}),
              HasSubstr("num_key_value_heads: expected an integer from 1 to 1024, found no such key"));
}

TEST(LlamaConfig, Heads) {
  EXPECT_EQ(Refusal({{"num_key_value_heads", "3"}}),
            "c.json: num_key_value_heads: expected a divisor of num_attention_heads, 8, found 3");
  EXPECT_EQ(Refusal({{"num_attention_heads", "6"}}),
            "c.json: num_attention_heads: expected a divisor of hidden_size, 64, found 6");
  EXPECT_EQ(Refusal({{"head_dim", "5"}}),
            "c.json: head_dim: expected an even number from 2 to 1024, found 5");
  EXPECT_EQ(Refusal({{"hidden_size", "40"}}),
            "c.json: head_dim: expected an even number from 2 to 1024, found 5");
  EXPECT_THAT(Refusal({{"head_dim", "0"}}),
              HasSubstr("head_dim: expected an integer from 2 to 1024, found 0"));
}

TEST(LlamaConfig, OtherWrongValues) {
  EXPECT_EQ(Refusal({{"hidden_act", "\"gelu\""}}), "c.json: hidden_act: expected \"silu\", found \"gelu\"");
  EXPECT_THAT(Refusal({{"hidden_act", "1"}}), HasSubstr("hidden_act: expected a string, found 1"));
  EXPECT_THAT(Refusal({{"rms_norm_eps", "0"}}),
              HasSubstr("rms_norm_eps: expected a number above 0 and at most 1, found 0"));
  EXPECT_THAT(Refusal({{"rms_norm_eps", "\"1\""}}), HasSubstr("rms_norm_eps: expected a number above 0"));
  EXPECT_THAT(Refusal({{"tie_word_embeddings", "1"}}),
              HasSubstr("tie_word_embeddings: expected true or false, found 1"));
  EXPECT_THAT(Refusal({{"attention_bias", "\"yes\""}}),
              HasSubstr("attention_bias: expected true or false, found \"yes\""));
  EXPECT_THAT(Refusal({{"eos_token_id", "1000"}}),
              HasSubstr("eos_token_id: expected a token id below vocab_size, 1000"));
  EXPECT_THAT(Refusal({{"eos_token_id", "[1,-1]"}}), HasSubstr("of them, found -1"));
  EXPECT_THAT(Refusal({{"eos_token_id", "[[1]]"}}), HasSubstr("of them, found an array"));
  EXPECT_THAT(Refusal({{"bos_token_id", "1000"}}),
              HasSubstr("bos_token_id: expected an integer from -1 to 999, found 1000"));
}

TEST(LlamaConfig, NotJson) {
  EXPECT_THAT(RefusalOf(""), HasSubstr("expected valid JSON, found a syntax error at byte"));
  EXPECT_THAT(RefusalOf("hello"), HasSubstr("expected valid JSON, found a syntax error at byte 1"));
  EXPECT_THAT(RefusalOf("[1]"), HasSubstr("expected a JSON object, found an array"));
  EXPECT_THAT(RefusalOf("{\"hidden_size\":1e999}"), HasSubstr("a number that no double can hold"));
  EXPECT_THAT(RefusalOf("{\"a\":\"\xff\"}"), HasSubstr("expected valid JSON"));
  EXPECT_THAT(RefusalOf(std::string(500'000, '[')), HasSubstr("expected JSON nested at most 32 deep"));
  EXPECT_THAT(RefusalOf(std::string((1 << 20) + 1, ' ')),
              HasSubstr("expected at most 1048576 bytes, found 1048577"));
}

class LoadLlamaConfigTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "/llama_config_" + std::to_string(getpid()) + "_" +
           ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  void Write(const std::string& name, const std::string& text) { std::ofstream(dir_ + "/" + name) << text; }

  std::string dir_;
};

TEST_F(LoadLlamaConfigTest, MergesGenerationConfig) {
  Write("config.json", ConfigJson({{"eos_token_id", "2"}}));
  EXPECT_THAT(LoadLlamaConfig(dir_)->eos_token_ids, ElementsAre(2));
  Write("generation_config.json", R"({"eos_token_id":[5,2,9],"temperature":0.6})");
  EXPECT_THAT(LoadLlamaConfig(dir_)->eos_token_ids, ElementsAre(2, 5, 9));
  Write("generation_config.json", R"({"eos_token_id":1000})");
  EXPECT_THAT(
      std::string(LoadLlamaConfig(dir_).status().message()),
      HasSubstr(dir_ + "/generation_config.json: eos_token_id: expected a token id below vocab_size, 1000"));
  Write("generation_config.json", "{");
  EXPECT_THAT(std::string(LoadLlamaConfig(dir_).status().message()),
              HasSubstr(dir_ + "/generation_config.json: expected valid JSON"));
}

TEST_F(LoadLlamaConfigTest, SamplingOfGenerationConfig) {
  Write("config.json", ConfigJson({}));
  EXPECT_EQ(LoadLlamaConfig(dir_)->sampling->temperature, 1.0f);
  Write("generation_config.json",
        R"({"do_sample":false,"temperature":0,"top_k":40,"top_p":0.9,"min_p":0.0,"repetition_penalty":1.1})");
  const SamplingParams sampling = *LoadLlamaConfig(dir_)->sampling;
  EXPECT_EQ(sampling.temperature, 0.0f);
  EXPECT_EQ(sampling.top_k, 40);
  EXPECT_EQ(sampling.top_p, 0.9f);
  EXPECT_EQ(sampling.min_p, 0.0f);
  EXPECT_EQ(sampling.repetition_penalty, 1.1f);
  Write("generation_config.json", R"({"top_k":-1,"top_p":null,"temperature":0.6})");
  EXPECT_EQ(LoadLlamaConfig(dir_)->sampling->top_k, 0) << "-1 is vLLM's way to say off";
  EXPECT_EQ(LoadLlamaConfig(dir_)->sampling->top_p, 1.0f);
  EXPECT_EQ(LoadLlamaConfig(dir_)->sampling->temperature, 0.6f);
  const std::pair<const char*, const char*> wrong[] = {
      {R"({"temperature":-1})", "temperature is -1; it must be between 0 and 100"},
      {R"({"temperature":"hot"})", "temperature: expected a number"},
      {R"({"top_k":-2})", "top_k: expected an integer from -1"},
      {R"({"top_p":0})", "top_p is 0; it must be greater than 0 and at most 1"},
      {R"({"min_p":1.5})", "min_p is 1.5; it must be"},
      {R"({"repetition_penalty":0})", "repetition_penalty is 0; it must be"}};
  for (const auto& [text, message] : wrong) {
    Write("generation_config.json", text);
    const absl::StatusOr<LlamaConfig> config = LoadLlamaConfig(dir_);
    ASSERT_TRUE(config.ok()) << "only who wants the defaults is stopped by them: " << config.status();
    EXPECT_THAT(std::string(config->sampling.status().message()),
                HasSubstr(dir_ + "/generation_config.json: " + message));
  }
}

TEST_F(LoadLlamaConfigTest, NoSuchFile) {
  const absl::Status status = LoadLlamaConfig(dir_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr(dir_ + "/config.json: cannot open"));
  std::filesystem::create_directory(dir_ + "/config.json");  // a directory opens, and cannot be read
  EXPECT_FALSE(LoadLlamaConfig(dir_).ok());
}

}  // namespace
}  // namespace atp
