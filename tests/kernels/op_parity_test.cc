// The ops on activations and weights on every backend against the reference backend, over ragged shapes and
// fresh random inputs. Tolerances: op_parity.h.
#include "tests/kernels/op_parity.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace atp {
namespace {

const DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
const DType kQuantized[] = {DType::kQ8_0, DType::kQ4_0, DType::kQ4, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

TEST_P(OpParity, GatherRows) {
  for (const DType dtype : kDTypes) {
    for (const int64_t dim : {1, 7, 16, 65, 1000}) {
      for (const int rows : {0, 1, 17, 40}) {
        const Matrix table = RandomMatrix(random_, dtype, 23, dim);
        std::vector<int32_t> indices(rows);
        for (int32_t& index : indices) index = UniformInt(random_, 0, 22);
        std::vector<float> actual = Poison(rows * dim);
        std::vector<float> expected = Poison(rows * dim);
        actual_->GatherRows({table.view, indices, actual.data()});
        reference_->GatherRows({table.view, indices, expected.data()});
        EXPECT_EQ(actual, expected) << Name(dtype) << " dim " << dim << " rows " << rows;
        actual = Poison(rows * dim);
        const Weight loaded = Loaded(*actual_, table);
        actual_->GatherRows({loaded.view, indices, actual.data()});
        EXPECT_EQ(actual, expected) << "loaded " << Name(dtype) << " dim " << dim << " rows " << rows;
      }
    }
  }
}

// A matrix as the backend keeps it, and the same values for the reference.
struct BothWeights {
  BothWeights(Backend& backend, Backend& reference, const Matrix& matrix)
      : actual(Loaded(backend, matrix)),
        expected(reference.LoadWeight(matrix.view, actual.view.dtype).value()) {}
  Weight actual, expected;
};

TEST_P(OpParity, GatherRowsOfQuantizedWeights) {
  for (const DType dtype : kQuantized) {
    const int64_t dim = 768;
    const Matrix table = RandomMatrix(random_, dtype, 23, dim);
    const BothWeights loaded(*actual_, *reference_, table);
    EXPECT_EQ(loaded.actual.view.dtype, dtype);
    std::vector<int32_t> indices(40);
    for (int32_t& index : indices) index = UniformInt(random_, 0, 22);
    std::vector<float> actual = Poison(indices.size() * dim), expected = Poison(indices.size() * dim);
    actual_->GatherRows({loaded.actual.view, indices, actual.data()});
    reference_->GatherRows({loaded.expected.view, indices, expected.data()});
    EXPECT_EQ(actual, expected) << Name(dtype);
  }
}

// Quantised weights meet x in int8: rows that int8 holds exactly must come out as exact as sums of fp32 do.
// The same for bf16 under activation_dtype bf16, and on tensor cores; there, x_unit is what rounding x costs,
// or rounding quantised weights.
void CheckMatMul(Random& random, Backend& backend, Backend& reference, DType dtype, DType x_dtype,
                 int64_t rows, int64_t in, int64_t out, double x_unit = 0) {
  const Matrix weight = RandomMatrix(random, dtype, out, in);
  const BothWeights loaded(backend, reference, weight);
  const std::vector<float> values = weight.Values();
  std::vector<float> x = IsQuantized(dtype) ? IntegerRows(random, rows, in) : Normals(random, rows * in);
  if (x_dtype == DType::kBF16) {
    for (float& value : x) value = BF16ToFloat(FloatToBF16(value));
  }
  const std::vector<float> bias = Normals(random, out);
  const std::vector<float> before = Normals(random, rows * out);
  for (const bool with_bias : {false, true}) {
    for (const bool accumulate : {false, true}) {
      std::vector<float> actual = accumulate ? before : Poison(rows * out);
      std::vector<float> expected = actual;
      MatMulArgs args{x.data(), loaded.actual.view, with_bias ? bias.data() : nullptr, actual.data(),
                      rows,     accumulate};
      backend.MatMul(args);
      args.weight = loaded.expected.view;
      args.y = expected.data();
      reference.MatMul(args);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t o = 0; o < out; ++o) {
          double norm =
              (with_bias ? std::abs(bias[o]) : 0.0) + (accumulate ? std::abs(before[r * out + o]) : 0.0);
          for (int64_t k = 0; k < in; ++k) {
            // q4_k and q5_k weights are differences: of what, a block's largest weight bounds.
            double size = std::abs(values[o * in + k]);
            if (dtype == DType::kQ4_K || dtype == DType::kQ5_K) {
              const float* block = &values[o * in + k / 32 * 32];
              for (int i = 0; i < 32; ++i) size = std::max<double>(size, 4 * std::abs(block[i]));
            }
            norm += std::abs(x[r * in + k]) * size;
          }
          // in products, bias, residual, and the reference's rounding; and x as it is multiplied.
          const double tolerance = ((static_cast<double>(in) + 3) * kUnit + x_unit) * norm;
          ExpectNear(actual[r * out + o], expected[r * out + o], tolerance,
                     std::string(Name(dtype)) + " rows " + std::to_string(rows) + " in " +
                         std::to_string(in) + " out " + std::to_string(out) + " at " + std::to_string(r) +
                         "," + std::to_string(o));
          if (::testing::Test::HasFailure()) return;
        }
      }
    }
  }
}

