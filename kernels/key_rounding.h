// Rounds keys to few bits so that what queries make of them changes least: not each element to the nearest
// step, but each with what the rounding of those before it has cost made good, as far as the queries can
// tell.
//
// With H = QᵀQ + λI = U D Uᵀ, U unit upper triangular, a rounding error e costs eᵀHe = Σ_j D_j (e_j + Σ_{i<j}
// U_ij e_i)², so element j is rounded from k_j - Σ_{i<j} U_ij e_i (GPTQ, Frantar et al. 2022; in this form
// QuIP, Chee et al. 2023). λ is a tenth of the mean of H's diagonal: references are few, and later queries
// others.
#ifndef ATP_KERNELS_KEY_ROUNDING_H_
#define ATP_KERNELS_KEY_ROUNDING_H_

#include <vector>

namespace atp {

inline constexpr int kKeyRoundingQueries = 128;  // at most so many references say what matters
inline constexpr float kKeyRoundingDamping = 0.1f;

// Keeps its memory from one set of queries to the next.
class KeyRounding {
 public:
  // queries: [m, d]; every ceil(m / kKeyRoundingQueries)th is taken, into the Walsh–Hadamard basis. fp32 in a
  // fixed order: the same bits on every backend.
  void Prepare(const float* queries, int m, int d);
  // key: [d], in that basis; becomes multiples of `scale` from -(top + 1) · scale to top · scale.
  void Round(float* key, float scale, int top) const;

 private:
  int d_ = 0;
  std::vector<float> query_;   // [d]
  std::vector<float> gram_;    // [d, d], lower triangle
  std::vector<float> factor_;  // [d, d]: row i is U_ij for j > i
};

}  // namespace atp

#endif  // ATP_KERNELS_KEY_ROUNDING_H_
