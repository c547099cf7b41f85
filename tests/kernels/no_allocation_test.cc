// After the first step of its size, a step allocates nothing: every allocation of this thread, which runs all
// of it, is counted.
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend_factory.h"
#include "tests/allocation_count.h"
#include "tests/kernels/op_problems.h"

namespace atp {
namespace {

TEST(NoAllocation, AStepThatWasSeenBefore) {
  Random random(TestSeed());
  // One thread: which of several runs a part, and so grows its scratch, is left to chance.
  const std::unique_ptr<Backend> backend = CpuBackend("auto", 1);
  const int heads = 8, kv_heads = 2, head_dim = 64;
  CacheProblem problem(random, {KvFormat::kBF16, head_dim, kv_heads, 16, 16}, {{20, 90, 30}, {1, 40, 0}},
                       false);
  const int rows = problem.rows(), dim = heads * head_dim;
  const Matrix matrix = RandomMatrix(random, DType::kBF16, dim, dim);
  const Matrix quantized_matrix = RandomMatrix(random, DType::kQ4_K, dim, dim);
  const Weight weight = Loaded(*backend, matrix), quantized = Loaded(*backend, quantized_matrix);
  const std::vector<float> norm = Normals(random, dim), frequency = Normals(random, head_dim / 2);
  std::vector<float> key = Normals(random, rows * kv_heads * head_dim);
  std::vector<float> x = Normals(random, rows * dim), y(rows * dim);
  std::vector<int32_t> positions(rows), indices(rows);
  const auto step = [&](int32_t first) {
    for (int i = 0; i < rows; ++i) positions[i] = first + i;
    backend->GatherRows({weight.view, indices, x.data()});
    backend->RmsNorm({x.data(), norm.data(), x.data(), rows, dim, 1e-5f});
    backend->GatherRows({quantized.view, indices, x.data()});
    backend->MatMul({x.data(), quantized.view, nullptr, y.data(), rows, false});
    backend->MatMul({x.data(), weight.view, nullptr, y.data(), rows, false});
    backend->RotateAndStore({y.data(), key.data(), key.data(), positions, frequency.data(),
                             problem.sequences(), problem.pool(), heads, kv_heads});
    backend->Attention({y.data(), x.data(), problem.sequences(), problem.pool(), heads, kv_heads, 0.125f});
    backend->SwiGlu({x.data(), y.data(), y.data(), rows, dim});
  };
  const int64_t before = AllocationsOfThisThread();
  step(0);
  EXPECT_GT(AllocationsOfThisThread(), before);  // so the counter counts
  const int64_t warm = AllocationsOfThisThread();
  step(1);
  step(100);
  EXPECT_EQ(AllocationsOfThisThread(), warm);
}

}  // namespace
}  // namespace atp
