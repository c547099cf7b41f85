#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/principal_fit.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h:
#include <algorithm>
#include <cassert>
#include <cmath>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"
#include "kernels/cpu/principal_fit.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::ScalableTag<double>;
using V = hn::Vec<D>;

// Every matrix of the fit has one reference query per column, padded with zero columns to whole vectors, so
// that all loops run over queries: `stride` doubles from row to row.
inline size_t PaddedQueries(int m) { return hwy::RoundUpTo(static_cast<size_t>(m), 16); }

HWY_INLINE double Dot(const double* HWY_RESTRICT a, const double* HWY_RESTRICT b, size_t size) {
  const D d;
  V sum0 = hn::Zero(d), sum1 = hn::Zero(d);
  const size_t step = 2 * hn::Lanes(d);
  for (size_t i = 0; i < size; i += step) {
    sum0 = hn::MulAdd(hn::Load(d, a + i), hn::Load(d, b + i), sum0);
    sum1 = hn::MulAdd(hn::Load(d, a + i + hn::Lanes(d)), hn::Load(d, b + i + hn::Lanes(d)), sum1);
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1)));
}

// out[a][:] += sign · Σ_b factor(a, b) · x[b][:], four rows of out at a time.
template <class Factor>
HWY_INLINE void AddProduct(double* HWY_RESTRICT out, int rows, const double* HWY_RESTRICT x, int inner,
                           size_t stride, double sign, const Factor& factor) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  constexpr int kTile = 4;
  for (int a0 = 0; a0 < rows; a0 += kTile) {
    const int tile = std::min(kTile, rows - a0);
    for (size_t q = 0; q < stride; q += 2 * lanes) {
      V sum[kTile][2];
      ATP_UNROLL
      for (int a = 0; a < kTile; ++a) sum[a][0] = sum[a][1] = hn::Zero(d);
      for (int b = 0; b < inner; ++b) {
        const V x0 = hn::Load(d, x + b * stride + q), x1 = hn::Load(d, x + b * stride + q + lanes);
        ATP_UNROLL
        for (int a = 0; a < kTile; ++a) {
          const V f = hn::Set(d, factor(a0 + std::min(a, tile - 1), b));
          sum[a][0] = hn::MulAdd(f, x0, sum[a][0]);
          sum[a][1] = hn::MulAdd(f, x1, sum[a][1]);
        }
      }
      const V s = hn::Set(d, sign);
      ATP_UNROLL
      for (int a = 0; a < kTile; ++a) {
        if (a >= tile) break;
        double* row = out + (a0 + a) * stride + q;
        hn::Store(hn::MulAdd(s, sum[a][0], hn::Load(d, row)), d, row);
        hn::Store(hn::MulAdd(s, sum[a][1], hn::Load(d, row + lanes)), d, row + lanes);
      }
    }
  }
}

// Reference attention, a[i][q]: softmax over the entries i of each query's scores. Padded queries get 0.
void ReferenceAttention(const PrincipalFitProblem& p, size_t stride, double* HWY_RESTRICT queries,
                        double* HWY_RESTRICT row, double* HWY_RESTRICT a) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  std::fill_n(queries, p.d * stride, 0.0);
  for (int q = 0; q < p.m; ++q)
    for (int c = 0; c < p.d; ++c) queries[c * stride + q] = p.queries[q * p.d + c];
  for (int i = 0; i < p.n; ++i) std::fill_n(a + i * stride, stride, p.log_mass ? double{p.log_mass[i]} : 0.0);
  AddProduct(a, p.n, queries, p.d, stride, 1.0, [&p](int i, int c) { return double{p.keys[i * p.d + c]}; });

  for (size_t q = 0; q < stride; q += lanes) {
    V top = hn::Load(d, a + q);
    for (int i = 1; i < p.n; ++i) top = hn::Max(top, hn::Load(d, a + i * stride + q));
    V sum = hn::Zero(d);
    for (int i = 0; i < p.n; ++i) {
      const V weight = hn::Exp(d, hn::Sub(hn::Load(d, a + i * stride + q), top));
      sum = hn::Add(sum, weight);
      hn::Store(weight, d, a + i * stride + q);
    }
    hn::Store(hn::Div(hn::Set(d, 1.0), sum), d, row + q);
  }
  std::fill(row + p.m, row + stride, 0.0);
  for (int i = 0; i < p.n; ++i)
    for (size_t q = 0; q < stride; q += lanes)
      hn::Store(hn::Mul(hn::Load(d, a + i * stride + q), hn::Load(d, row + q)), d, a + i * stride + q);
}

