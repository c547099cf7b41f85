// A row's result is the same to the last bit alone, in a batch, in other chunks, and on any number of
// threads: what makes a request's tokens independent of its neighbours.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kernels/op_problems.h"
#include "tests/kernels/test_backends.h"

namespace atp {
namespace {

bool SameBits(const float* a, const float* b, size_t count) {
  return std::memcmp(a, b, count * sizeof(float)) == 0;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && SameBits(a.data(), b.data(), a.size());
}

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16,  DType::kQ8_0, DType::kQ4_0,
                             DType::kQ4,  DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

class BatchInvariance : public ::testing::TestWithParam<std::string> {
 protected:
  BatchInvariance()
      : random_(TestSeed()),
        one_(TestBackend(GetParam(), 1, &missing_, DType::kBF16)),
        three_(TestBackend(GetParam(), 3, &missing_, DType::kBF16)) {}

  void SetUp() override {
    if (one_ == nullptr) GTEST_SKIP() << missing_;
  }

  Random random_;
  std::string missing_;
  std::unique_ptr<Backend> one_;
  std::unique_ptr<Backend> three_;
};

TEST_P(BatchInvariance, MatMul) {
  struct Shape {
    int64_t rows, in, out;
  };
  // On a GPU: shapes that meet every kernel of a product, and are small enough for the emulation.
  const std::vector<Shape> shapes =
      IsCuda(GetParam()) ? std::vector<Shape>{{37, 172, 50}, {70, 1160, 17}, {260, 64, 33}}
                         : std::vector<Shape>{{37, 172, 130}, {19, 2077, 53}, {210, 64, 301}, {241, 928, 33}};
  for (const DType dtype : kDTypes) {
    for (Shape shape : shapes) {
      const int block = BlockOf(dtype).elements;
      shape.in = (shape.in + block - 1) / block * block;
      const Matrix matrix = RandomMatrix(random_, dtype, shape.out, shape.in);
      const Weight weight = Loaded(*one_, matrix);
      const std::vector<float> x = Normals(random_, shape.rows * shape.in);
      const std::vector<float> bias = Normals(random_, shape.out);
      const std::vector<float> before = Normals(random_, shape.rows * shape.out);
      for (const bool accumulate : {false, true}) {
        const auto run = [&](Backend& backend, int64_t first, int64_t rows) {
          std::vector<float> y(before.begin() + first * shape.out,
                               before.begin() + (first + rows) * shape.out);
          backend.MatMul({x.data() + first * shape.in, weight.view, bias.data(), y.data(), rows, accumulate});
          return y;
        };
        const std::vector<float> whole = run(*three_, 0, shape.rows);
        EXPECT_TRUE(SameBits(run(*one_, 0, shape.rows), whole)) << "threads";
        for (int64_t row = 0; row < shape.rows; row += IsCuda(GetParam()) ? 7 : 1) {
          ASSERT_TRUE(SameBits(run(*one_, row, 1).data(), whole.data() + row * shape.out, shape.out)) << row;
        }
        for (int64_t row = 0; row < shape.rows;) {
          const int64_t rows = std::min<int64_t>(UniformInt(random_, 1, 14), shape.rows - row);
          const std::vector<float> y = run(*three_, row, rows);
          ASSERT_TRUE(SameBits(y.data(), whole.data() + row * shape.out, y.size())) << row << "+" << rows;
          row += rows;
        }
      }
    }
  }
}

TEST_P(BatchInvariance, MatMulWithActivationsInBf16) {
  const std::unique_ptr<Backend> backend = TestBackend(GetParam(), 3, &missing_, DType::kBF16);
  for (const int64_t in : {96, 832, 91}) {
    const int64_t rows = 70, out = 53;
    const Weight weight = Loaded(*backend, RandomMatrix(random_, DType::kBF16, out, in));
    const std::vector<float> x = Normals(random_, rows * in), bias = Normals(random_, out);
    const auto run = [&](int64_t first, int64_t count) {
      std::vector<float> y(static_cast<size_t>(count * out), 1.0f);
      backend->MatMul(
          {x.data() + first * in, weight.view, bias.data(), y.data(), count, /*accumulate=*/true});
      return y;
    };
    const std::vector<float> whole = run(0, rows);
    for (int64_t row = 0, count = 1; row + count <= rows; row += count, count = count % 5 + 1) {
      const std::vector<float> y = run(row, count);
      ASSERT_TRUE(SameBits(y.data(), whole.data() + row * out, y.size())) << row << "+" << count;
    }
  }
}

// Rows so long that many of them exceed a core's second-level cache: a few go another way, to the same bits.
TEST_P(BatchInvariance, MatMulOfLongRowsInBf16) {
  if (IsCuda(GetParam())) GTEST_SKIP() << "the CPU's caches are meant";
  const int64_t rows = 320, in = 3488, out = 650;
  const Weight weight = Loaded(*one_, RandomMatrix(random_, DType::kBF16, out, in));
  const std::vector<float> x = Normals(random_, rows * in);
  const auto run = [&](int64_t first, int64_t count) {
    std::vector<float> y = Poison(count * out);
    one_->MatMul({x.data() + first * in, weight.view, nullptr, y.data(), count, /*accumulate=*/false});
    return y;
  };
  const std::vector<float> whole = run(0, rows);
  for (const auto& [first, count] : std::vector<std::pair<int64_t, int64_t>>{{0, 16}, {200, 33}, {319, 1}}) {
    const std::vector<float> y = run(first, count);
    EXPECT_TRUE(SameBits(y.data(), whole.data() + first * out, y.size())) << first << "+" << count;
  }
}

// Products of the same rows in one op, of what another op makes or not, give what they give one by one, also
// where the next needs the rows in another form.
TEST_P(BatchInvariance, SeveralMatMulsOfTheSameRows) {
  const int64_t in = 256, outs[] = {40, 7, 65};
  const std::vector<float> scales = Normals(random_, in), bias = Normals(random_, outs[2]);
  for (const DType dtype : kDTypes) {
    const Weight weights[] = {Loaded(*three_, RandomMatrix(random_, DType::kQ8_0, outs[0], in)),
                              Loaded(*three_, RandomMatrix(random_, dtype, outs[1], in)),
                              Loaded(*three_, RandomMatrix(random_, dtype, outs[2], in))};
    for (const int64_t rows :
         IsCuda(GetParam()) ? std::vector<int64_t>{9, 20, 40} : std::vector<int64_t>{1, 9, 300}) {
      const std::vector<float> gate = Normals(random_, rows * in), up = Normals(random_, rows * in);
      const std::vector<float> before = Normals(random_, rows * outs[2]);
      enum class Maker { kNone, kNorm, kSwiGlu };
      for (const Maker maker : {Maker::kNone, Maker::kNorm, Maker::kSwiGlu}) {
        const auto run = [&](bool together) {
          std::vector<float> x = gate, y(rows * (outs[0] + outs[1]));
          y.insert(y.end(), before.begin(), before.end());
          float* const first = y.data();
          float* const second = first + rows * outs[0];
          const MatMulArgs products[] = {
              {x.data(), weights[0].view, nullptr, first, rows},
              {x.data(), weights[1].view, nullptr, second, rows},
              {x.data(), weights[2].view, bias.data(), second + rows * outs[1], rows, /*accumulate=*/true}};
          const RmsNormArgs norm{x.data(), scales.data(), x.data(), rows, in, 1e-5f};
          const SwiGluArgs swiglu{x.data(), up.data(), x.data(), rows, in};
          if (!together) {
            if (maker == Maker::kNorm) three_->RmsNorm(norm);
            if (maker == Maker::kSwiGlu) three_->SwiGlu(swiglu);
            for (const MatMulArgs& product : products) three_->MatMul(product);
          } else if (maker == Maker::kNone) {
            three_->MatMuls(products);
          } else {
            maker == Maker::kNorm ? three_->RmsNormAndMatMuls(norm, products)
                                  : three_->SwiGluAndMatMuls(swiglu, products);
          }
          return y;
        };
        EXPECT_TRUE(SameBits(run(true), run(false)))
            << Name(dtype) << " rows " << rows << " maker " << static_cast<int>(maker);
      }
    }
  }
}

TEST_P(BatchInvariance, RowwiseOps) {
  const int heads = 3, head_dim = 38;
  const int64_t rows = 200, dim = heads * head_dim;
  const std::vector<float> x = Normals(random_, rows * dim);
  const std::vector<float> other = Normals(random_, rows * dim);
  const std::vector<float> frequency = Normals(random_, head_dim / 2);
  std::vector<int32_t> positions(rows);
  for (int32_t& position : positions) position = UniformInt(random_, 0, 5000);
  const auto run = [&](Backend& backend, int64_t first, int64_t count) {
    std::vector<float> y = Poison(3 * count * dim);
    float* normalized = y.data();
    float* activated = normalized + count * dim;
    float* rotated = activated + count * dim;
    backend.RmsNorm({x.data() + first * dim, other.data(), normalized, count, dim, 1e-6f});
    backend.SwiGlu({x.data() + first * dim, other.data() + first * dim, activated, count, dim});
    std::copy_n(x.data() + first * dim, count * dim, rotated);
    backend.Rope(
        {rotated, {positions.data() + first, static_cast<size_t>(count)}, frequency.data(), heads, head_dim});
    return y;
  };
  const std::vector<float> whole = run(*three_, 0, rows);
  EXPECT_TRUE(SameBits(run(*one_, 0, rows), whole)) << "threads";
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<float> alone = run(*one_, row, 1);
    for (int op = 0; op < 3; ++op) {
      ASSERT_TRUE(SameBits(alone.data() + op * dim, whole.data() + (op * rows + row) * dim, dim))
          << row << " " << op;
    }
  }
}

struct AttentionRun {
  CacheProblem& problem;
  const std::vector<float>& query;
  int heads;