// The emulation is some thousand times slower than a CPU: there, the sizes that meet every branch, once.
std::vector<int64_t> Few(bool cuda, std::vector<int64_t> all, std::vector<int64_t> few) {
  return cuda ? few : all;
}

TEST_P(OpParity, MatMulQuantizedWeights) {
  for (const DType dtype : kQuantized) {
    const int block = BlockOf(dtype).elements;
    for (const int64_t rows : Few(IsCuda(GetParam()), {1, 2, 3, 7, 8, 9, 17, 33, 65}, {1, 9, 33})) {
      for (const int64_t blocks : Few(IsCuda(GetParam()), {1, 3, 33}, {3})) {
        const int64_t in = block * (block == 256 ? std::min<int64_t>(blocks, 5) : blocks);
        for (const int64_t out : Few(IsCuda(GetParam()), {1, 16, 21, 50}, {21})) {
          CheckMatMul(random_, *actual_, *reference_, dtype, DType::kF32, rows, in, out,
                      IsCuda(GetParam()) ? kBF16Unit : 0);
          ASSERT_FALSE(HasFailure());
        }
      }
    }
  }
}

// Tensor cores multiply bf16: quantised weights are what they would be as bf16, bit for bit, in every kernel.
TEST_P(OpParity, MatMulOfQuantizedWeightsOnTensorCores) {
  if (!IsCuda(GetParam())) GTEST_SKIP() << "quantised weights meet int8 there";
  const struct {
    int64_t rows, in, out;
  } shapes[] = {{1, 96, 97}, {9, 1184, 33}, {17, 544, 20}, {40, 1184, 70}, {300, 160, 130}};
  for (const DType dtype : kQuantized) {
    const int block = BlockOf(dtype).elements;
    for (const auto& shape : shapes) {
      const int64_t in = (shape.in + block - 1) / block * block;
      const Matrix matrix = RandomMatrix(random_, dtype, shape.out, in);
      const Weight quantized = Loaded(*actual_, matrix);
      const Weight bf16 = actual_->LoadWeight(matrix.view, DType::kBF16).value();
      ASSERT_EQ(quantized.view.dtype, dtype);
      ASSERT_EQ(bf16.view.dtype, DType::kBF16);
      const std::vector<float> x = Normals(random_, shape.rows * in), bias = Normals(random_, shape.out);
      std::vector<float> actual = Poison(shape.rows * shape.out), expected = Poison(actual.size());
      actual_->MatMul({x.data(), quantized.view, bias.data(), actual.data(), shape.rows, false});
      actual_->MatMul({x.data(), bf16.view, bias.data(), expected.data(), shape.rows, false});
      EXPECT_EQ(std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(float)), 0)
          << Name(dtype) << ": " << shape.rows << " rows, " << in << " in, " << shape.out << " out";
    }
  }
}

TEST_P(OpParity, MatMulWithActivationsInBf16) {
  const std::unique_ptr<Backend> backend = TestBackend(GetParam(), 3, &missing_, DType::kBF16);
  for (const int64_t rows : Few(IsCuda(GetParam()), {1, 2, 3, 7, 8, 9, 17, 33}, {1, 9, 33})) {
    for (const int64_t in : Few(IsCuda(GetParam()), {1, 2, 65, 96, 512, 1111}, {2, 65, 1032})) {
      for (const int64_t out : Few(IsCuda(GetParam()), {1, 16, 21, 50}, {21})) {
        CheckMatMul(random_, *backend, *reference_, DType::kBF16, DType::kBF16, rows, in, out);
        ASSERT_FALSE(HasFailure());
      }
    }
  }
}

