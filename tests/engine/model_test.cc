// The whole model against golden logits of an independent implementation (tests/golden/generate_golden.py),
// and against itself: how tokens are cut into steps, and what else is in a step, must not change a single
// bit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "engine/block_table.h"
#include "engine/llama_model.h"
#include "kernels/backend_factory.h"
#ifdef ATP_CUDA_EMULATED
#include "tests/kernels/cuda_emulation/emulated_backend.h"
#endif

namespace atp {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

const std::string kGolden = std::string(ATP_SOURCE_DIR) + "/tests/golden/";

bool IsCuda(const std::string& device) { return device.substr(0, 4) == "cuda"; }

// Those whose head size the device supports.
std::vector<std::string> TinyModels(const std::string& device) {
  if (IsCuda(device)) return {"llama3_gqa2_bf16"};
  return {"llama_mha_f32",          "llama3_gqa2_bf16",   "linear_gqa4_f16",
          "qwen2_bias_sharded_f32", "mistral_gqa2_mixed", "llama_all_biases_f16"};
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// A .npy file of version 1 (numpy.lib.format): little-endian, C order, four bytes per element.
template <typename T>
struct Array {
  std::vector<size_t> shape;
  std::vector<T> values;

  explicit Array(const std::string& path) {
    const std::string file = ReadFile(path);
    const size_t header_bytes = static_cast<uint8_t>(file.at(8)) + 256u * static_cast<uint8_t>(file.at(9));
    const std::string header = file.substr(10, header_bytes);
    EXPECT_THAT(header, HasSubstr(std::is_same_v<T, float> ? "'<f4'" : "'<i4'")) << path;
    EXPECT_THAT(header, HasSubstr("'fortran_order': False")) << path;
    std::istringstream numbers(header.substr(header.find("'shape': (") + 10));
    size_t count = 1;
    for (size_t size = 0; numbers >> size; numbers.ignore(1)) {
      shape.push_back(size);
      count *= size;
    }
    values.resize(count);
    EXPECT_EQ(file.size(), 10 + header_bytes + count * sizeof(T)) << path;
    std::memcpy(values.data(), file.data() + 10 + header_bytes, count * sizeof(T));
  }

  std::vector<T> Row(size_t index) const {
    const size_t size = values.size() / shape[0];
    return {values.begin() + static_cast<std::ptrdiff_t>(index * size),
            values.begin() + static_cast<std::ptrdiff_t>((index + 1) * size)};
  }
};

// device: "reference", "cpu", "cuda", "cuda_emulated", or "cpu:" and an ISA.
absl::StatusOr<std::unique_ptr<Backend>> BackendFor(const std::string& device, int threads) {
#ifdef ATP_CUDA_EMULATED
  if (device == "cuda_emulated") return cuda_emulated::MakeBackend();
#endif
  BackendOptions options;
  const size_t colon = device.find(':');
  options.device = device.substr(0, colon);
  if (colon != std::string::npos) options.cpu_isa = device.substr(colon + 1);
  options.threads = threads;
  return MakeBackend(options);
}

// A loaded model with a cache, and sequences that run in it step by step.
class Runner {
 public:
  Runner(const std::string& device, const std::string& model_dir, int threads = 0) {
    backend_ = BackendFor(device, threads).value();
    ModelLimits limits;
    limits.max_batch_rows = 128;
    limits.max_logit_rows = 128;
    limits.max_batch_entries = 4;
    model_ = LlamaModel::Load(model_dir, backend_.get(), limits, nullptr).value();
    const KvCache::Shape shape = model_->cache_shape();
    cache_ = std::make_unique<KvCache>(KvCache::Create(backend_.get(), shape, 16 << 20).value());
  }

  const LlamaConfig& config() const { return model_->config(); }
  size_t vocab() const { return static_cast<size_t>(model_->config().vocab_size); }

  // Returns the handle of a new sequence.
  size_t NewSequence() {
    sequences_.emplace_back(config().layers, config().kv_heads);
    return sequences_.size() - 1;
  }

  struct Part {
    size_t sequence;
    std::vector<int32_t> tokens;
  };
  // One step; the logits of every row, [rows, vocab].
  std::vector<float> Step(const std::vector<Part>& parts) {
    batch_.Clear();
    for (const Part& part : parts) {
      State& state = sequences_[part.sequence];
      BatchEntry entry;
      entry.first_row = batch_.rows();
      entry.rows = static_cast<int>(part.tokens.size());
      for (const int32_t token : part.tokens) {
        batch_.logit_rows.push_back(batch_.rows());
        batch_.tokens.push_back(token);
        batch_.positions.push_back(state.position++);
      }
      while (state.table.exact_blocks() * cache_->shape().block_tokens < state.position)
        GiveBlocks(&state.table);
      entry.table = &state.table;
      entry.exact_entries = state.position;
      batch_.entries.push_back(entry);
    }
    const std::span<const float> logits = model_->Forward(batch_, *cache_).value();
    return {logits.begin(), logits.end()};
  }

  std::vector<float> Whole(const std::vector<int32_t>& tokens) { return Step({{NewSequence(), tokens}}); }

  LlamaModel& model() { return *model_; }
  const KvCache& cache() const { return *cache_; }

 private:
  struct State {
    State(int layers, int kv_heads) : table(layers, kv_heads) {}
    BlockTable table;
    int position = 0;
  };

  // Blocks from the far end of the pool, downwards: neither in order nor side by side for one head.
  void GiveBlocks(BlockTable* table) {
    std::vector<BlockId> ids;
    for (int i = 0; i < cache_->shape().heads_total(); ++i) {
      ids.push_back(static_cast<BlockId>(cache_->num_blocks()) - ++blocks_used_);
    }
    ASSERT_GE(ids.back(), 0);
    table->AppendExact(ids);
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LlamaModel> model_;
  std::unique_ptr<KvCache> cache_;
  std::deque<State> sequences_;
  BlockId blocks_used_ = 0;
  Batch batch_;
};

// max|a - b| / max|b|, the measure of the golden tests.
double RelativeError(const std::vector<float>& actual, const std::vector<float>& expected) {
  EXPECT_EQ(actual.size(), expected.size());
  double worst = 0;
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(static_cast<double>(actual[i]) - static_cast<double>(expected[i]));
    if (!(error <= worst)) worst = error;  // a NaN sticks
    largest = std::max(largest, std::abs(static_cast<double>(expected[i])));
  }
  EXPECT_GT(largest, 0.1);  // else the fixture says nothing
  return worst / largest;
}

constexpr double kGoldenTolerance = 1e-4;

// A GPU rounds the activations that meet bf16 weights to bf16, each by up to 2^-9 of itself, and the products
// of a sum average that out. Two dozen sums after another that are off by as much each are the bound.
double GoldenTolerance(const std::string& device) { return IsCuda(device) ? 24 * 0x1p-9 : kGoldenTolerance; }

class ModelTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (GetParam() != "cuda") return;
    const absl::Status status = BackendFor(GetParam(), 1).status();
    if (!status.ok()) GTEST_SKIP() << status.message();
  }
};
std::vector<std::string> Devices() {
  std::vector<std::string> devices = {"reference"};
  for (const std::string& isa : CpuIsaNames()) devices.push_back("cpu:" + isa);
#ifdef ATP_CUDA_EMULATED
  devices.push_back("cuda_emulated");
#endif
  devices.push_back("cuda");
  return devices;
}
INSTANTIATE_TEST_SUITE_P(Devices, ModelTest, ::testing::ValuesIn(Devices()), [](const auto& param_info) {
  std::string name = param_info.param;
  std::replace(name.begin(), name.end(), ':', '_');
  return name;
});

