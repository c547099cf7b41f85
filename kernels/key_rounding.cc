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
  queries_.clear();
  const int step = (m + kKeyRoundingQueries - 1) / kKeyRoundingQueries;
  for (int q = 0; q < m; q += step) {
    const float* from = queries + static_cast<size_t>(q) * stride;
    queries_.insert(queries_.end(), from, from + d);
    WalshHadamard(&queries_[queries_.size() - stride], d);
  }
  for (int i = 0; i < d; ++i) {
    float* row = &gram_[static_cast<size_t>(i) * stride];
    const float *query = queries_.data(), *end = query + queries_.size();
    // Four at a time, in the order of one at a time.
    for (; end - query >= 4 * d; query += 4 * d) {
      const float *a = query, *b = a + d, *c = b + d, *e = c + d;
      for (int j = 0; j <= i; ++j) row[j] = row[j] + a[i] * a[j] + b[i] * b[j] + c[i] * c[j] + e[i] * e[j];
    }
    for (; query < end; query += d) {
      for (int j = 0; j <= i; ++j) row[j] += query[i] * query[j];
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
