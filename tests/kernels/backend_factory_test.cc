#include "kernels/backend_factory.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace atp {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

TEST(BackendFactory, MakesEveryBuiltDeviceAndIsa) {
  EXPECT_THAT(BuiltDevices(), AllOf(Contains("cpu"), Contains("reference")));
  for (const std::string& device : BuiltDevices()) {
    BackendOptions options;
    options.device = device;
    const auto backend = MakeBackend(options);
    if (device == "cuda" && backend.status().code() == absl::StatusCode::kUnavailable)
      continue;  // no GPU here
    ASSERT_TRUE(backend.ok()) << backend.status();
    EXPECT_THAT((*backend)->Description(), HasSubstr(device));
  }
  const std::vector<std::string> isas = CpuIsaNames();
  ASSERT_FALSE(isas.empty());
  for (const std::string& isa : isas) {
    BackendOptions options;
    options.threads = 2;
    options.cpu_isa = isa;
    const auto backend = MakeBackend(options);
    ASSERT_TRUE(backend.ok()) << backend.status();
    EXPECT_EQ((*backend)->Description(), "cpu: " + isa + ", 2 threads");
  }
}

TEST(BackendFactory, AutoIsTheBestIsa) {
  BackendOptions options;
  options.threads = 1;
  const auto backend = MakeBackend(options);
  ASSERT_TRUE(backend.ok());
  EXPECT_EQ((*backend)->Description(), "cpu: " + CpuIsaNames().front() + ", 1 thread");
}

TEST(BackendFactory, ACpuSaysAtStartWhatItsFitsLack) {
  BackendOptions options;
  options.threads = 2;
  const auto backend = MakeBackend(options);
  ASSERT_TRUE(backend.ok());
  StepLimits limits;
  limits.head_dim = 64;
  EXPECT_EQ((*backend)->Reserve(limits), absl::OkStatus());
  limits.fit_entries = 256, limits.fit_references = 512, limits.fit_count = 64;
  EXPECT_EQ((*backend)->Reserve(limits), absl::OkStatus());
  limits.fit_entries = 1 << 22, limits.fit_count = 1 << 20;  // a square of such a side is 70 TB
  const absl::Status status = (*backend)->Reserve(limits);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(status), AllOf(HasSubstr("2 threads need "), HasSubstr(" are left")));
}

TEST(BackendFactory, UnknownDeviceNamesWhatThereIs) {
  BackendOptions options;
  options.device = "tpu";
  const absl::Status status = MakeBackend(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(status), AllOf(HasSubstr("'tpu'"), HasSubstr("cpu"), HasSubstr("reference")));
}

TEST(BackendFactory, CudaIsUnimplementedWhereItWasNotBuilt) {
  if (::testing::Value(BuiltDevices(), Contains("cuda"))) GTEST_SKIP() << "this binary has CUDA";
  BackendOptions options;
  options.device = "cuda";
  const absl::Status status = MakeBackend(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(Message(status), AllOf(HasSubstr("built without CUDA"), HasSubstr("cpu")));
}

TEST(BackendFactory, CudaWithoutADeviceIsOneClearLine) {
  BackendOptions options;
  options.device = "cuda";
  const absl::Status status = MakeBackend(options).status();
  if (status.code() != absl::StatusCode::kUnavailable)
    GTEST_SKIP() << "built without CUDA, or with a GPU here";
  EXPECT_THAT(Message(status),
              AllOf(HasSubstr("no usable NVIDIA driver and GPU"), HasSubstr("--device cpu")));
  EXPECT_THAT(Message(status), ::testing::Not(HasSubstr("\n")));
}

TEST(BackendFactory, UnknownIsaNamesWhatThereIs) {
  BackendOptions options;
  options.cpu_isa = "mmx";
  const absl::Status status = MakeBackend(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(status), AllOf(HasSubstr("'mmx'"), HasSubstr(CpuIsaNames().back())));
}

TEST(BackendFactory, ThreadsOutOfRange) {
  for (const int threads : {-1, 1 << 20}) {
    BackendOptions options;
    options.threads = threads;
    const absl::Status status = MakeBackend(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Message(status), HasSubstr(std::to_string(threads)));
  }
}

class BuiltDevice : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    BackendOptions options;
    options.device = GetParam();
    options.threads = 1;
    absl::StatusOr<std::unique_ptr<Backend>> backend = MakeBackend(options);
    if (GetParam() == "cuda" && backend.status().code() == absl::StatusCode::kUnavailable) {
      GTEST_SKIP() << backend.status().message();
    }
    backend_ = *std::move(backend);
  }
  std::unique_ptr<Backend> backend_;
};

TEST_P(BuiltDevice, MemoryIsZeroedAndAligned) {
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{4097}}) {
    const auto buffer = backend_->Allocate(bytes);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    EXPECT_EQ(buffer->bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
    std::vector<std::byte> host(bytes, std::byte{1});
    backend_->CopyToHost(host.data(), buffer->data(), bytes);
    EXPECT_EQ(host, std::vector<std::byte>(bytes));
  }
}

TEST_P(BuiltDevice, TooMuchMemoryNamesTheBytes) {
  const size_t bytes = size_t{1} << 60;
  const absl::Status status = backend_->Allocate(bytes).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(status), HasSubstr(std::to_string(bytes)));
}

TEST_P(BuiltDevice, UnalignedWeightsAreLoadedRight) {
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  alignas(4) std::byte bytes[6 * sizeof(float) + 2];
  std::memcpy(bytes + 2, values.data(), 6 * sizeof(float));
  const auto weight = backend_->LoadWeight({bytes + 2, DType::kF32, 2, 3}, DType::kF32);
  ASSERT_TRUE(weight.ok()) << weight.status();
  EXPECT_EQ(weight->view.rows, 2);
  EXPECT_EQ(weight->view.cols, 3);
  std::vector<float> back(6);
  const std::vector<int32_t> both = {0, 1};
  backend_->GatherRows({weight->view, both, back.data()});
  EXPECT_EQ(back, values);
}

TEST_P(BuiltDevice, SupportsWhatTheOpsCanDo) {
  EXPECT_TRUE(backend_->Supports({DType::kBF16, KvFormat::kF32, 64, 16}));
  EXPECT_TRUE(backend_->Supports({DType::kF16, KvFormat::kBF16, 16, 32}));
  EXPECT_FALSE(backend_->Supports({DType::kF32, KvFormat::kF32, 0, 16}));
  EXPECT_FALSE(backend_->Supports({DType::kF32, KvFormat::kF32, 65, 16}));
  EXPECT_FALSE(backend_->Supports({DType::kF32, KvFormat::kF32, 64, 24}));
}

TEST_P(BuiltDevice, SynchronizeIsOk) { EXPECT_TRUE(backend_->Synchronize().ok()); }

INSTANTIATE_TEST_SUITE_P(All, BuiltDevice, ::testing::ValuesIn(BuiltDevices()));

}  // namespace
}  // namespace atp
