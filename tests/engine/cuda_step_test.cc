// Steps of a model on the emulated GPU as wholes: what crosses the bus, what is launched, that graphs change
// no bit, and that memory is taken at start.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/block_table.h"
#include "engine/llama_model.h"
#include "tests/engine/planned_runner.h"
#include "tests/kernels/cuda_emulation/emulated_backend.h"
#include "tests/kernels/cuda_emulation/runtime_api.h"

namespace atp {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

const std::string kModel = std::string(ATP_SOURCE_DIR) + "/tests/golden/llama3_gqa2_bf16";

// graphs: without, every kernel is launched by itself.
std::unique_ptr<Backend> Device(bool graphs = true) {
  if (!graphs) setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
  std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  unsetenv("CUDA_LAUNCH_BLOCKING");
  return backend;
}

// Sequences that grow by what they are given, or by what was sampled.
class Decoder {
 public:
  static constexpr int kSequences = 6;

  explicit Decoder(std::unique_ptr<Backend> backend, int max_rows = 64) : backend_(std::move(backend)) {
    ModelLimits limits;
    limits.max_batch_rows = max_rows;
    limits.max_logit_rows = limits.max_batch_entries = kSequences;
    model_ = LlamaModel::Load(kModel, backend_.get(), limits, nullptr).value();
    const KvCache::Shape shape = model_->cache_shape();
    cache_ = std::make_unique<KvCache>(KvCache::Create(backend_.get(), shape, 4 << 20).value());
    for (int i = 0; i < kSequences; ++i) sequences_.emplace_back(shape.layers, shape.kv_heads);
  }

  // The next tokens of some sequences, each `rows` long. top: how many log probabilities are wanted.
  std::vector<SampledRow> Step(const std::vector<int>& which, int rows = 1, int top = -1) {
    Batch batch;
    std::vector<SampleRow> wanted;
    for (const int index : which) {
      State& state = sequences_[index];
      BatchEntry entry;
      entry.first_row = batch.rows();
      entry.rows = rows;
      for (int i = 0; i < rows; ++i) {
        batch.tokens.push_back(i == 0 ? state.next : (7 * i + index) % model_->config().vocab_size);
        batch.positions.push_back(state.position++);
      }
      batch.logit_rows.push_back(batch.rows() - 1);
      SampleRow row;
      row.row = static_cast<int32_t>(wanted.size());
      row.temperature = index % 2 == 0 ? 0.0f : 1.0f;
      row.uniform = 0.3;
      row.top_logprobs = top;
      wanted.push_back(row);
      while (state.table.exact_blocks() * cache_->shape().block_tokens < state.position) GiveBlocks(&state);
      entry.table = &state.table;
      entry.exact_entries = state.position;
      batch.entries.push_back(entry);
    }
    std::vector<SampledRow> sampled(which.size());
    status = model_->Forward(batch, *cache_, wanted, sampled);
    for (size_t i = 0; i < which.size(); ++i) sequences_[which[i]].next = sampled[i].token;
    return sampled;
  }

  Backend& backend() { return *backend_; }
  int layers() const { return model_->config().layers; }
  absl::Status status;  // of the last step