// Any x: off by no more than rounding x to 1/254 of its group's largest element can cause.
TEST_P(OpParity, MatMulQuantizedActivations) {
  const int64_t rows = 5, in = 3 * kRowGroup, out = 40;
  for (const DType dtype : kQuantized) {
    const Matrix weight = RandomMatrix(random_, dtype, out, in);
    const BothWeights loaded(*actual_, *reference_, weight);
    const std::vector<float> values = weight.Values();
    const std::vector<float> x = Normals(random_, rows * in);
    std::vector<float> actual = Poison(rows * out), expected = Poison(rows * out);
    actual_->MatMul({x.data(), loaded.actual.view, nullptr, actual.data(), rows, false});
    reference_->MatMul({x.data(), loaded.expected.view, nullptr, expected.data(), rows, false});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < out; ++o) {
        double bound = 0;
        for (int64_t b = 0; b < in; b += kRowGroup) {
          double largest = 0, weights = 0;
          for (int64_t k = b; k < b + kRowGroup; ++k) {
            largest = std::max<double>(largest, std::abs(x[r * in + k]));
            weights += std::abs(values[o * in + k]);
          }
          bound += largest / 254 * weights;
        }
        ExpectNear(actual[r * out + o], expected[r * out + o], bound * 1.001, std::string(Name(dtype)));
      }
    }
  }
}

TEST_P(OpParity, MatMulSmallShapes) {
  for (const DType dtype : kDTypes) {
    for (const int64_t rows : {1, 2, 3, 4, 5, 8, 9, 17}) {
      for (const int64_t in : {1, 15, 16, 17, 64, 172}) {
        for (const int64_t out : {1, 5, 6, 13, 50}) {
          CheckMatMul(random_, *actual_, *reference_, dtype, DType::kF32, rows, in, out, XUnit(dtype));
          ASSERT_FALSE(HasFailure());
        }
      }
    }
  }
}

TEST_P(OpParity, MatMulLargeShapes) {
  for (const DType dtype : kDTypes) {
    const double x_unit = XUnit(dtype);
    CheckMatMul(random_, *actual_, *reference_, dtype, DType::kF32, 3, 2500, 97,
                x_unit);  // three depth slices, streamed
    CheckMatMul(random_, *actual_, *reference_, dtype, DType::kF32, 19, 1030, 61,
                x_unit);  // two depth slices, packed
    CheckMatMul(random_, *actual_, *reference_, dtype, DType::kF32, 203, 33, 67, x_unit);  // two row blocks
  }
}

TEST_P(OpParity, MatMulOfWholeVectors) {
  // Rows of 16-byte vectors, as models have them: every kernel of the tensor cores, and depths over one
  // slice, one round of slices and, ragged, over several.
  for (const int64_t rows : {1, 9, 17, 33, 70}) {
    CheckMatMul(random_, *actual_, *reference_, DType::kBF16, DType::kF32, rows, 72, 97, XUnit(DType::kBF16));
    CheckMatMul(random_, *actual_, *reference_, DType::kBF16, DType::kF32, rows, 1160, 33,
                XUnit(DType::kBF16));
  }
  CheckMatMul(random_, *actual_, *reference_, DType::kBF16, DType::kF32, 3, 8 * 512 + 40, 17,
              XUnit(DType::kBF16));
  CheckMatMul(random_, *actual_, *reference_, DType::kBF16, DType::kF32, 300, 136, 130, XUnit(DType::kBF16));
}

TEST_P(OpParity, RmsNorm) {
  for (const int64_t dim : {1, 15, 64, 100, 1027}) {
    for (const int64_t rows : {1, 17, 33}) {
      std::vector<float> x = Normals(random_, rows * dim);
      const std::vector<float> weight = Normals(random_, dim);
      for (const bool in_place : {false, true}) {
        std::vector<float> actual = in_place ? x : Poison(rows * dim);
        std::vector<float> expected = Poison(rows * dim);
        actual_->RmsNorm(
            {in_place ? actual.data() : x.data(), weight.data(), actual.data(), rows, dim, 1e-5f});
        reference_->RmsNorm({x.data(), weight.data(), expected.data(), rows, dim, 1e-5f});
        // The sum of squares has no cancellation: relative error dim·u; mean and eps add 2, the root halves
        // it; then root, reciprocal, two products and the reference's rounding.
        const double relative = ((static_cast<double>(dim) + 2) / 2 + 5) * kUnit;
        for (int64_t i = 0; i < rows * dim; ++i) {
          ExpectNear(actual[i], expected[i], relative * std::abs(expected[i]), "dim " + std::to_string(dim));
        }
      }
    }
  }
}

