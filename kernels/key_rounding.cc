#include "kernels/key_rounding.h"

#include <algorithm>
#include <cmath>

#include "absl/container/inlined_vector.h"
#include "kernels/walsh_hadamard.h"

namespace atp {

void KeyRounding::Prepare(const float* queries, int m, int d) {
  d_ = d;
  const size_t stride = static_cast<size_t>(d);
  gram_.assign(stride * stride, 0.0f);
  factor_.assign(stride * stride, 0.0f);
  const int step = (m + kKeyRoundingQueries - 1) / kKeyRoundingQueries;
  for (int q = 0; q < m; q += step) {
    const float* from = queries + static_cast<size_t>(q) * stride;
    query_.assign(from, from + d);
    WalshHadamard(query_.data(), d);
    for (int i = 0; i < d; ++i) {
      float* row = &gram_[static_cast<size_t>(i) * stride];
      for (int j = 0; j <= i; ++j) row[j] += query_[i] * query_[j];
    }
  }
  float trace = 0;
  for (int i = 0; i < d; ++i) trace += gram_[static_cast<size_t>(i) * (stride + 1)];
  // Queries that are all zero want no less than the nearest step.
  const float damping = std::max(kKeyRoundingDamping * trace / static_cast<float>(d), 1e-20f);
  for (int i = 0; i < d; ++i) gram_[static_cast<size_t>(i) * (stride + 1)] += damping;
  for (int j = d - 1; j > 0; --j) {
    const float* pivot = &gram_[static_cast<size_t>(j) * stride];
    const float inverse = 1.0f / pivot[j];
    for (int i = 0; i < j; ++i) {
      const float u = pivot[i] * inverse;
      factor_[static_cast<size_t>(i) * stride + j] = u;
      float* row = &gram_[static_cast<size_t>(i) * stride];
      for (int k = 0; k <= i; ++k) row[k] -= u * pivot[k];
    }
  }
  if (!std::all_of(factor_.begin(), factor_.end(), [](float u) { return std::isfinite(u); })) {
    std::fill(factor_.begin(), factor_.end(), 0.0f);
  }
}

void KeyRounding::Round(float* key, float scale, int top) const {
  if (scale == 0) return;
  absl::InlinedVector<float, 256> cost(static_cast<size_t>(d_), 0.0f);  // Σ U_ij e_i of the elements so far
  const float inverse = 1.0f / scale;
  for (int i = 0; i < d_; ++i) {
    const float rounded = std::clamp(std::nearbyint((key[i] - cost[i]) * inverse),
                                     static_cast<float>(-top - 1), static_cast<float>(top)) *
                          scale;
    const float error = rounded - key[i];
    key[i] = rounded;
    const float* factor = &factor_[static_cast<size_t>(i) * static_cast<size_t>(d_)];
    for (int j = i + 1; j < d_; ++j) cost[j] += factor[j] * error;
  }
}

}  // namespace atp