 private:
  struct State {
    State(int layers, int kv_heads) : table(layers, kv_heads) {}
    BlockTable table;
    int position = 0;
    int32_t next = 1;
  };
  void GiveBlocks(State* state) {
    std::vector<BlockId> ids(cache_->shape().heads_total());
    for (BlockId& id : ids) id = static_cast<BlockId>(cache_->num_blocks()) - ++blocks_used_;
    ASSERT_GE(ids.back(), 0);
    state->table.AppendExact(ids);
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LlamaModel> model_;
  std::unique_ptr<KvCache> cache_;
  std::deque<State> sequences_;
  BlockId blocks_used_ = 0;
};

// What one step asked of the device.
emulation::Counts Asked(const std::function<void()>& step) {
  const emulation::Counts before = emulation::Counted();
  step();
  emulation::Counts asked = emulation::Counted();
  asked.copies_to_device -= before.copies_to_device, asked.copies_to_host -= before.copies_to_host;
  asked.kernels -= before.kernels, asked.graphs -= before.graphs;
  asked.graphs_refused -= before.graphs_refused;
  asked.graph_launches -= before.graph_launches, asked.nodes_set -= before.nodes_set;
  return asked;
}

TEST(CudaStep, ADecodeStepIsOneCopyEachWayAndOneGraph) {
  Decoder decoder(Device());
  decoder.Step({0, 1, 2}, 5);
  const emulation::Counts first = Asked([&] { decoder.Step({0, 1, 2}); });
  ASSERT_TRUE(decoder.status.ok()) << decoder.status;
  EXPECT_EQ(first.copies_to_device, 1);
  EXPECT_EQ(first.copies_to_host, 1);
  EXPECT_EQ(first.kernels, 0);
  EXPECT_EQ(first.graphs, 1);
  EXPECT_EQ(first.graph_launches, 1);
  // Nothing of the next one but its tables is new; nor is there when sequences have another block.
  for (int i = 0; i < 12; ++i) {  // from 6 tokens to 17
    const emulation::Counts next = Asked([&] { decoder.Step({0, 1, 2}); });
    EXPECT_EQ(next.copies_to_device, 1);
    EXPECT_EQ(next.kernels + next.graphs + next.nodes_set, 0) << "step " << i;
    EXPECT_EQ(next.graph_launches, 1);
  }
  // One sequence more is of the same size class; what depends on their number is set.
  const emulation::Counts more = Asked([&] { decoder.Step({0, 1, 2, 3}); });
  EXPECT_EQ(more.graphs, 0);
  EXPECT_GT(more.nodes_set, decoder.layers());
  // Two are of another.
  EXPECT_EQ(Asked([&] { decoder.Step({0, 1}); }).graphs, 1);
  // Log probabilities are a kernel more.
  EXPECT_EQ(Asked([&] { decoder.Step({0, 1}, 1, 3); }).graphs, 1);
  EXPECT_EQ(Asked([&] { decoder.Step({0, 1}); }).graphs, 0);
  EXPECT_TRUE(decoder.status.ok()) << decoder.status;
}

TEST(CudaStep, PromptsSendTheirTablesOnce) {
  Decoder decoder(Device());
  const emulation::Counts asked = Asked([&] { decoder.Step({0, 1, 2}, 9); });
  ASSERT_TRUE(decoder.status.ok()) << decoder.status;
  EXPECT_GT(decoder.layers(), 1);
  // Of the step: tables of all layers. Of ops: tokens, the plan of attention, rows with logits, samples.
  EXPECT_EQ(asked.copies_to_device, 5);
  EXPECT_EQ(asked.copies_to_host, 1);
  EXPECT_EQ(asked.graph_launches, 0);
  EXPECT_GT(asked.kernels, 0);
}

// Batches that grow and shrink, sequences that get blocks, prompts in between.
std::vector<SampledRow> Script(Decoder& decoder) {
  std::vector<SampledRow> all;
  const auto step = [&](const std::vector<int>& which, int rows, int top) {
    const std::vector<SampledRow> sampled = decoder.Step(which, rows, top);
    EXPECT_TRUE(decoder.status.ok()) << decoder.status;
    all.insert(all.end(), sampled.begin(), sampled.end());
  };
  step({0, 1}, 14, -1);
  for (int i = 0; i < 3; ++i) step({0, 1}, 1, -1);
  step({2, 3}, 3, -1);
  for (int i = 0; i < 2; ++i) step({0, 1, 2, 3}, 1, i);
  step({3}, 1, 2);
  step({0}, 1, 2);
  step({1, 2}, 2, 0);
  step({2, 1, 0}, 1, 0);
  return all;
}

void ExpectSame(const std::vector<SampledRow>& a, const std::vector<SampledRow>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].token, b[i].token) << i;
    EXPECT_EQ(std::memcmp(&a[i].logprob, &b[i].logprob, sizeof(float)), 0) << i;
    EXPECT_EQ(std::memcmp(a[i].top_tokens, b[i].top_tokens, sizeof(a[i].top_tokens)), 0) << i;
    EXPECT_EQ(std::memcmp(a[i].top_logprobs, b[i].top_logprobs, sizeof(a[i].top_logprobs)), 0) << i;
  }
}