TEST_P(OpParity, Rope) {
  for (const int head_dim : {2, 6, 8, 32, 40, 128}) {
    for (const int heads : {1, 3}) {
      for (const int rows : {1, 17, 70}) {
        const std::vector<float> x = Normals(random_, static_cast<size_t>(rows) * heads * head_dim);
        std::vector<int32_t> positions(rows);
        for (int32_t& position : positions) position = UniformInt(random_, 0, 1 << 20);
        std::vector<float> frequency(head_dim / 2);
        for (int i = 0; i < head_dim / 2; ++i) frequency[i] = std::pow(10000.0f, -2.0f * i / head_dim);
        std::vector<float> actual = x;
        std::vector<float> expected = x;
        actual_->Rope({actual.data(), positions, frequency.data(), heads, head_dim});
        reference_->Rope({expected.data(), positions, frequency.data(), heads, head_dim});
        const int half = head_dim / 2;
        for (size_t i = 0; i < x.size(); ++i) {
          const size_t other = i % head_dim < static_cast<size_t>(half) ? i + half : i - half;
          // Each term: rounded cosine or sine, product, sum; and the reference's rounding. |cos|, |sin| <= 1.
          const double tolerance = 4 * kUnit * (std::abs(x[i]) + std::abs(x[other]));
          ExpectNear(actual[i], expected[i], tolerance, "head_dim " + std::to_string(head_dim));
        }
      }
    }
  }
}

TEST_P(OpParity, RopeAnglesFollowTheirInputs) {
  // Same pointers and sizes, other contents: nothing remembered from the call before may be used.
  std::vector<int32_t> positions = {1, 2, 3};
  std::vector<float> frequency = {1.0f, 0.5f};
  for (int change = 0; change < 3; ++change) {
    if (change == 1) positions[1] = 7;
    if (change == 2) frequency[1] = 0.25f;
    std::vector<float> actual(12, 1.0f);
    std::vector<float> expected(12, 1.0f);
    actual_->Rope({actual.data(), positions, frequency.data(), 1, 4});
    reference_->Rope({expected.data(), positions, frequency.data(), 1, 4});
    for (int i = 0; i < 12; ++i)
      ExpectNear(actual[i], expected[i], 8 * kUnit, "change " + std::to_string(change));
  }
}

TEST_P(OpParity, SwiGlu) {
  for (const int64_t dim : {1, 17, 172, 5000}) {
    for (const int64_t rows : {1, 3, 17}) {
      std::vector<float> gate = Normals(random_, rows * dim);
      for (float& g : gate) g *= 40.0f;  // far into both tails
      gate[0] = -300.0f;
      const std::vector<float> up = Normals(random_, rows * dim);
      for (const bool in_place : {false, true}) {
        std::vector<float> actual = in_place ? gate : Poison(rows * dim);
        std::vector<float> expected = Poison(rows * dim);
        actual_->SwiGlu({in_place ? actual.data() : gate.data(), up.data(), actual.data(), rows, dim});
        reference_->SwiGlu({gate.data(), up.data(), expected.data(), rows, dim});
        for (int64_t i = 0; i < rows * dim; ++i) {
          // Exp, sum, quotient, product, the reference's rounding. Below -88 the result is that of e^88,
          // g·up·e^-88, with the same relative error, and the true one lies between 0 and it.
          const double capped =
              gate[i] < -88 ? std::abs(static_cast<double>(gate[i]) * up[i]) * std::exp(-88.0) : 0;
          // Quotient, product and reference may be subnormal, where a rounding is absolute: at most 2^-150.
          const double relative = kExpError + 4 * kUnit;
          const double underflow = 0x1p-150 * (2 + std::abs(up[i]));
          ExpectNear(actual[i], expected[i], relative * (std::abs(expected[i]) + capped) + capped + underflow,
                     "gate " + std::to_string(gate[i]));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EveryBackend, OpParity, ::testing::ValuesIn(TestBackendNames()),
                         [](const auto& name) { return name.param; });

}  // namespace
}  // namespace atp