// Pivoted Cholesky of the Gram matrix AᵀA, whose columns are computed when they become pivots: the same
// pivots as column-pivoted QR of A. factor: [n, r + forced]; norms: [n], of the columns; rest: [n], what of
// each is not yet spanned.
void ChoosePrincipal(const PrincipalFitProblem& p, size_t stride, const double* HWY_RESTRICT a,
                     double* HWY_RESTRICT factor, double* HWY_RESTRICT norms, double* HWY_RESTRICT rest,
                     int32_t* HWY_RESTRICT chosen) {
  const size_t width = static_cast<size_t>(p.count + p.forced);
  for (int i = 0; i < p.n; ++i) rest[i] = norms[i] = Dot(a + i * stride, a + i * stride, stride);
  const double noise = kPrincipalNoise * *std::max_element(norms, norms + p.n);
  int found = 0;
  while (found < p.forced) chosen[found] = found, ++found;
  for (int step = 0; found < p.count; ++step) {
    const int pivot = static_cast<int>(std::max_element(rest, rest + p.n) - rest);
    const double best = rest[pivot];
    if (!(best > noise)) break;
    if (pivot >= p.forced) chosen[found++] = pivot;
    if (found == p.count) break;
    const double scale = 1 / std::sqrt(best);
    const double* pivot_factor = factor + pivot * width;
    rest[pivot] = -1;
    for (int i = 0; i < p.n; ++i) {
      if (rest[i] < 0) continue;  // pivoted before
      double* row = factor + i * width;
      double g = Dot(a + i * stride, a + pivot * stride, stride);
      for (int k = 0; k < step; ++k) g -= row[k] * pivot_factor[k];
      row[step] = g * scale;
      rest[i] = std::max(rest[i] - row[step] * row[step], 0.0);
    }
  }
  while (found < p.count) {
    int next = -1;
    for (int i = p.forced; i < p.n; ++i)
      if (rest[i] >= 0 && (next < 0 || norms[i] > norms[next])) next = i;
    rest[next] = -1;
    chosen[found++] = next;
  }
  std::sort(chosen, chosen + p.count);
}

// gram[i][j] = x_i · x_j; returns nothing but symmetry.
void Gram(const double* HWY_RESTRICT x, int r, size_t stride, double* HWY_RESTRICT gram) {
  for (int i = 0; i < r; ++i)
    for (int j = 0; j <= i; ++j)
      gram[i * r + j] = gram[j * r + i] = Dot(x + i * stride, x + j * stride, stride);
}

HWY_INLINE void Multiply(const double* HWY_RESTRICT gram, const double* HWY_RESTRICT x, int r,
                         double* HWY_RESTRICT y) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  for (int i = 0; i < r; ++i) {
    const double* row = gram + static_cast<size_t>(i) * r;
    V sum = hn::Zero(d);
    size_t j = 0;
    for (; j + lanes <= static_cast<size_t>(r); j += lanes)
      sum = hn::MulAdd(hn::LoadU(d, row + j), hn::LoadU(d, x + j), sum);
    double total = hn::GetLane(hn::SumOfLanes(d, sum));
    for (; j < static_cast<size_t>(r); ++j) total += row[j] * x[j];
    y[i] = total;
  }
}

// The leading eigenvector of a matrix without negative elements has none either: `ones` is never orthogonal
// to it.
double LargestEigenvalue(const double* gram, int r, double* x, double* y) {
  std::fill_n(x, r, 1.0);
  double value = 0;
  for (int iteration = 0; iteration < 1000; ++iteration) {
    Multiply(gram, x, r, y);
    double norm = 0;
    for (int i = 0; i < r; ++i) norm += y[i] * y[i];
    norm = std::sqrt(norm);
    if (!(norm > 0) || !std::isfinite(norm)) return norm;
    for (int i = 0; i < r; ++i) x[i] = y[i] / norm;
    if (std::abs(norm - value) <= 1e-14 * norm) return norm;
    value = norm;
  }
  return value;
}

