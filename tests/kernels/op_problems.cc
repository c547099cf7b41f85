#include "tests/kernels/op_problems.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "kernels/backend_factory.h"
#include "kernels/dtype.h"
#include "kernels/quantized.h"

namespace atp {

namespace {

// Says at the end of a test that failed with which seed it fails again.
class SeedPrinter : public testing::EmptyTestEventListener {
 public:
  void Add(uint64_t seed) { seeds_ += " ATP_TEST_SEED=" + std::to_string(seed); }
  void OnTestEnd(const testing::TestInfo& test) override {
    if (test.result()->Failed())
      std::printf("%s.%s:%s\n", test.test_suite_name(), test.name(), seeds_.c_str());
    seeds_.clear();
  }

 private:
  std::string seeds_;
};

}  // namespace

uint64_t TestSeed() {
  static SeedPrinter* const printer = [] {
    auto owned = new SeedPrinter;
    testing::UnitTest::GetInstance()->listeners().Append(owned);
    return owned;
  }();
  const char* fixed = std::getenv("ATP_TEST_SEED");
  const uint64_t seed = fixed != nullptr ? std::strtoull(fixed, nullptr, 10) : std::random_device()();
  printer->Add(seed);
  return seed;
}

int UniformInt(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

std::vector<float> Normals(Random& random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<float> Poison(size_t count) { return std::vector<float>(count, std::nanf("")); }

std::vector<float> Matrix::Values() const {
  std::vector<float> values(static_cast<size_t>(view.rows * view.cols));
  DequantizeRow(view.dtype, bytes.data(), view.rows * view.cols, values.data());
  return values;
}

Matrix RandomMatrix(Random& random, DType dtype, int64_t rows, int64_t cols) {
  Matrix matrix;
  matrix.bytes.resize(RowBytes(dtype, rows * cols));
  matrix.view = {matrix.bytes.data(), dtype, rows, cols};
  if (IsQuantized(dtype)) {
    // Any bytes are a block, if its fp16 numbers are sane ones: d, and dmin of q4_k and q5_k.
    for (std::byte& byte : matrix.bytes) byte = static_cast<std::byte>(random());
    const auto size = static_cast<size_t>(BlockOf(dtype).bytes);
    for (size_t at = 0; at < matrix.bytes.size(); at += size) {
      const bool five_or_four = dtype == DType::kQ4_K || dtype == DType::kQ5_K;
      for (const size_t offset : {dtype == DType::kQ6_K ? size_t{208} : size_t{0}, size_t{2}}) {
        if (offset == 2 && !five_or_four) continue;
        const uint16_t bits = FloatToF16(std::normal_distribution<float>()(random) * 0.01f);
        std::memcpy(matrix.bytes.data() + at + offset, &bits, sizeof(bits));
      }
    }
    return matrix;
  }
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < rows * cols; ++i) {
    const float value = normal(random);
    // Sign and mantissa at random, exponent such that |value| < 4: subnormals included.
    const auto half = static_cast<uint16_t>((random() & 0x83ffu) |
                                            (static_cast<uint32_t>(UniformInt(random, 0, 16)) << 10));
    const uint16_t bits = dtype == DType::kBF16 ? FloatToBF16(value) : half;
    std::byte* at = matrix.bytes.data() + RowBytes(dtype, i);
    if (dtype == DType::kF32) {
      std::memcpy(at, &value, sizeof(value));
    } else {
      std::memcpy(at, &bits, sizeof(bits));
    }
  }
  return matrix;
}

std::vector<float> IntegerRows(Random& random, int64_t rows, int64_t cols) {
  std::vector<float> values(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t first = 0; first < cols; first += kRowGroup) {
      float* const group = values.data() + r * cols + first;
      const int64_t count = std::min<int64_t>(kRowGroup, cols - first);
      const float scale = std::ldexp(1.0f, UniformInt(random, -9, -5));
      for (int64_t i = 0; i < count; ++i) {
        group[i] = scale * static_cast<float>(UniformInt(random, -127, 127));
      }
      group[UniformInt(random, 0, static_cast<int>(count) - 1)] =
          UniformInt(random, 0, 1) == 0 ? scale * 127 : scale * -127;
    }
  }
  return values;
}

Weight Loaded(Backend& backend, const Matrix& matrix) {
  absl::StatusOr<Weight> weight = backend.LoadWeight(matrix.view, matrix.view.dtype);
  if (!weight.ok()) std::abort();
  return *std::move(weight);
}

std::unique_ptr<Backend> CpuBackend(const std::string& isa, int threads, DType activation_dtype) {
  BackendOptions options;
  options.threads = threads;
  options.cpu_isa = isa;
  options.activation_dtype = activation_dtype;
  return *MakeBackend(options);
}

CacheProblem::CacheProblem(Random& random, const CacheShape& shape,
                           const std::vector<SequenceShape>& sequences, bool with_step)
    : shape_(shape),
      exact_(shape.format, shape.entries, shape.head_dim, false),
      block_bytes_(exact_.bytes()) {
  for (const KvFormat format : {shape.format, KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4}) {
    principal_.emplace_back(format, shape.principal_entries_per_block, shape.head_dim, true);
    block_bytes_ = std::max(block_bytes_, principal_.back().bytes());
  }
  int blocks = 1;
  for (const SequenceShape& sequence : sequences) {
    blocks += shape.kv_heads * (sequence.exact_entries / shape.entries + 1 +
                                sequence.max_principal / shape.principal_entries_per_block + 1);
  }
  pool_.assign(static_cast<size_t>(blocks) * block_bytes_, std::byte{0xff});  // NaN in fp32 and in bf16
  for (int id = 0; id < blocks; ++id) free_.push_back(id);
  std::shuffle(free_.begin(), free_.end(), random);
  heads_.reserve(sequences.size());
  for (const SequenceShape& sequence : sequences) {
    std::vector<KvHeadBlocks>& heads = heads_.emplace_back(shape.kv_heads);
    for (KvHeadBlocks& head : heads) {
      FillPrincipal(random, head, UniformInt(random, 0, sequence.max_principal));
      FillExact(random, head, sequence, with_step);
    }
    sequences_.push_back({rows_, sequence.rows, sequence.exact_entries, heads.data()});
    rows_ += sequence.rows;
  }
}

BlockId CacheProblem::TakeBlock() {
  const BlockId id = free_.back();
  free_.pop_back();
  return id;
}

void CacheProblem::FillPrincipal(Random& random, KvHeadBlocks& head, int count) {
  auto& table = *tables_.emplace_back(std::make_unique<std::vector<BlockId>>());
  const int per_block = shape_.principal_entries_per_block;
  const KvPage& page =
      principal_[static_cast<size_t>(UniformInt(random, 0, static_cast<int>(principal_.size()) - 1))];
  for (int i = 0; i < count; ++i) {
    if (i % per_block == 0) table.push_back(TakeBlock());
    std::byte* block = pool_.data() + static_cast<size_t>(table.back()) * block_bytes_;
    const bool padding = UniformInt(random, 0, 4) == 0;
    const std::vector<float> key = padding ? Poison(shape_.head_dim) : Normals(random, shape_.head_dim);
    const std::vector<float> value = padding ? Poison(shape_.head_dim) : Normals(random, shape_.head_dim);
    const float log_mass = padding ? -std::numeric_limits<float>::infinity()
                                   : std::log(static_cast<float>(UniformInt(random, 1, 100)));
    page.Store(block, i % per_block, key.data(), value.data(), log_mass);
  }
  head.principal = table.data();
  head.principal_entries = count;
  head.principal_page = &page;
}

void CacheProblem::FillExact(Random& random, KvHeadBlocks& head, const SequenceShape& sequence,
                             bool with_step) {
  auto& table = *tables_.emplace_back(std::make_unique<std::vector<BlockId>>());
  const int written = with_step ? sequence.exact_entries : sequence.exact_entries - sequence.rows;
  for (int i = 0; i < sequence.exact_entries; ++i) {
    if (i % shape_.entries == 0) table.push_back(TakeBlock());
    if (i >= written) continue;
    std::byte* block = pool_.data() + static_cast<size_t>(table.back()) * block_bytes_;
    const std::vector<float> key = Normals(random, shape_.head_dim);
    const std::vector<float> value = Normals(random, shape_.head_dim);
    exact_.Store(block, i % shape_.entries, key.data(), value.data());
  }
  head.exact = table.data();
}

void CacheProblem::ForEachEntry(
    const KvSequence& sequence, int kv_head,
    const std::function<void(const KvPage&, const float*, const float*, float)>& visit) const {
  std::vector<float> key(static_cast<size_t>(shape_.head_dim)), value(key.size());
  const auto walk = [&](const KvPage& page, const BlockId* blocks, int count) {
    for (int e = 0; e < count; ++e) {
      float log_mass;
      page.Load(pool_.data() + static_cast<size_t>(blocks[e / page.entries()]) * block_bytes_,
                e % page.entries(), key.data(), value.data(), &log_mass);
      if (!std::isinf(log_mass)) visit(page, key.data(), value.data(), log_mass);
    }
  };
  const KvHeadBlocks& head = sequence.heads[kv_head];
  walk(*head.principal_page, head.principal, head.principal_entries);
  walk(exact_, head.exact, sequence.exact_entries);
}

}  // namespace atp
