// Random inputs for one op each, owned by the struct. Everything that an op must not read is NaN.
#ifndef ATP_TESTS_KERNELS_OP_PROBLEMS_H_
#define ATP_TESTS_KERNELS_OP_PROBLEMS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/kv_page.h"

namespace atp {

using Random = std::mt19937_64;

// Fresh for each call, or ATP_TEST_SEED from the environment; printed where the test fails, to repeat it.
uint64_t TestSeed();

int UniformInt(Random& random, int low, int high);  // inclusive
std::vector<float> Normals(Random& random, size_t count);
std::vector<float> Poison(size_t count);

struct Matrix {
  std::vector<std::byte> bytes;
  TensorView view;

  std::vector<float> Values() const;  // [rows, cols]
};
Matrix RandomMatrix(Random& random, DType dtype, int64_t rows, int64_t cols);

// Activations meet quantised weights in int8, with a scale for so many elements, counted from a row's start.
inline constexpr int64_t kRowGroup = 256;
// Rows that this leaves as they are.
std::vector<float> IntegerRows(Random& random, int64_t rows, int64_t cols);
Weight Loaded(Backend& backend, const Matrix& matrix);

std::unique_ptr<Backend> CpuBackend(const std::string& isa, int threads,
                                    DType activation_dtype = DType::kF32);

// A KV pool and sequences in it. Blocks lie in random order; a block's unwritten entries are NaN.
struct CacheShape {
  KvFormat format = KvFormat::kF32;
  int head_dim = 0;
  int kv_heads = 0;
  int entries = 16;
  int principal_entries_per_block = 16;
};
struct SequenceShape {
  int rows = 0;           // of this step
  int exact_entries = 0;  // including this step's
  int max_principal = 0;  // each head has a random number of them, up to this
};

class CacheProblem {
 public:
  // Writes the entries before the step's, and the step's own if `with_step` (else they are StoreKv's to
  // write).
  CacheProblem(Random& random, const CacheShape& shape, const std::vector<SequenceShape>& sequences,
               bool with_step);
  CacheProblem(const CacheProblem&) = delete;
  CacheProblem& operator=(const CacheProblem&) = delete;

  const CacheShape& shape() const { return shape_; }
  int rows() const { return rows_; }
  KvPool pool() { return {pool_.data(), block_bytes_, &exact_}; }
  const std::vector<KvSequence>& sequences() const { return sequences_; }
  std::vector<std::byte>& bytes() { return pool_; }
  // Calls `visit(page, key, value, log_mass)` for what attention of this head reads, unless its mass is 0.
  void ForEachEntry(const KvSequence& sequence, int kv_head,
                    const std::function<void(const KvPage&, const float*, const float*, float)>& visit) const;

 private:
  BlockId TakeBlock();
  void FillPrincipal(Random& random, KvHeadBlocks& head, int count);
  void FillExact(Random& random, KvHeadBlocks& head, const SequenceShape& sequence, bool with_step);

  CacheShape shape_;
  KvPage exact_;
  std::vector<KvPage> principal_;  // one of every format that a head may have
  size_t block_bytes_;
  int rows_ = 0;
  std::vector<std::byte> pool_;
  std::vector<BlockId> free_;
  std::vector<std::unique_ptr<std::vector<BlockId>>> tables_;
  std::vector<std::vector<KvHeadBlocks>> heads_;  // per sequence
  std::vector<KvSequence> sequences_;
};

}  // namespace atp

#endif  // ATP_TESTS_KERNELS_OP_PROBLEMS_H_
