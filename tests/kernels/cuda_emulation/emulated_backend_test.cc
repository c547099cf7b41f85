// What the cuda backend says and does beside its ops: memory, and errors that name op and shapes.
#include "tests/kernels/cuda_emulation/emulated_backend.h"

#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/quantized.h"
#include "tests/kernels/cuda_emulation/runtime_api.h"
#include "tests/kernels/op_problems.h"

namespace atp {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(EmulatedBackend, MemoryIsZeroedAndAligned) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{4097}}) {
    const absl::StatusOr<Buffer> buffer = backend->Allocate(bytes);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
    std::vector<std::byte> host(bytes, std::byte{1});
    backend->CopyToHost(host.data(), buffer->data(), bytes);
    EXPECT_EQ(host, std::vector<std::byte>(bytes));
  }
  EXPECT_GT(backend->FreeMemoryBytes(), 0u);
}

TEST(EmulatedBackend, TooMuchMemoryNamesBytesAndWhatToDo) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  const absl::Status status = backend->Allocate(size_t{1} << 60).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(
      std::string(status.message()),
      AllOf(HasSubstr(std::to_string(size_t{1} << 60)), HasSubstr("bytes are free"),
            HasSubstr(std::to_string(backend->FreeMemoryBytes())), HasSubstr("kv_cache.memory_bytes")));
  EXPECT_TRUE(backend->Synchronize().ok());
}

// A device that weights have filled: what is free is what they left, and comes back with them.
TEST(EmulatedBackend, MemoryThatIsTakenIsNotFree) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  const size_t all = backend->FreeMemoryBytes();
  constexpr size_t kWeights = 6 << 20, kLeft = 1 << 20;
  emulation::SetDeviceBytes(kWeights + kLeft);
  absl::StatusOr<Buffer> weights = backend->Allocate(kWeights);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(backend->FreeMemoryBytes(), kLeft);
  const absl::Status status = backend->Allocate(2 * kLeft).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("cannot allocate 2097152 bytes"),
                                                   HasSubstr("1048576 of 7340032 bytes are free"),
                                                   HasSubstr("--set kv_cache.memory_bytes=")));
  const std::vector<float> host(kLeft / 2);
  EXPECT_EQ(backend->LoadWeight({host.data(), DType::kF32, 1, static_cast<int64_t>(host.size())}, DType::kF32)
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted);
  *weights = Buffer();
  EXPECT_TRUE(backend->Allocate(2 * kLeft).ok());
  EXPECT_TRUE(backend->Synchronize().ok());
  emulation::SetDeviceBytes(all);
}

TEST(EmulatedBackend, WeightsOfManyPiecesArriveWhole) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  std::vector<float> values(5'000'001);  // three of the uploader's buffers
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const absl::StatusOr<Weight> weight =
      backend->LoadWeight({values.data(), DType::kF32, 1, static_cast<int64_t>(values.size())}, DType::kF32);
  ASSERT_TRUE(weight.ok()) << weight.status();
  std::vector<float> back(values.size());
  backend->CopyToHost(back.data(), weight->view.data, weight->view.bytes());
  EXPECT_TRUE(back == values);
}

TEST(EmulatedBackend, QuantizedWeightsBecomeBf16) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  Random random(TestSeed());
  for (const DType dtype : {DType::kQ4_0, DType::kQ4_K, DType::kF32}) {
    // More than one of the uploader's buffers, and its last run is not a whole one.
    const Matrix matrix = RandomMatrix(random, dtype, 4099, 1280);
    const DType kept = IsQuantized(dtype) ? dtype : DType::kQ4;  // as the file has it, or as it was asked for
    const absl::StatusOr<Weight> weight = backend->LoadWeight(matrix.view, kept);
    ASSERT_TRUE(weight.ok()) << weight.status();
    ASSERT_EQ(weight->view.dtype, DType::kBF16);
    std::vector<uint16_t> back(weight->view.bytes() / sizeof(uint16_t)), expected(back.size());
    backend->CopyToHost(back.data(), weight->view.data, weight->view.bytes());
    const std::vector<float> values = matrix.Values();
    for (size_t i = 0; i < values.size(); ++i) expected[i] = FloatToBF16(values[i]);
    EXPECT_TRUE(back == expected) << Name(dtype);
  }
}