TEST(CudaStep, GraphsChangeNoBit) {
  std::vector<SampledRow> expected;
  const auto run = [&](bool graphs, emulation::Refused refused) {
    Decoder decoder(Device(graphs));
    emulation::RefuseGraphs(refused);
    std::vector<SampledRow> rows;
    const emulation::Counts asked = Asked([&] { rows = Script(decoder); });
    emulation::RefuseGraphs(emulation::Refused::kNothing);
    if (expected.empty()) expected = rows;
    ExpectSame(rows, expected);
    return asked;
  };
  EXPECT_EQ(run(false, emulation::Refused::kNothing).graph_launches, 0);
  const emulation::Counts with = run(true, emulation::Refused::kNothing);
  EXPECT_EQ(with.graph_launches, 8);
  EXPECT_EQ(with.graphs, 3);  // of 2, 4 (and 3) and 1 rows
  EXPECT_GT(with.nodes_set, 0);
  // One that differs is made anew; and where there are none, kernels are launched one by one, and the driver
  // is not asked again with each step.
  EXPECT_EQ(run(true, emulation::Refused::kUpdate).graphs, 4);
  for (const auto refused : {emulation::Refused::kInstantiation, emulation::Refused::kLaunch}) {
    const emulation::Counts without = run(true, refused);
    EXPECT_EQ(without.graph_launches, 0);
    EXPECT_EQ(without.graphs_refused, 1);
  }
}

TEST(CudaStep, GraphsComeBackAfterAPause) {
  Decoder decoder(Device());
  decoder.Step({0}, 9);
  const auto steps = [&](int count) {
    return Asked([&] {
      for (int i = 0; i < count; ++i) decoder.Step({0}, 1);
    });
  };
  emulation::RefuseGraphs(emulation::Refused::kInstantiation);
  EXPECT_EQ(steps(17).graphs_refused, 2);  // the 1st and, after 15 without, the 17th
  emulation::RefuseGraphs(emulation::Refused::kNothing);
  EXPECT_EQ(steps(31).graph_launches, 0);  // the pause is twice as long
  EXPECT_EQ(steps(2).graph_launches, 2);
  ASSERT_TRUE(decoder.status.ok()) << decoder.status;
}

// Queries that are kept, fits, and principal entries that differ from head to head, in steps of all kinds.
TEST(CudaStep, CompressedHistoriesToo) {
  CompressionSettings settings;
  settings.ratio = 0.25;
  settings.bits = 8;
  settings.segment_tokens = 16;
  settings.window_tokens = 0;
  std::vector<std::vector<TokenId>> prompts = {std::vector<TokenId>(37), std::vector<TokenId>(20)};
  for (size_t p = 0; p < prompts.size(); ++p) {
    for (size_t i = 0; i < prompts[p].size(); ++i) prompts[p][i] = static_cast<TokenId>((i + 5 * p) * i % 61);
  }
  std::unique_ptr<Backend> device = Device();
  Backend* const backend = device.get();
  PlannedRunner with(std::move(device), kModel, KvFormat::kBF16);
  PlannedRunner without(Device(/*graphs=*/false), kModel, KvFormat::kBF16);
  ASSERT_EQ(with.model().ReserveFits(*with.Plan(settings)), absl::OkStatus());
  const size_t free = backend->FreeMemoryBytes();
  const auto expected = without.Logits(prompts, without.Plan(settings), 16);
  EXPECT_FALSE(without.fits.empty());
  const auto same = [&](const std::vector<std::vector<float>>& actual) {
    for (size_t i = 0; i < prompts.size(); ++i) {
      ASSERT_EQ(actual[i].size(), expected[i].size());
      EXPECT_EQ(std::memcmp(actual[i].data(), expected[i].data(), actual[i].size() * sizeof(float)), 0);
    }
  };
  std::vector<std::vector<float>> decoded;
  const emulation::Counts asked = Asked([&] { decoded = with.Logits(prompts, with.Plan(settings), 1); });
  same(decoded);
  EXPECT_EQ(asked.graph_launches, 37);
  EXPECT_EQ(asked.kernels, 0);
  EXPECT_EQ(asked.copies_to_device, 37);
  EXPECT_EQ(with.fits.size(), without.fits.size());
  for (const PrincipalFitReport& fit : with.fits) EXPECT_TRUE(fit.fitted);
  EXPECT_EQ(backend->FreeMemoryBytes(), free);
}

