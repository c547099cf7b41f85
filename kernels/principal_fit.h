// Fits r principal entries to n cache entries of one kv head: the dense core of FitPrincipalKeys (paging
// apart).
//
// With keys K, values V, log masses b, reference queries Q (scaled), following ATP and Attention Matching:
//   A = softmax_rows(Q Kᵀ + b)                        reference attention [m, n]
//   J = first r pivots of column-pivoted QR of A      the first `forced` entries are always in J
//   w = argmin_{w >= 0} |A_J w - 1|²                  the segment keeps its share of the softmax
//   P = rownorm(A_J diag w)
//   C = V_J + (PᵀP + ρ tr(PᵀP)/r I)⁻¹ Pᵀ (A V - P V_J)   it keeps its output, pulled toward the real values
//   entries (K_J, C, b_J + log w), in the order of J sorted
// References: arXiv 2403.02352 (principal keys), arXiv 2602.16284 (mass and value fits).
#ifndef ATP_KERNELS_PRINCIPAL_FIT_H_
#define ATP_KERNELS_PRINCIPAL_FIT_H_

#include <cstdint>

namespace atp {

inline constexpr float kPrincipalRidge = 1e-2f;  // ρ
inline constexpr int kPrincipalMassIterations =
    200;  // of accelerated projected gradient; stopping early regularises w
// A column whose norm² is this little of the largest is spanned: what is left of it is rounding. With fewer
// references than entries to choose, the pivots end there and the most attended of the rest follow.
inline constexpr double kPrincipalNoise = 1e-13;
inline constexpr float kLeastPrincipalMass = 1e-8f;  // w is at least this, so that log w is finite

struct PrincipalFitProblem {
  const float* keys = nullptr;      // [n, d], rotated
  const float* values = nullptr;    // [n, d]
  const float* log_mass = nullptr;  // [n], or null when all are 0
  const float* queries = nullptr;   // [m, d], rotated and multiplied by 1/sqrt(d)
  int n = 0;
  int m = 0;
  int d = 0;
  int count = 0;   // r; r >= n keeps every entry as it is
  int forced = 0;  // attention sinks; at most count
};

// All memory is the caller's; keys, values and log_mass have room for min(count, n) entries.
struct PrincipalFit {
  float* keys = nullptr;      // [r, d]
  float* values = nullptr;    // [r, d]
  float* log_mass = nullptr;  // [r]
  int32_t* chosen = nullptr;  // [r], ascending indices into the n entries
  float mass_residual = 0;    // root mean square of A_J w - 1
  float output_residual = 0;  // |A V - P C| / |A V|, Frobenius
  bool fitted = false;  // false: entries were kept as they are, because r >= n or the input is degenerate
};

}  // namespace atp

#endif  // ATP_KERNELS_PRINCIPAL_FIT_H_