// min_{w >= 0} |part w - 1|² by accelerated projected gradient (FISTA) from a uniform start. vectors: 4 of r.
void FitMass(const double* part, int r, int m, size_t stride, double* gram, double* vectors, double* w) {
  double *rhs = vectors, *y = vectors + r, *product = vectors + 2 * r, *spare = vectors + 3 * r;
  Gram(part, r, stride, gram);
  const double step = 1.0 / std::max(LargestEigenvalue(gram, r, spare, product), 1e-12);
  double total = 0;
  for (int i = 0; i < r; ++i) {
    rhs[i] = 0;
    for (int q = 0; q < m; ++q) rhs[i] += part[i * stride + q];
    total += rhs[i];
  }
  std::fill_n(w, r, m / std::max(total, 1e-9));
  std::copy_n(w, r, y);
  double t = 1;
  for (int iteration = 0; iteration < kPrincipalMassIterations; ++iteration) {
    const double t_next = (1 + std::sqrt(1 + 4 * t * t)) / 2;
    const double momentum = (t - 1) / t_next;
    Multiply(gram, y, r, product);
    for (int i = 0; i < r; ++i) {
      const double next = std::max(y[i] - (product[i] - rhs[i]) * step, 0.0);
      y[i] = next + momentum * (next - w[i]);
      w[i] = next;
    }
    t = t_next;
  }
  for (int i = 0; i < r; ++i) w[i] = std::max<double>(w[i], kLeastPrincipalMass);
}

// x [r, d] := gram⁻¹ x by Cholesky in place; false when gram is not positive definite.
bool SolvePositive(double* HWY_RESTRICT gram, int r, double* HWY_RESTRICT x, int d) {
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = gram[i * r + j];
      for (int k = 0; k < j; ++k) sum -= gram[i * r + k] * gram[j * r + k];
      if (i != j) {
        gram[i * r + j] = sum / gram[j * r + j];
      } else if (sum > 0) {
        gram[i * r + i] = std::sqrt(sum);
      } else {
        return false;
      }
    }
  }
  for (int i = 0; i < r; ++i) {
    for (int k = 0; k < i; ++k)
      for (int c = 0; c < d; ++c) x[i * d + c] -= gram[i * r + k] * x[k * d + c];
    for (int c = 0; c < d; ++c) x[i * d + c] /= gram[i * r + i];
  }
  for (int i = r - 1; i >= 0; --i) {
    for (int k = i + 1; k < r; ++k)
      for (int c = 0; c < d; ++c) x[i * d + c] -= gram[k * r + i] * x[k * d + c];
    for (int c = 0; c < d; ++c) x[i * d + c] /= gram[i * r + i];
  }
  return true;
}

void Keep(const PrincipalFitProblem& p, int r, double log_scale, PrincipalFit* fit) {
  for (int j = 0; j < r; ++j) {
    const int i = fit->chosen[j];
    std::copy_n(p.keys + i * p.d, p.d, fit->keys + j * p.d);
    std::copy_n(p.values + i * p.d, p.d, fit->values + j * p.d);
    fit->log_mass[j] = static_cast<float>((p.log_mass ? p.log_mass[i] : 0.0) + log_scale);
  }
}

