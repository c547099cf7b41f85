#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/principal_fit.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h:
#include <algorithm>
#include <cassert>
#include <cmath>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/dense-inl.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/principal_fit.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A column that is left with this little of its own norm² is spanned: the rest is rounding of its Gram
// matrix.
constexpr double kGramNoise = 0x1p-21;
static_assert(kPad == PrincipalFitRoom::kPad);

// Adds the rows of x, and their squares, to sums and norms.
HWY_INLINE void AddMoments(const float* HWY_RESTRICT x, int rows, size_t size, double* HWY_RESTRICT sums,
                           double* HWY_RESTRICT norms) {
  const D64 d;
  const DHalf half;
  for (size_t i = 0; i < size; i += hn::Lanes(d)) {
    auto sum = hn::Zero(half), norm = hn::Zero(half);
    for (int q = 0; q < rows; ++q) {
      const auto v = hn::Load(half, x + q * size + i);
      sum = hn::Add(sum, v);
      norm = hn::MulAdd(v, v, norm);
    }
    hn::Store(hn::Add(hn::Load(d, sums + i), hn::PromoteTo(d, sum)), d, sums + i);
    hn::Store(hn::Add(hn::Load(d, norms + i), hn::PromoteTo(d, norm)), d, norms + i);
  }
}

// Reference attention a[q][i], softmax over the entries i of each query's scores, and over its columns their
// sums and norms². Padded entries get 0.
void ReferenceAttention(const PrincipalFitProblem& p, const PrincipalFitRoom& room) {
  const size_t n = room.padded_n;
  for (int c = 0; c < p.d; ++c) {
    float* row = room.keys + c * n;
    for (int i = 0; i < p.n; ++i) row[i] = p.keys[static_cast<size_t>(i) * p.d + c];
    std::fill(row + p.n, row + n, 0.0f);
  }
  for (int i = 0; i < p.n; ++i) room.bias[i] = p.log_mass ? p.log_mass[i] : 0.0f;
  std::fill(room.bias + p.n, room.bias + n, -HUGE_VALF);
  std::fill_n(room.sums, n, 0.0);
  std::fill_n(room.norms, n, 0.0);
  constexpr int kRows = 2 * kTile;
  for (int q0 = 0; q0 < p.m; q0 += kRows) {
    const int rows = std::min(kRows, p.m - q0);
    float* a = room.attention + q0 * n;
    for (int q = 0; q < rows; ++q) std::copy_n(room.bias, n, a + q * n);
    const float* queries = p.queries + static_cast<size_t>(q0) * p.d;
    Product([&](int q) { return queries + static_cast<size_t>(q) * p.d; }, 1, room.keys, n, rows, p.d, n, a,
            n);
    for (int q = 0; q < rows; ++q) {
      Exponentials(a + q * n, n);
      Normalize(a + q * n, n, 1.0f);
    }
    AddMoments(a, rows, n, room.sums, room.norms);
  }
}

// Columns of the Gram matrix AᵀA, computed when they are asked for, a tile of them at a time; and its pivoted
// Cholesky factor, of which a tile's columns are reduced together by the steps that there are then.
class GramColumns {
 public:
  GramColumns(const PrincipalFitProblem& p, const PrincipalFitRoom& room) : p_(p), room_(room) {
    std::fill_n(room.column_of, p.n, -1);
  }
  bool Has(int i) const { return room_.column_of[i] >= 0; }
  const float* operator[](int i) const { return room_.columns + room_.column_of[i] * room_.padded_n; }

  // count <= kTile columns that are not there yet.
  void Compute(const int* wanted, int count) {
    const size_t n = room_.padded_n;
    float* out = room_.columns + static_cast<size_t>(columns_) * n;
    std::fill_n(out, count * n, 0.0f);
    Product([&](int k) { return room_.attention + wanted[k]; }, n, room_.attention, n, count, p_.m, n, out,
            n);
    for (int k = 0; k < count; ++k) room_.column_of[wanted[k]] = columns_++;
  }