TEST_P(ModelTest, TinyModelsMatchGoldenLogits) {
  for (const std::string& name : TinyModels(GetParam())) {
    SCOPED_TRACE(name);
    Runner runner(GetParam(), kGolden + name);
    const Array<int32_t> tokens(kGolden + name + "/tokens.npy");
    const Array<float> logits(kGolden + name + "/logits.npy");
    for (size_t i = 0; i < tokens.shape[0]; ++i) {
      EXPECT_LE(RelativeError(runner.Whole(tokens.Row(i)), logits.Row(i)), GoldenTolerance(GetParam()))
          << "prompt " << i;
    }
  }
}

TEST_P(ModelTest, DefaultModelMatchesGoldenLogits) {
  Runner runner(GetParam(), std::string(ATP_SOURCE_DIR) + "/models/default");
  const Array<int32_t> tokens(kGolden + "default/tokens.npy");
  const Array<int32_t> columns(kGolden + "default/columns.npy");
  const Array<float> expected(kGolden + "default/logits.npy");
  const Array<float> last(kGolden + "default/last.npy");
  for (size_t i = 0; i < tokens.shape[0]; ++i) {
    const std::vector<float> logits = runner.Whole(tokens.Row(i));
    std::vector<float> sampled;
    for (size_t row = 0; row < tokens.shape[1]; ++row) {
      for (const int32_t column : columns.values) {
        sampled.push_back(logits[row * runner.vocab() + static_cast<size_t>(column)]);
      }
    }
    EXPECT_LE(RelativeError(sampled, expected.Row(i)), GoldenTolerance(GetParam())) << "prompt " << i;
    const std::vector<float> end(logits.end() - static_cast<std::ptrdiff_t>(runner.vocab()), logits.end());
    EXPECT_LE(RelativeError(end, last.Row(i)), GoldenTolerance(GetParam())) << "prompt " << i;
  }
}

