// What the parity tests of ops share: each backend (test_backends.h) beside the reference backend.
//
// Tolerances are error bounds, not tuned numbers. u = 2^-24 is the unit roundoff of fp32; the standard model
// says that each operation is exact times (1 + e), |e| <= u. A sum of n products in any order, fused or not,
// is then within n·u·Σ|a·b| to first order in u (Higham, Accuracy and Stability of Numerical Algorithms,
// §3.1). The reference computes in double and rounds once: one more u. Weights and cache entries are read
// exactly, whatever their dtype.
#ifndef ATP_TESTS_KERNELS_OP_PARITY_H_
#define ATP_TESTS_KERNELS_OP_PARITY_H_

#include <cmath>
#include <memory>
#include <string>

#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/op_problems.h"
#include "tests/kernels/test_backends.h"

namespace atp {

inline constexpr double kUnit = 0x1p-24;
inline constexpr double kBF16Unit = 0x1p-8;
// Highway's Exp states 1 ulp, which is at most 2u; without fused multiply-add its polynomial loses as much
// again.
inline constexpr double kExpError = 4 * kUnit;

// NaN fails the comparison, so an output that was not written is found here.
inline void ExpectNear(float actual, float expected, double tolerance, const std::string& where) {
  EXPECT_LE(std::abs(static_cast<double>(actual) - expected), tolerance)
      << where << ": " << actual << ", expected " << expected;
}

class OpParity : public ::testing::TestWithParam<std::string> {
 protected:
  OpParity()
      : random_(TestSeed()),
        actual_(TestBackend(GetParam(), 3, &missing_)),
        reference_(MakeReferenceBackend()) {}

  void SetUp() override {
    if (actual_ == nullptr) GTEST_SKIP() << missing_;
  }

  Random random_;
  // Tensor cores multiply bf16 by bf16: there, x is rounded first.
  double XUnit(DType dtype) const { return IsCuda(GetParam()) && dtype == DType::kBF16 ? kBF16Unit : 0; }

  std::string missing_;
  std::unique_ptr<Backend> actual_;
  std::unique_ptr<Backend> reference_;
};

}  // namespace atp

#endif  // ATP_TESTS_KERNELS_OP_PARITY_H_