void FitPrincipal(const PrincipalFitProblem& p, double* scratch, PrincipalFit* fit) {
  assert(p.forced <= p.count);
  fit->mass_residual = fit->output_residual = 0;
  fit->fitted = false;
  if (p.count >= p.n) {
    for (int i = 0; i < p.n; ++i) fit->chosen[i] = i;
    return Keep(p, p.n, 0.0, fit);
  }
  const int r = p.count;
  const size_t stride = PaddedQueries(p.m);
  double* a = scratch;                      // [n, stride]
  double* share = a + p.n * stride;         // [r, stride]
  double* columns = share + r * stride;     // [d, stride]: queries, then the output's residual
  double* target = columns + p.d * stride;  // [d, stride]
  double* row = target + p.d * stride;      // [stride]
  double* factor = row + stride;            // [n, r + forced]; later gram [r, r] and shift [r, d]
  double* rest =
      factor + static_cast<size_t>(p.n) * (r + p.forced) + static_cast<size_t>(r) * (r + p.d);  // [2 n + 5 r]
  double* gram = factor;
  double* shift = factor + static_cast<size_t>(r) * r;
  double* norms = rest + p.n;
  double* mass = norms + p.n;

  ReferenceAttention(p, stride, columns, row, a);
  ChoosePrincipal(p, stride, a, factor, norms, rest, fit->chosen);
  // Degenerate input ends here: the same keys, each standing for n/r entries.
  Keep(p, r, std::log(static_cast<double>(p.n) / r), fit);
  for (int j = 0; j < r; ++j) std::copy_n(a + fit->chosen[j] * stride, stride, share + j * stride);
  FitMass(share, r, p.m, stride, gram, mass + r, mass);

  double mass_error = 0;
  for (int q = 0; q < p.m; ++q) {
    double sum = 0;
    for (int j = 0; j < r; ++j) sum += share[j * stride + q] *= mass[j];
    mass_error += (sum - 1) * (sum - 1);
    for (int j = 0; j < r; ++j) share[j * stride + q] /= std::max(sum, 1e-9);
  }

  std::fill_n(target, p.d * stride, 0.0);
  AddProduct(target, p.d, a, p.n, stride, 1.0, [&p](int c, int i) { return double{p.values[i * p.d + c]}; });
  double* residual = columns;
  std::copy_n(target, p.d * stride, residual);
  AddProduct(residual, p.d, share, r, stride, -1.0,
             [&](int c, int j) { return double{p.values[fit->chosen[j] * p.d + c]}; });
  Gram(share, r, stride, gram);
  double trace = 0;
  for (int j = 0; j < r; ++j) trace += gram[j * r + j];
  for (int j = 0; j < r; ++j) gram[j * r + j] += kPrincipalRidge * trace / r;
  for (int j = 0; j < r; ++j)
    for (int c = 0; c < p.d; ++c) shift[j * p.d + c] = Dot(share + j * stride, residual + c * stride, stride);
  if (!SolvePositive(gram, r, shift, p.d)) return;
  if (!std::all_of(shift, shift + r * p.d, [](double x) { return std::isfinite(x); })) return;

  AddProduct(residual, p.d, share, r, stride, -1.0, [&](int c, int j) { return shift[j * p.d + c]; });
  const double error = Dot(residual, residual, p.d * stride), norm = Dot(target, target, p.d * stride);
  for (int j = 0; j < r; ++j) {
    const int i = fit->chosen[j];
    for (int c = 0; c < p.d; ++c)
      fit->values[j * p.d + c] = static_cast<float>(p.values[i * p.d + c] + shift[j * p.d + c]);
    fit->log_mass[j] = static_cast<float>((p.log_mass ? p.log_mass[i] : 0.0) + std::log(mass[j]));
  }
  fit->mass_residual = static_cast<float>(std::sqrt(mass_error / p.m));
  fit->output_residual = static_cast<float>(std::sqrt(error / std::max(norm, 1e-30)));
  fit->fitted = true;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {

size_t PrincipalFitScratch(int n, int m, int d, int count) {
  const size_t stride = hwy::RoundUpTo(static_cast<size_t>(m), 16);
  const size_t r = count;
  // `forced` is at most `count`.
  return (n + r + 2 * static_cast<size_t>(d) + 1) * stride + static_cast<size_t>(n) * 2 * r + r * (r + d) +
         2 * static_cast<size_t>(n) + 5 * r;
}

HWY_EXPORT(FitPrincipal);
PrincipalFitFn PrincipalFitFor(int64_t target) { return ATP_FUNCTION_FOR(target, FitPrincipal); }

}  // namespace atp::cpu
#endif