void Append(std::vector<float>* all, const std::vector<float>& more) {
  all->insert(all->end(), more.begin(), more.end());
}

std::vector<int32_t> Slice(const std::vector<int32_t>& tokens, size_t begin, size_t size) {
  return {tokens.begin() + static_cast<std::ptrdiff_t>(begin),
          tokens.begin() + static_cast<std::ptrdiff_t>(begin + size)};
}

// Bitwise: a NaN or a -0 would count as a difference, too.
void ExpectSameBits(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  size_t different = 0;
  for (size_t i = 0; i < a.size(); ++i) different += std::memcmp(&a[i], &b[i], sizeof(float)) != 0;
  EXPECT_EQ(different, 0u) << "of " << a.size() << " logits";
}

TEST_P(ModelTest, ChunkedPrefillIsWholePrefillBitwise) {
  for (const std::string& name : TinyModels(GetParam())) {
    SCOPED_TRACE(name);
    Runner runner(GetParam(), kGolden + name);
    const std::vector<int32_t> tokens = Array<int32_t>(kGolden + name + "/tokens.npy").Row(0);
    const std::vector<float> whole = runner.Whole(tokens);
    const std::vector<std::vector<size_t>> cuts = {{16, 24}, {1, 39}, {7, 9, 17, 7}, {15, 2, 15, 8}, {39, 1}};
    for (const std::vector<size_t>& sizes : cuts) {
      const size_t sequence = runner.NewSequence();
      std::vector<float> chunked;
      size_t begin = 0;
      for (const size_t size : sizes) {
        Append(&chunked, runner.Step({{sequence, Slice(tokens, begin, size)}}));
        begin += size;
      }
      ExpectSameBits(chunked, whole);
    }
  }
}

TEST_P(ModelTest, DecodeIsPrefillBitwise) {
  for (const std::string& name : TinyModels(GetParam())) {
    SCOPED_TRACE(name);
    Runner runner(GetParam(), kGolden + name);
    const std::vector<int32_t> tokens = Array<int32_t>(kGolden + name + "/tokens.npy").Row(1);
    const size_t sequence = runner.NewSequence();
    std::vector<float> decoded;
    for (const int32_t token : tokens) Append(&decoded, runner.Step({{sequence, {token}}}));
    ExpectSameBits(decoded, runner.Whole(tokens));
  }
}

TEST_P(ModelTest, BatchedIsAloneBitwise) {
  for (const std::string& name : TinyModels(GetParam())) {
    SCOPED_TRACE(name);
    Runner runner(GetParam(), kGolden + name);
    const Array<int32_t> prompts(kGolden + name + "/tokens.npy");
    const std::vector<int32_t> first = prompts.Row(0);
    const std::vector<int32_t> second = prompts.Row(1);
    // Whole prompts side by side.
    std::vector<float> alone = runner.Whole(Slice(first, 0, 33));
    Append(&alone, runner.Whole(second));
    ExpectSameBits(runner.Step({{runner.NewSequence(), Slice(first, 0, 33)}, {runner.NewSequence(), second}}),
                   alone);
    // One decodes while the other is in mid-prompt.
    const size_t a = runner.NewSequence();
    const size_t b = runner.NewSequence();
    runner.Step({{a, Slice(first, 0, 20)}});
    const std::vector<float> mixed = runner.Step({{b, Slice(second, 0, 21)}, {a, {first[20]}}});
    std::vector<float> expected = runner.Whole(Slice(second, 0, 21));
    const std::vector<float> of_first = runner.Whole(Slice(first, 0, 21));
    expected.insert(expected.end(), of_first.end() - static_cast<std::ptrdiff_t>(runner.vocab()),
                    of_first.end());
    ExpectSameBits(mixed, expected);
  }
}

