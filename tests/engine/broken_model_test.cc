// Checkpoints that disagree with themselves: one line that names file, tensor, expected and found.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "engine/llama_model.h"
#include "kernels/backend_factory.h"

namespace atp {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

const std::string kGolden = std::string(ATP_SOURCE_DIR) + "/tests/golden/";

// A copy of a golden model with one of its files changed.
class BrokenModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "/model_" + std::to_string(getpid()) + "_" +
           ::testing::UnitTest::GetInstance()->current_test_info()->name();
  }
  void TearDown() override { fs::remove_all(dir_); }

  void CopyOf(const std::string& name) {
    fs::remove_all(dir_);
    fs::copy(kGolden + name, dir_);
  }
  // Replaces every `from`, in text or binary, by a `to` of the same length in headers.
  void Replace(const std::string& file, const std::string& from, const std::string& to) {
    std::ifstream in(dir_ + "/" + file, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    size_t found = 0;
    for (size_t at = text.find(from); at != std::string::npos;
         at = text.find(from, at + to.size()), ++found) {
      text.replace(at, from.size(), to);
    }
    ASSERT_GT(found, 0u) << from;
    std::ofstream(dir_ + "/" + file, std::ios::binary) << text;
  }
  std::string LoadError() {
    BackendOptions options;
    options.device = "reference";
    const std::unique_ptr<Backend> backend = MakeBackend(options).value();
    const absl::Status status = LlamaModel::Load(dir_, backend.get(), ModelLimits(), nullptr).status();
    EXPECT_FALSE(status.ok());
    return std::string(status.message());
  }

  std::string dir_;
};

TEST_F(BrokenModelTest, MissingTensor) {
  CopyOf("llama_mha_f32");
  Replace("model.safetensors", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.UP_proj.weight");
  EXPECT_EQ(LoadError(),
            dir_ +
                "/model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight': expected shape [56, 32] "
                "as config.json says, found no such tensor");
}

TEST_F(BrokenModelTest, WrongShape) {
  CopyOf("llama_mha_f32");
  Replace("config.json", "\"vocab_size\": 83", "\"vocab_size\": 84");
  EXPECT_EQ(LoadError(),
            dir_ +
                "/model.safetensors: tensor 'model.embed_tokens.weight': expected shape [84, 32] as "
                "config.json says, found [83, 32]");
}

TEST_F(BrokenModelTest, TransposedIsAWrongShapeToo) {
  CopyOf("llama_mha_f32");
  Replace("model.safetensors", "[56,32]", "[32,56]");
  EXPECT_THAT(LoadError(),
              HasSubstr("tensor 'model.layers.0.mlp.gate_proj.weight': expected shape [56, 32]"));
}

TEST_F(BrokenModelTest, WrongDType) {
  CopyOf("llama_all_biases_f16");
  Replace("model.safetensors", R"("dtype":"F16")", R"("dtype":"I16")");
  EXPECT_EQ(LoadError(),
            dir_ +
                "/model.safetensors: tensor 'model.embed_tokens.weight': expected dtype F32, BF16 or "
                "F16, found I16");
}

TEST_F(BrokenModelTest, BiasThatTheConfigDoesNotAnnounce) {
  CopyOf("llama_all_biases_f16");
  Replace("config.json", "\"attention_bias\": true", "\"attention_bias\": false");
  EXPECT_EQ(LoadError(),
            dir_ +
                "/model.safetensors: tensor 'model.layers.0.self_attn.q_proj.bias': expected no such bias "
                "as config.json says, found one");
}

TEST_F(BrokenModelTest, MissingShard) {
  CopyOf("qwen2_bias_sharded_f32");
  fs::remove(dir_ + "/model-00002-of-00003.safetensors");
  EXPECT_THAT(LoadError(),
              HasSubstr("expected shard " + dir_ + "/model-00002-of-00003.safetensors, found no such file"));
}

TEST_F(BrokenModelTest, TruncatedShard) {
  CopyOf("qwen2_bias_sharded_f32");
  const std::string shard = dir_ + "/model-00003-of-00003.safetensors";
  fs::resize_file(shard, fs::file_size(shard) - 4);
  EXPECT_THAT(LoadError(), HasSubstr(shard + ": tensor 'model."));
}

}  // namespace
}  // namespace atp