  // The next step of the factorisation.
  void Eliminate(int pivot) {
    if (!Has(pivot)) ComputeFor(pivot);
    const double best = room_.rest[pivot];
    room_.rest[pivot] = -1;
    Reduce(pivot, best);
    ++steps_;
  }

 private:
  // The column of the next pivot, and with it those that are likely to be asked for next: what is left of
  // them is the most.
  void ComputeFor(int pivot) {
    int wanted[kTile] = {pivot};
    int count = 1;
    for (int i = 0; i < p_.n; ++i) {
      if (i == pivot || Has(i) || !(room_.rest[i] > 0)) continue;
      if (count == kTile && !(room_.rest[i] > room_.rest[wanted[kTile - 1]])) continue;
      int at = count < kTile ? count++ : kTile - 1;
      for (; at > 1 && room_.rest[i] > room_.rest[wanted[at - 1]]; --at) wanted[at] = wanted[at - 1];
      wanted[at] = i;
    }
    const size_t n = room_.padded_n, first = static_cast<size_t>(columns_) * n;
    Compute(wanted, count);
    float* reduced = room_.reduced + first;
    std::fill_n(reduced, count * n, 0.0f);
    Product([&](int k) { return room_.factor + wanted[k]; }, n, room_.factor, n, count, steps_, n, reduced,
            n);
    for (size_t i = 0; i < count * n; ++i) reduced[i] = room_.columns[first + i] - reduced[i];
    for (int k = 0; k < count; ++k) room_.reduced_by[room_.column_of[wanted[k]]] = steps_;
  }

  // A row of the factor, and what it leaves of every column that is not a pivot (those have rest < 0).
  void Reduce(int pivot, double best) {
    const D d;
    const D64 d64;
    const DHalf half;
    const size_t n = room_.padded_n, lanes = hn::Lanes(d);
    const int column = room_.column_of[pivot];
    const float* HWY_RESTRICT reduced = room_.reduced + column * n;
    float* HWY_RESTRICT out = room_.factor + steps_ * n;
    const V scale = hn::Set(d, static_cast<float>(1 / std::sqrt(best)));
    for (size_t i = 0; i < n; i += 2 * lanes) {
      V g0 = hn::Load(d, reduced + i), g1 = hn::Load(d, reduced + i + lanes);
      for (int k = room_.reduced_by[column]; k < steps_; ++k) {
        const float* row = room_.factor + k * n;
        const V f = hn::Set(d, row[pivot]);
        g0 = hn::NegMulAdd(f, hn::Load(d, row + i), g0);
        g1 = hn::NegMulAdd(f, hn::Load(d, row + i + lanes), g1);
      }
      hn::Store(hn::Mul(g0, scale), d, out + i);
      hn::Store(hn::Mul(g1, scale), d, out + i + lanes);
    }
    const V64 noise = hn::Set(d64, kGramNoise), zero = hn::Zero(d64);
    for (size_t i = 0; i < n; i += hn::Lanes(d64)) {
      const V64 l = hn::PromoteTo(d64, hn::Load(half, out + i)), rest = hn::Load(d64, room_.rest + i);
      // What is less than the rounding of the column's norm is nothing.
      V64 left = hn::NegMulAdd(l, l, rest);
      left = hn::IfThenElseZero(hn::Gt(left, hn::Mul(noise, hn::Load(d64, room_.norms + i))), left);
      hn::Store(hn::IfThenElse(hn::Lt(rest, zero), rest, left), d64, room_.rest + i);
    }
  }

  const PrincipalFitProblem& p_;
  const PrincipalFitRoom& room_;
  int columns_ = 0;
  int steps_ = 0;
};