TEST(Model, ThreadsDoNotChangeABit) {
  const std::string model = std::string(ATP_SOURCE_DIR) + "/models/default";
  const std::vector<int32_t> tokens = Array<int32_t>(kGolden + "default/tokens.npy").Row(0);
  const std::vector<float> one = Runner("cpu", model, 1).Whole(tokens);
  ExpectSameBits(Runner("cpu", model, 3).Whole(tokens), one);
}

TEST(Model, OnlyWantedRowsHaveLogits) {
  Runner runner("reference", kGolden + "llama_mha_f32");
  const std::vector<int32_t> tokens = Array<int32_t>(kGolden + "llama_mha_f32/tokens.npy").Row(0);
  const std::vector<float> all = runner.Whole(tokens);
  BlockTable table(runner.config().layers, runner.config().kv_heads);
  for (int block = 0; block < 3; ++block) {
    std::vector<BlockId> ids;
    for (int i = 0; i < runner.cache().shape().heads_total(); ++i) ids.push_back(block * 8 + i);
    table.AppendExact(ids);
  }
  Batch batch;
  batch.tokens = tokens;
  for (int i = 0; i < batch.rows(); ++i) batch.positions.push_back(i);
  BatchEntry entry;
  entry.table = &table;
  entry.rows = batch.rows();
  entry.exact_entries = batch.rows();
  batch.entries.push_back(entry);
  EXPECT_TRUE(runner.model().Forward(batch, runner.cache()).value().empty());
  batch.logit_rows = {5, 39};
  const std::span<const float> logits = runner.model().Forward(batch, runner.cache()).value();
  ASSERT_EQ(logits.size(), 2 * runner.vocab());
  const auto row = [&](size_t index) {
    return all.begin() + static_cast<std::ptrdiff_t>(index * runner.vocab());
  };
  EXPECT_TRUE(
      std::equal(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(runner.vocab()), row(5)));
  EXPECT_TRUE(
      std::equal(logits.begin() + static_cast<std::ptrdiff_t>(runner.vocab()), logits.end(), row(39)));
}

TEST(ModelDeathTest, RefusesABatchBeyondItsLimits) {
  Runner runner("reference", kGolden + "llama_mha_f32");
  EXPECT_DEATH(runner.Whole(std::vector<int32_t>(129, 1)), "rows <= max_batch_rows");
  EXPECT_DEATH(runner.Whole({83}), "tokens in the vocabulary");
}

TEST(Model, LoadsDataOfAnyAlignment) {
  const std::string dir = ::testing::TempDir() + "/misaligned_" + std::to_string(getpid());
  fs::remove_all(dir);
  fs::copy(kGolden + "llama_mha_f32", dir);
  const std::string file = ReadFile(dir + "/model.safetensors");
  size_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  const size_t longer = header_bytes + 1;  // one more blank behind the header shifts all data by a byte
  std::string shifted(reinterpret_cast<const char*>(&longer), sizeof(longer));
  shifted += file.substr(8, header_bytes) + " " + file.substr(8 + header_bytes);
  std::ofstream(dir + "/model.safetensors", std::ios::binary) << shifted;
  const std::vector<int32_t> tokens = Array<int32_t>(kGolden + "llama_mha_f32/tokens.npy").Row(0);
  ExpectSameBits(Runner("cpu", dir).Whole(tokens), Runner("cpu", kGolden + "llama_mha_f32").Whole(tokens));
  fs::remove_all(dir);
}

TEST(Model, ReportsProgressInBytes) {
  BackendOptions options;
  const std::unique_ptr<Backend> backend = MakeBackend(options).value();
  size_t last_done = 0;
  size_t last_total = 0;
  const auto model = LlamaModel::Load(std::string(ATP_SOURCE_DIR) + "/models/default", backend.get(),
                                      ModelLimits(), [&](size_t done, size_t total) {
                                        EXPECT_GT(done, last_done);
                                        last_done = done;
                                        last_total = total;
                                      });
  ASSERT_TRUE(model.ok()) << model.status();
  const std::string file = ReadFile(std::string(ATP_SOURCE_DIR) + "/models/default/model.safetensors");
  size_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  EXPECT_EQ(last_total, file.size() - sizeof(header_bytes) - header_bytes);
  EXPECT_EQ(last_done, last_total);
  const LlamaConfig& config = (*model)->config();  // norms are kept as F32, two bytes an element more
  EXPECT_EQ((*model)->weight_bytes(),
            last_total + 2 * static_cast<size_t>((2 * config.layers + 1) * config.hidden_size));
  EXPECT_EQ((*model)->weight_dtype(), DType::kBF16);
  EXPECT_GT((*model)->activation_bytes(), 0u);
}

}  // namespace
}  // namespace atp
