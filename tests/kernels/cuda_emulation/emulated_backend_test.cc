// What the cuda backend says and does beside its ops: memory, and errors that name op and shapes.
#include "tests/kernels/cuda_emulation/emulated_backend.h"

#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/staging.h"
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

// A table that outgrows what was reserved takes twice as much, or what it needs where that is all there is.
TEST(EmulatedBackend, TablesGrowIntoWhatIsLeft) {
  size_t free = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  cuda::Staging staging;
  ASSERT_EQ(staging.Reserve(4 << 20, 0), cudaSuccess);
  cudaError_t error = cudaSuccess;
  EXPECT_NE(staging.Take(4 << 20, &error).host, nullptr);
  size_t left = 0;
  ASSERT_EQ(cudaMemGetInfo(&left, &total), cudaSuccess);
  emulation::SetDeviceBytes(total - left + (3 << 20));
  EXPECT_NE(staging.Take(1 << 20, &error).host, nullptr);
  EXPECT_EQ(error, cudaSuccess);
  EXPECT_EQ(staging.Take(4 << 20, &error).host, nullptr);
  EXPECT_EQ(error, cudaErrorMemoryAllocation);
  emulation::SetDeviceBytes(total);
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

// As the file has them, or quantised from rows of another type.
TEST(EmulatedBackend, QuantizedWeightsAreKeptInPlanes) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  Random random(TestSeed());
  const struct {
    DType from, to;
  } cases[] = {{DType::kQ8_0, DType::kQ8_0}, {DType::kF32, DType::kQ8_0},  {DType::kQ4_0, DType::kQ4_0},
               {DType::kBF16, DType::kQ4},   {DType::kQ4_K, DType::kQ4_K}, {DType::kQ5_K, DType::kQ5_K},
               {DType::kQ6_K, DType::kQ6_K}};
  for (const auto& [from, to] : cases) {
    // More than one of the uploader's buffers, and its last run is not a whole one.
    const int64_t rows = 4099, cols = 1280;
    const Matrix matrix = RandomMatrix(random, from, rows, cols);
    const absl::StatusOr<Weight> weight = backend->LoadWeight(matrix.view, to);
    ASSERT_TRUE(weight.ok()) << weight.status();
    ASSERT_EQ(weight->view.dtype, to);
    EXPECT_TRUE(weight->view.packed);
    std::vector<std::byte> blocks = matrix.bytes;
    if (from != to) {
      const std::vector<float> values = matrix.Values();
      blocks.resize(RowBytes(to, rows * cols));
      QuantizeRow(to, values.data(), rows * cols, blocks.data());
    }
    std::vector<float> expected(rows * cols), actual(rows * cols);
    DequantizeRow(to, blocks.data(), rows * cols, expected.data());
    std::vector<int32_t> all(rows);
    std::iota(all.begin(), all.end(), 0);
    backend->GatherRows({weight->view, all, actual.data()});
    ASSERT_TRUE(backend->Synchronize().ok());
    EXPECT_TRUE(actual == expected) << Name(from) << " as " << Name(to);
    // 4.5 bits for 4, 8.5 for 8, and of K-quants 4.625 and 8.625: the fifth and the sixth bit cost a byte.
    const double bits = static_cast<double>(weight->memory.bytes()) * 8 / static_cast<double>(rows * cols);
    const bool four = to == DType::kQ4_0 || to == DType::kQ4 || to == DType::kQ4_K;
    EXPECT_EQ(bits, (four ? 4.5 : 8.5) + (IsKQuant(to) ? 0.125 : 0)) << Name(to);
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

// What the device reports again and again is told from a step that failed; memory that it then refuses is not
// for want of memory.
TEST(EmulatedBackend, AnErrorThatStaysIsALostDevice) {
  const std::unique_ptr<Backend> backend = cuda_emulated::MakeBackend().value();
  emulation::Break("an illegal address");
  for (int i = 0; i < 2; ++i) {
    const absl::Status status = backend->Synchronize();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("an illegal address"), HasSubstr("lost")));
  }
  StepLimits limits;
  limits.logit_rows = 1, limits.vocab = 16;
  const absl::Status reserved = backend->Reserve(limits);
  EXPECT_EQ(reserved.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(reserved.message()), HasSubstr("an illegal address"));
  emulation::ForgetError();
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