// All int8 and then all scales, as the file has them or as rows of another type are quantised.
TEST(EmulatedBackend, Q8WeightsAreKeptInPlanes) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  Random random(TestSeed());
  for (const DType dtype : {DType::kQ8_0, DType::kF32}) {
    const Matrix matrix = RandomMatrix(random, dtype, 7001, 1248);  // more than one of the uploader's buffers
    const absl::StatusOr<Weight> weight = backend->LoadWeight(matrix.view, DType::kQ8_0);
    ASSERT_TRUE(weight.ok()) << weight.status();
    ASSERT_EQ(weight->view.dtype, DType::kQ8_0);
    EXPECT_TRUE(weight->view.packed);
    std::vector<std::byte> rows(weight->view.bytes()), expected(rows.size()), back(rows.size());
    const size_t elements = 7001 * 1248;
    const std::vector<float> values = matrix.Values();
    QuantizeRow(DType::kQ8_0, values.data(), static_cast<int64_t>(elements), rows.data());
    if (dtype == DType::kQ8_0) rows = matrix.bytes;
    for (size_t b = 0; b < elements / 32; ++b) {
      std::memcpy(&expected[b * 32], &rows[b * 34 + 2], 32);
      std::memcpy(&expected[elements + b * 2], &rows[b * 34], 2);
    }
    backend->CopyToHost(back.data(), weight->view.data, back.size());
    EXPECT_TRUE(back == expected) << Name(dtype);
  }
}

TEST(EmulatedBackend, ImpossibleConversionsAreRefused) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  const std::vector<float> values(48);
  for (const DType dtype : {DType::kQ8_0, DType::kQ4_K}) {  // 48 is no whole blocks; no such conversion
    const absl::Status status = backend->LoadWeight({values.data(), DType::kF32, 1, 48}, dtype).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  }
}

TEST(EmulatedBackend, ErrorsNameOpAndShapes) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  const int head_dim = 40000;  // its angles are more than shared memory
  const Buffer x = backend->Allocate(head_dim * sizeof(float)).value();
  const std::vector<int32_t> positions = {3};
  backend->Rope({x.as<float>(), positions, x.as<float>(), 1, head_dim});
  const absl::Status status = backend->Synchronize();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("Rope of 1 rows of 1 heads of 40000"), HasSubstr("invalid argument")));
  EXPECT_TRUE(backend->Synchronize().ok());
}

// In a step that is launched as a whole: it is not, and the next one is.
TEST(EmulatedBackend, AnOpThatFailsInAStepIsNamedAndTheNextStepRuns) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  const KvPage page(KvFormat::kF32, 16, 16, /*with_log_mass=*/false);
  const Buffer pool = backend->Allocate(page.bytes()).value();
  const BlockId block = 0;
  const KvHeadBlocks head{&block};
  const KvSequence sequence{0, 1, 1, &head};
  const std::vector<int32_t> positions = {3}, indices = {1};
  const std::vector<float> rows = {1, 2, 3, 4}, zeros = {0, 0};
  const Buffer table = backend->Allocate(sizeof(float) * 4).value();
  const Buffer out = backend->Allocate(sizeof(float) * 2).value();
  backend->CopyToDevice(table.data(), rows.data(), sizeof(float) * 4);
  const auto step = [&](int head_dim) {
    const emulation::Counts before = emulation::Counted();
    backend->BeginStep({{&sequence, 1}, 1, positions, {pool.data(), page.bytes(), &page}, 1});
    backend->GatherRows({{table.data(), DType::kF32, 2, 2}, indices, out.as<float>()});
    const Buffer x = backend->Allocate(static_cast<size_t>(head_dim) * sizeof(float)).value();
    backend->Rope({x.as<float>(), positions, x.as<float>(), 1, head_dim});
    EXPECT_EQ(emulation::Counted().kernels, before.kernels);
    const absl::Status status = backend->Synchronize();
    EXPECT_EQ(emulation::Counted().graph_launches - before.graph_launches, status.ok() ? 1 : 0);
    return status;
  };
  EXPECT_THAT(std::string(step(40000).message()),
              AllOf(HasSubstr("Rope of 1 rows of 1 heads of 40000"), HasSubstr("invalid argument")));
  std::vector<float> back(2, -1.0f);
  backend->CopyToHost(back.data(), out.data(), sizeof(float) * 2);
  EXPECT_EQ(back, zeros);
  EXPECT_TRUE(step(16).ok());
  backend->CopyToHost(back.data(), out.data(), sizeof(float) * 2);
  EXPECT_EQ(back, std::vector<float>({3, 4}));
  EXPECT_TRUE(backend->Synchronize().ok());
}

TEST(EmulatedBackend, ReservedMemoryIsTakenAtOnceAndMissingMemoryIsNamed) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  const size_t all = backend->FreeMemoryBytes();
  StepLimits limits;
  limits.logit_rows = 100, limits.vocab = 1 << 20;
  constexpr size_t kScratch = size_t{100 * 12} << 20;  // 12 bytes per logit
  EXPECT_TRUE(backend->Reserve(limits).ok());
  EXPECT_LE(backend->FreeMemoryBytes(), all - kScratch);
  EXPECT_GE(backend->FreeMemoryBytes() + (8 << 20), all - kScratch);
  StepLimits more;
  more.logit_rows = 1000;  // of what was said before
  const absl::Status status = backend->Reserve(more);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("cannot allocate " + std::to_string(10 * kScratch) + " bytes on emulated"),
                    HasSubstr("bytes are free"), HasSubstr("--set kv_cache.memory_bytes=")));
}

}  // namespace
}  // namespace atp