  size_t RowFloats() const { return static_cast<size_t>(heads) * problem.shape().head_dim; }

  // Rows [begin, end) of sequence `index` as a step of their own.
  std::vector<float> Rows(Backend& backend, int index, int begin, int end) const {
    const KvSequence& whole = problem.sequences()[index];
    KvSequence part = whole;
    part.first_row = 0;
    part.rows = end - begin;
    part.exact_entries = whole.exact_entries - whole.rows + end;
    return Run(backend, query.data() + static_cast<size_t>(whole.first_row + begin) * RowFloats(), {&part, 1},
               part.rows);
  }

  std::vector<float> All(Backend& backend) const {
    return Run(backend, query.data(), problem.sequences(), problem.rows());
  }

 private:
  std::vector<float> Run(Backend& backend, const float* from, std::span<const KvSequence> sequences,
                         int rows) const {
    std::vector<float> out = Poison(rows * RowFloats());
    backend.Attention({from, out.data(), sequences, problem.pool(), heads, problem.shape().kv_heads, 0.2f});
    return out;
  }
};

TEST_P(BatchInvariance, Attention) {
  for (const KvFormat format : kKvFormats) {
    for (const int head_dim : IsCuda(GetParam()) ? std::vector<int>{48} : std::vector<int>{20, 64}) {
      for (const int group : {1, 3, 8}) {
        CacheProblem problem(random_, {format, head_dim, 2, 16, 32},
                             {{1, 70, 0}, {61, 61, 0}, {45, 90, 50}, {1, 1, 9}}, true);
        const int heads = 2 * group;
        const std::vector<float> query =
            Normals(random_, static_cast<size_t>(problem.rows()) * heads * head_dim);
        const AttentionRun run{problem, query, heads};
        const std::vector<float> whole = run.All(*three_);
        EXPECT_TRUE(SameBits(run.All(*one_), whole)) << "threads";
        for (int s = 0; s < 4; ++s) {
          const KvSequence& sequence = problem.sequences()[s];
          const float* expected = whole.data() + sequence.first_row * run.RowFloats();
          // Token by token, as if decoded.
          for (int row = 0; row < sequence.rows; row += IsCuda(GetParam()) ? 11 : 1) {
            const std::vector<float> alone = run.Rows(*one_, s, row, row + 1);
            ASSERT_TRUE(SameBits(alone.data(), expected + row * run.RowFloats(), alone.size()))
                << s << " " << row;
          }
          for (int row = 0; row < sequence.rows;) {  // in chunks
            const int end = std::min(sequence.rows, row + UniformInt(random_, 1, 30));
            const std::vector<float> chunk = run.Rows(*three_, s, row, end);
            ASSERT_TRUE(SameBits(chunk.data(), expected + row * run.RowFloats(), chunk.size()))
                << s << " " << row;
            row = end;
          }
        }
      }
    }
  }
}

// Cut into chunks for three threads, or not cut because others keep them busy.
TEST_P(BatchInvariance, AttentionOfALongSequence) {
  for (const KvFormat format : {KvFormat::kBF16, KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4}) {
    std::vector<SequenceShape> shapes = {{1, 1700, 600}, {2, 530, 0}};
    shapes.resize(20, {1, 5, 0});
    CacheProblem problem(random_, {format, 32, 1, 32, 32}, shapes, true);
    const std::vector<float> query = Normals(random_, static_cast<size_t>(problem.rows()) * 4 * 32);
    const AttentionRun run{problem, query, 4};
    const std::vector<float> whole = run.All(*three_);
    for (int s = 0; s < 2; ++s) {
      const KvSequence& sequence = problem.sequences()[s];
      const float* expected = whole.data() + sequence.first_row * run.RowFloats();
      for (Backend* backend : {one_.get(), three_.get()}) {
        const std::vector<float> alone = run.Rows(*backend, s, 0, sequence.rows);
        EXPECT_TRUE(SameBits(alone.data(), expected, alone.size())) << Name(format) << " " << s;
      }
    }
  }
}

TEST_P(BatchInvariance, MatMulOfAnotherSequencesNanStaysThere) {
  for (const DType dtype : kDTypes) {
    const int64_t in = 256;
    const Matrix matrix = RandomMatrix(random_, dtype, 29, in);
    const Weight weight = Loaded(*three_, matrix);
    std::vector<float> x = Normals(random_, 12 * in);
    std::vector<float> clean = Poison(12 * 29);
    three_->MatMul({x.data(), weight.view, nullptr, clean.data(), 12, false});
    std::fill_n(x.begin() + 5 * in, in, std::nanf(""));
    std::vector<float> dirty = Poison(12 * 29);
    three_->MatMul({x.data(), weight.view, nullptr, dirty.data(), 12, false});
    for (int row = 0; row < 12; ++row) {
      EXPECT_EQ(SameBits(&clean[row * 29], &dirty[row * 29], 29), row != 5) << row;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EveryBackend, BatchInvariance, ::testing::ValuesIn(TestBackendNames()),
                         [](const auto& name) { return name.param; });

}  // namespace
}  // namespace atp