// Pivoted Cholesky of the Gram matrix: the same pivots as column-pivoted QR of A.
void ChoosePrincipal(const PrincipalFitProblem& p, const PrincipalFitRoom& room, GramColumns* gram,
                     int32_t* chosen) {
  const double* norms = room.norms;
  double* rest = room.rest;
  std::copy_n(norms, room.padded_n, rest);
  const double noise = kPrincipalNoise * *std::max_element(norms, norms + p.n);
  int found = 0;
  while (found < p.forced) chosen[found] = found, ++found;
  while (found < p.count) {
    const int pivot = static_cast<int>(std::max_element(rest, rest + p.n) - rest);
    if (!(rest[pivot] > noise)) break;
    if (pivot >= p.forced) chosen[found++] = pivot;
    if (found == p.count) break;
    gram->Eliminate(pivot);
  }
  while (found < p.count) {
    int next = -1;
    for (int i = p.forced; i < p.n; ++i)
      if (!(rest[i] < 0) && (next < 0 || norms[i] > norms[next])) next = i;
    rest[next] = -1;
    chosen[found++] = next;
  }
  std::sort(chosen, chosen + p.count);
}

// The leading eigenvector of a matrix without negative elements has none either: `ones` is never orthogonal
// to it.
float LargestEigenvalue(const float* gram, int r, size_t stride, float* x, float* y) {
  std::fill_n(x, stride, 0.0f);
  std::fill_n(x, r, 1.0f);
  float value = 0;
  for (int iteration = 0; iteration < 100; ++iteration) {
    Multiply(gram, x, r, stride, y);
    double square = 0;
    for (int i = 0; i < r; ++i) square += double{y[i]} * y[i];
    const float norm = static_cast<float>(std::sqrt(square));
    if (!(norm > 0) || !std::isfinite(norm)) return norm;
    for (int i = 0; i < r; ++i) x[i] = y[i] / norm;
    if (std::abs(norm - value) <= 1e-6f * norm) return norm;
    value = norm;
  }
  return value;
}

// min_{w >= 0} |A_J w - 1|² by accelerated projected gradient (FISTA) from a uniform start.
void FitMass(const PrincipalFitProblem& p, const PrincipalFitRoom& room, GramColumns* gram,
             const int32_t* chosen) {
  const int r = p.count;
  const size_t stride = room.padded_r;
  int missing[kTile];
  int count = 0;
  for (int j = 0; j < r; ++j) {
    if (!gram->Has(chosen[j])) missing[count++] = chosen[j];
    if (count == kTile || (j == r - 1 && count > 0)) gram->Compute(missing, count), count = 0;
  }
  float *w = room.mass, *rhs = room.vectors, *y = rhs + stride, *product = y + stride,
        *spare = product + stride;
  std::fill_n(room.gram, r * stride, 0.0f);
  for (float* v : {w, rhs, y}) std::fill_n(v, stride, 0.0f);
  double total = 0;
  for (int j = 0; j < r; ++j) {
    const float* column = (*gram)[chosen[j]];
    for (int k = 0; k < r; ++k) room.gram[j * stride + k] = column[chosen[k]];
    rhs[j] = static_cast<float>(room.sums[chosen[j]]);
    total += room.sums[chosen[j]];
  }
  const float step = 1.0f / std::max(LargestEigenvalue(room.gram, r, stride, spare, product), 1e-12f);
  std::fill_n(w, r, static_cast<float>(p.m / std::max(total, 1e-9)));
  std::copy_n(w, r, y);
  double t = 1;
  for (int iteration = 0; iteration < kPrincipalMassIterations; ++iteration) {
    const double t_next = (1 + std::sqrt(1 + 4 * t * t)) / 2;
    const D d;
    const V momentum = hn::Set(d, static_cast<float>((t - 1) / t_next)), size = hn::Set(d, step);
    Multiply(room.gram, y, r, stride, product);
    for (size_t i = 0; i < stride; i += hn::Lanes(d)) {
      const V slope = hn::Sub(hn::Load(d, product + i), hn::Load(d, rhs + i));
      const V next = hn::Max(hn::NegMulAdd(slope, size, hn::Load(d, y + i)), hn::Zero(d));
      hn::Store(hn::MulAdd(momentum, hn::Sub(next, hn::Load(d, w + i)), next), d, y + i);
      hn::Store(next, d, w + i);
    }
    t = t_next;
  }
  for (int j = 0; j < r; ++j) w[j] = std::max(w[j], kLeastPrincipalMass);
}

