#include "kernels/reference/principal_fit.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numeric>
#include <vector>

namespace atp {
namespace {

// Row-major matrix of doubles: the oracle trades speed for digits.
struct Matrix {
  Matrix(int rows, int cols) : rows(rows), cols(cols), data(static_cast<size_t>(rows) * cols) {}
  double& operator()(int r, int c) { return data[static_cast<size_t>(r) * cols + c]; }
  double operator()(int r, int c) const { return data[static_cast<size_t>(r) * cols + c]; }
  int rows, cols;
  std::vector<double> data;
};

Matrix ReferenceAttention(const PrincipalFitProblem& p) {
  Matrix a(p.m, p.n);
  for (int q = 0; q < p.m; ++q) {
    double top = -INFINITY;
    for (int i = 0; i < p.n; ++i) {
      double score = p.log_mass ? p.log_mass[i] : 0.0;
      for (int c = 0; c < p.d; ++c) score += double{p.queries[q * p.d + c]} * p.keys[i * p.d + c];
      a(q, i) = score;
      top = std::max(top, score);
    }
    double sum = 0;
    for (int i = 0; i < p.n; ++i) sum += a(q, i) = std::exp(a(q, i) - top);
    for (int i = 0; i < p.n; ++i) a(q, i) /= sum;
  }
  return a;
}

double ColumnNorm(const Matrix& a, int column) {
  double norm = 0;
  for (int q = 0; q < a.rows; ++q) norm += a(q, column) * a(q, column);
  return norm;
}

// The column with the largest norm² among those that are free; ties go to the smaller index.
int LargestColumn(const Matrix& a, const std::vector<bool>& taken) {
  int best = -1;
  for (int i = 0; i < a.cols; ++i)
    if (!taken[i] && (best < 0 || ColumnNorm(a, i) > ColumnNorm(a, best))) best = i;
  return best;
}

// Column-pivoted QR by modified Gram-Schmidt. Forced columns come first, whatever their pivot; then pivots in
// order until `count` columns are chosen.
std::vector<int> ChoosePrincipal(const Matrix& a, int count, int forced) {
  Matrix rest = a;
  std::vector<bool> taken(a.cols);
  std::vector<int> chosen(forced);
  std::iota(chosen.begin(), chosen.end(), 0);
  const double noise = kPrincipalNoise * ColumnNorm(a, LargestColumn(a, taken));
  while (static_cast<int>(chosen.size()) < count) {
    const int pivot = LargestColumn(rest, taken);
    if (pivot < 0) break;
    const double norm = ColumnNorm(rest, pivot);
    if (!(norm > noise)) break;
    taken[pivot] = true;
    if (pivot >= forced) chosen.push_back(pivot);
    for (int i = 0; i < a.cols; ++i) {
      if (taken[i]) continue;
      double dot = 0;
      for (int q = 0; q < a.rows; ++q) dot += rest(q, pivot) * rest(q, i);
      for (int q = 0; q < a.rows; ++q) rest(q, i) -= dot / norm * rest(q, pivot);
    }
  }
  for (int i = 0; i < forced; ++i) taken[i] = true;
  while (static_cast<int>(chosen.size()) < count) {
    chosen.push_back(LargestColumn(a, taken));
    taken[chosen.back()] = true;
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

Matrix Gram(const Matrix& a) {
  Matrix gram(a.cols, a.cols);
  for (int q = 0; q < a.rows; ++q)
    for (int i = 0; i < a.cols; ++i)
      for (int j = 0; j < a.cols; ++j) gram(i, j) += a(q, i) * a(q, j);
  return gram;
}

double LargestEigenvalue(const Matrix& gram) {
  // The matrix has no negative element, so its leading eigenvector has none either and `ones` is never
  // orthogonal to it.
  std::vector<double> x(gram.rows, 1.0), y(gram.rows);
  double value = 0;
  for (int iteration = 0; iteration < 1000; ++iteration) {
    double norm = 0;
    for (int i = 0; i < gram.rows; ++i) {
      y[i] = 0;
      for (int j = 0; j < gram.cols; ++j) y[i] += gram(i, j) * x[j];
      norm += y[i] * y[i];
    }
    norm = std::sqrt(norm);
    if (norm <= 0 || !std::isfinite(norm)) return norm;
    for (int i = 0; i < gram.rows; ++i) x[i] = y[i] / norm;
    if (std::abs(norm - value) <= 1e-14 * norm) break;
    value = norm;
  }
  return value;
}

// min_{w >= 0} |a w - 1|² by accelerated projected gradient (FISTA), from a uniform start.
std::vector<double> FitMass(const Matrix& a) {
  const Matrix gram = Gram(a);
  const int r = a.cols;
  std::vector<double> rhs(r), w(r), y(r), next(r);
  for (int q = 0; q < a.rows; ++q)
    for (int i = 0; i < r; ++i) rhs[i] += a(q, i);
  const double total = std::accumulate(rhs.begin(), rhs.end(), 0.0);
  std::fill(w.begin(), w.end(), a.rows / std::max(total, 1e-9));
  y = w;
  const double step = 1.0 / std::max(LargestEigenvalue(gram), 1e-12);
  double t = 1;
  for (int iteration = 0; iteration < kPrincipalMassIterations; ++iteration) {
    const double t_next = (1 + std::sqrt(1 + 4 * t * t)) / 2;
    for (int i = 0; i < r; ++i) {
      double gradient = -rhs[i];
      for (int j = 0; j < r; ++j) gradient += gram(i, j) * y[j];
      next[i] = std::max(y[i] - gradient * step, 0.0);
    }
    for (int i = 0; i < r; ++i) {
      y[i] = next[i] + (t - 1) / t_next * (next[i] - w[i]);
      w[i] = next[i];
    }
    t = t_next;
  }
  for (double& x : w) x = std::max<double>(x, kLeastPrincipalMass);
  return w;
}

// Solves gram x = rhs in place (rhs [r, d]) by Cholesky; false when gram is not positive definite.
bool SolvePositive(Matrix gram, Matrix& rhs) {
  const int r = gram.rows;
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = gram(i, j);
      for (int k = 0; k < j; ++k) sum -= gram(i, k) * gram(j, k);
      if (i != j) {
        gram(i, j) = sum / gram(j, j);
      } else if (sum > 0) {
        gram(i, i) = std::sqrt(sum);
      } else {
        return false;
      }
    }
  }
  for (int c = 0; c < rhs.cols; ++c) {
    for (int i = 0; i < r; ++i) {
      for (int k = 0; k < i; ++k) rhs(i, c) -= gram(i, k) * rhs(k, c);
      rhs(i, c) /= gram(i, i);
    }
    for (int i = r - 1; i >= 0; --i) {
      for (int k = i + 1; k < r; ++k) rhs(i, c) -= gram(k, i) * rhs(k, c);
      rhs(i, c) /= gram(i, i);
    }
  }
  return true;
}

void Keep(const PrincipalFitProblem& p, const std::vector<int>& chosen, double log_scale, PrincipalFit* fit) {
  for (size_t j = 0; j < chosen.size(); ++j) {
    const int i = chosen[j];
    std::copy_n(p.keys + i * p.d, p.d, fit->keys + j * p.d);
    std::copy_n(p.values + i * p.d, p.d, fit->values + j * p.d);
    fit->log_mass[j] = static_cast<float>((p.log_mass ? p.log_mass[i] : 0.0) + log_scale);
    fit->chosen[j] = i;
  }
  fit->fitted = false;
}

}  // namespace

void ReferenceFitPrincipal(const PrincipalFitProblem& p, PrincipalFit* fit) {
  assert(p.forced <= p.count);
  fit->mass_residual = fit->output_residual = 0;
  if (p.count >= p.n) {
    std::vector<int> all(p.n);
    std::iota(all.begin(), all.end(), 0);
    return Keep(p, all, 0.0, fit);
  }
  const Matrix a = ReferenceAttention(p);
  const std::vector<int> chosen = ChoosePrincipal(a, p.count, p.forced);
  // Degenerate input ends here: the same keys, each standing for n/r entries.
  Keep(p, chosen, std::log(static_cast<double>(p.n) / p.count), fit);

  const int r = p.count;
  Matrix part(p.m, r);
  for (int q = 0; q < p.m; ++q)
    for (int j = 0; j < r; ++j) part(q, j) = a(q, chosen[j]);
  const std::vector<double> mass = FitMass(part);

  Matrix share = part;
  double mass_error = 0;
  for (int q = 0; q < p.m; ++q) {
    double sum = 0;
    for (int j = 0; j < r; ++j) sum += share(q, j) *= mass[j];
    mass_error += (sum - 1) * (sum - 1);
    for (int j = 0; j < r; ++j) share(q, j) /= std::max(sum, 1e-9);
  }
  Matrix gram = Gram(share);
  double trace = 0;
  for (int j = 0; j < r; ++j) trace += gram(j, j);
  for (int j = 0; j < r; ++j) gram(j, j) += kPrincipalRidge * trace / r;

  Matrix target(p.m, p.d), residual(p.m, p.d), shift(r, p.d);
  for (int q = 0; q < p.m; ++q)
    for (int c = 0; c < p.d; ++c) {
      for (int i = 0; i < p.n; ++i) target(q, c) += a(q, i) * p.values[i * p.d + c];
      residual(q, c) = target(q, c);
      for (int j = 0; j < r; ++j) residual(q, c) -= share(q, j) * p.values[chosen[j] * p.d + c];
      for (int j = 0; j < r; ++j) shift(j, c) += share(q, j) * residual(q, c);
    }
  if (!SolvePositive(gram, shift)) return;
  for (double x : shift.data)
    if (!std::isfinite(x)) return;

  double output_error = 0, output_norm = 0;
  for (int q = 0; q < p.m; ++q)
    for (int c = 0; c < p.d; ++c) {
      double error = residual(q, c);
      for (int j = 0; j < r; ++j) error -= share(q, j) * shift(j, c);
      output_error += error * error;
      output_norm += target(q, c) * target(q, c);
    }
  for (int j = 0; j < r; ++j) {
    const int i = chosen[j];
    for (int c = 0; c < p.d; ++c)
      fit->values[j * p.d + c] = static_cast<float>(p.values[i * p.d + c] + shift(j, c));
    fit->log_mass[j] = static_cast<float>((p.log_mass ? p.log_mass[i] : 0.0) + std::log(mass[j]));
  }
  fit->mass_residual = static_cast<float>(std::sqrt(mass_error / p.m));
  fit->output_residual = static_cast<float>(std::sqrt(output_error / std::max(output_norm, 1e-30)));
  fit->fitted = true;
}

}  // namespace atp