// Weights of a byte: the same bits decoded and in one go, and close to the reference's.
TEST(CudaStep, Q8WeightsStayQ8) {
  PlannedRunner actual(Device(), kModel, KvFormat::kF32, DType::kQ8_0),
      as_stored(Device(), kModel, KvFormat::kF32);
  PlannedRunner reference(kModel, KvFormat::kF32, "reference", /*exact_blocks=*/false, DType::kQ8_0);
  EXPECT_EQ(actual.model().weight_dtype(), DType::kQ8_0);
  EXPECT_LT(actual.model().weight_bytes(), as_stored.model().weight_bytes() * 2 / 3);
  std::vector<TokenId> prompt(20);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<TokenId>(i * i % 61);
  const std::vector<float> whole = actual.Logits({prompt}, nullptr, 20)[0];
  const std::vector<float> decoded = actual.Logits({prompt}, nullptr, 1)[0];
  const std::vector<float> expected = reference.Logits({prompt}, nullptr, 20)[0];
  ASSERT_EQ(whole.size(), expected.size());
  EXPECT_EQ(std::memcmp(whole.data(), decoded.data(), whole.size() * sizeof(float)), 0);
  double worst = 0, largest = 0;
  for (size_t i = 0; i < whole.size(); ++i) {
    worst = std::max<double>(worst, std::abs(whole[i] - expected[i]));
    largest = std::max<double>(largest, std::abs(expected[i]));
  }
  EXPECT_GT(largest, 0.1);
  // As in model_test, of activations; and weights are rounded in the same way.
  EXPECT_LE(worst, 2 * 24 * 0x1p-9 * largest);
}

// Steps as large as the limits allow find their memory there.
TEST(CudaStep, NoStepTakesMemory) {
  for (const bool graphs : {true, false}) {
    Decoder decoder(Device(graphs));
    const size_t free = decoder.backend().FreeMemoryBytes();
    decoder.Step({0}, 64);
    for (int i = 0; i < 2; ++i) decoder.Step({0, 1, 2, 3, 4, 5}, 1, 1);
    EXPECT_TRUE(decoder.status.ok()) << decoder.status;
    EXPECT_EQ(decoder.backend().FreeMemoryBytes(), free);
  }
}

TEST(CudaStep, AModelWhoseScratchDoesNotFitIsNotLoaded) {
  std::unique_ptr<Backend> backend = Device();
  const size_t all = backend->FreeMemoryBytes();
  emulation::SetDeviceBytes(48 << 20);  // weights and activations are a few of these
  const absl::Status status = LlamaModel::Load(kModel, backend.get(), ModelLimits(), nullptr).status();
  emulation::SetDeviceBytes(all);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("scratch of steps of 512 rows, 64 of them with logits: cannot allocate"),
                    HasSubstr("67108864 bytes on emulated"), HasSubstr("bytes are free"),
                    HasSubstr("lower the tokens or the sequences per step")));
}

TEST(CudaStep, ACacheWhoseTablesDoNotFitIsRefused) {
  const std::unique_ptr<Backend> backend = Device();
  const size_t all = backend->FreeMemoryBytes();
  KvCache::Shape shape;
  shape.layers = shape.kv_heads = 8;
  shape.head_dim = 16;
  constexpr size_t kPool = 64 << 20;
  emulation::SetDeviceBytes(kPool + (1 << 20));
  const absl::Status status = KvCache::Create(backend.get(), shape, kPool).status();
  emulation::SetDeviceBytes(all);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("block tables of the kv cache: cannot allocate"), HasSubstr("bytes are free"),
                    HasSubstr("lower kv_cache.memory_bytes")));
}

}  // namespace
}  // namespace atp