// share := rownorm(A_J diag w); the mean square of A_J w - 1.
double Shares(const PrincipalFitProblem& p, const PrincipalFitRoom& room, const int32_t* chosen) {
  const D d;
  double error = 0;
  for (int q = 0; q < p.m; ++q) {
    const float* a = room.attention + q * room.padded_n;
    float* share = room.share + q * room.padded_r;
    for (int j = 0; j < p.count; ++j) share[j] = a[chosen[j]];
    std::fill(share + p.count, share + room.padded_r, 0.0f);
    for (size_t j = 0; j < room.padded_r; j += hn::Lanes(d))
      hn::Store(hn::Mul(hn::Load(d, share + j), hn::Load(d, room.mass + j)), d, share + j);
    const double miss = double{Normalize(share, room.padded_r, 1e-9f)} - 1;
    error += miss * miss;
  }
  return error / p.m;
}

// The fitted values, in room.fitted [r, padded_d]: ridge regression of the output A V on the shares. False
// when there is no finite answer. |A V - P C|² / |A V|² comes from the normal equations.
bool FitValues(const PrincipalFitProblem& p, const PrincipalFitRoom& room, const int32_t* chosen,
               double* error) {
  const int r = p.count;
  const size_t width = room.padded_d, stride = room.padded_r;
  for (int i = 0; i < p.n; ++i) {
    float* row = room.values + i * width;
    std::copy_n(p.values + static_cast<size_t>(i) * p.d, p.d, row);
    std::fill(row + p.d, row + width, 0.0f);
  }
  for (int j = 0; j < r; ++j) std::copy_n(room.values + chosen[j] * width, width, room.fitted + j * width);
  std::fill_n(room.output, p.m * width, 0.0f);
  Product([&](int q) { return room.attention + q * room.padded_n; }, 1, room.values, width, p.m, p.n, width,
          room.output, width);
  // PᵀP, PᵀA V and PᵀP V_J.
  float *target = room.products, *kept = target + r * width;
  std::fill_n(room.gram, r * stride, 0.0f);
  std::fill_n(target, 2 * r * width, 0.0f);
  const auto column = [&](int j) { return room.share + j; };
  const auto row = [&](int j) { return room.gram + j * stride; };
  Product(column, stride, room.share, stride, r, p.m, stride, room.gram, stride, /*triangle=*/true);
  for (int j = 0; j < r; ++j)
    for (int k = 0; k < j; ++k) room.gram[j * stride + k] = room.gram[k * stride + j];
  Product(column, stride, room.output, width, r, p.m, width, target, width);
  Product(row, 1, room.fitted, width, r, r, width, kept, width);

  double trace = 0;
  for (int j = 0; j < r; ++j) trace += room.gram[j * stride + j];
  const float ridge = static_cast<float>(kPrincipalRidge * trace / r);
  std::copy_n(room.gram, r * stride, room.system);
  for (int j = 0; j < r; ++j) room.system[j * stride + j] += ridge;
  for (size_t i = 0; i < r * width; ++i) room.shift[i] = target[i] - kept[i];
  if (!Factorize(room.system, r, stride)) return false;
  Solve(room.system, r, stride, room.shift, width);
  if (!std::all_of(room.shift, room.shift + r * width, [](float x) { return std::isfinite(x); }))
    return false;

  for (size_t i = 0; i < r * width; ++i) room.fitted[i] = static_cast<float>(room.fitted[i] + room.shift[i]);
  std::fill_n(kept, r * width, 0.0f);
  Product(row, 1, room.fitted, width, r, r, width, kept, width);
  const double whole = SumOfProducts(room.output, room.output, p.m * width);
  const double left =
      whole - 2 * SumOfProducts(target, room.fitted, r * width) + SumOfProducts(kept, room.fitted, r * width);
  *error = std::max(left, 0.0) / std::max(whole, 1e-30);
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

void FitPrincipal(const PrincipalFitProblem& p, float* scratch, PrincipalFit* fit) {
  assert(p.forced <= p.count);
  fit->mass_residual = fit->output_residual = 0;
  fit->fitted = false;
  if (p.count >= p.n) {
    for (int i = 0; i < p.n; ++i) fit->chosen[i] = i;
    return Keep(p, p.n, 0.0, fit);
  }
  const int r = p.count;
  const PrincipalFitRoom room(p.n, p.m, p.d, r, scratch);
  ReferenceAttention(p, room);
  GramColumns gram(p, room);
  ChoosePrincipal(p, room, &gram, fit->chosen);
  // Degenerate input ends here: the same keys, each standing for n/r entries.
  Keep(p, r, std::log(static_cast<double>(p.n) / r), fit);
  FitMass(p, room, &gram, fit->chosen);
  const double mass_error = Shares(p, room, fit->chosen);
  double output_error;
  if (!FitValues(p, room, fit->chosen, &output_error)) return;
  for (int j = 0; j < r; ++j) {
    const int i = fit->chosen[j];
    std::copy_n(room.fitted + j * room.padded_d, p.d, fit->values + j * p.d);
    fit->log_mass[j] = (p.log_mass ? p.log_mass[i] : 0.0f) + std::log(room.mass[j]);
  }
  fit->mass_residual = static_cast<float>(std::sqrt(mass_error));
  fit->output_residual = static_cast<float>(std::sqrt(output_error));
  fit->fitted = true;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {

PrincipalFitRoom::PrincipalFitRoom(int n, int m, int d, int count, float* scratch) : floats(0) {
  const auto pad = [](int size) { return hwy::RoundUpTo(static_cast<size_t>(size), kPad); };
  padded_n = pad(n), padded_d = pad(d), padded_r = pad(count);
  const auto take = [&](auto** matrix, size_t rows, size_t cols) {
    using T = std::remove_reference_t<decltype(**matrix)>;
    *matrix = scratch == nullptr ? nullptr : reinterpret_cast<T*>(scratch + floats);
    floats += hwy::RoundUpTo(rows * cols * (sizeof(T) / sizeof(float)), kPad);
  };
  const size_t r = static_cast<size_t>(count);
  for (double** row : {&sums, &norms, &rest}) take(row, 1, padded_n);
  take(&system, r, padded_r), take(&shift, r, padded_d);
  take(&keys, d, padded_n), take(&bias, 1, padded_n);
  take(&attention, m, padded_n), take(&columns, n, padded_n);
  take(&reduced, n, padded_n), take(&factor, std::min<size_t>(n, 2 * r), padded_n);
  take(&values, n, padded_d), take(&output, m, padded_d);
  take(&share, m, padded_r), take(&gram, r, padded_r);
  take(&mass, 1, padded_r), take(&vectors, 4, padded_r);
  take(&products, 2 * r, padded_d), take(&fitted, r, padded_d);
  take(&column_of, 1, n), take(&reduced_by, 1, n);
}

size_t PrincipalFitScratch(int n, int m, int d, int count) {
  return PrincipalFitRoom(n, m, d, count, nullptr).floats;
}

HWY_EXPORT(FitPrincipal);
PrincipalFitFn PrincipalFitFor(int64_t target) { return ATP_FUNCTION_FOR(target, FitPrincipal); }

}  // namespace atp::cpu
#endif
