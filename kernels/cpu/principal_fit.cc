#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/principal_fit.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h:
#include <algorithm>
#include <cassert>
#include <cmath>
#include <type_traits>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"
#include "kernels/cpu/principal_fit.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kPad = PrincipalFitRoom::kPad;
// A column that is left with this little of its own norm² is spanned: the rest is rounding of its Gram
// matrix.
constexpr double kGramNoise = 0x1p-21;

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;
using D64 = hn::ScalableTag<double>;
using V64 = hn::Vec<D64>;
using DHalf = hn::Rebind<float, D64>;

// Rows of a register tile of Product: twice as many vectors of sums as rows.
#if HWY_TARGET <= HWY_AVX3
constexpr int kTile = 8;
#else
constexpr int kTile = 4;
#endif

// out[a][c] += Σ_b row(a)[b · step] · x[b][c] for a < rows, b < inner, c < cols (a multiple of kPad). Sums of
// kChunk products at a time, which keeps x in the first-level cache and rounding errors short. triangle: of a
// symmetric product only the elements on the diagonal and behind it are wanted.
template <class Row>
HWY_INLINE void Product(const Row& row, size_t step, const float* HWY_RESTRICT x, size_t x_stride, int rows,
                        int inner, size_t cols, float* HWY_RESTRICT out, size_t out_stride,
                        bool triangle = false) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  constexpr int kChunk = 32;
  for (int b0 = 0; b0 < inner; b0 += kChunk) {
    const size_t chunk = static_cast<size_t>(std::min(kChunk, inner - b0));
    for (int a0 = 0; a0 < rows; a0 += kTile) {
      const int tile = std::min(kTile, rows - a0);
      const float* factor[kTile];
      for (int a = 0; a < kTile; ++a) factor[a] = row(a0 + std::min(a, tile - 1)) + b0 * step;
      for (size_t c = triangle ? a0 / kPad * kPad : 0; c < cols; c += 2 * lanes) {
        V sum[kTile][2];
        ATP_UNROLL
        for (int a = 0; a < kTile; ++a) sum[a][0] = sum[a][1] = hn::Zero(d);
        const float* HWY_RESTRICT in = x + b0 * x_stride + c;
        for (size_t b = 0; b < chunk; ++b, in += x_stride) {
          const V x0 = hn::Load(d, in), x1 = hn::Load(d, in + lanes);
          ATP_UNROLL
          for (int a = 0; a < kTile; ++a) {
            const V f = hn::Set(d, factor[a][b * step]);
            sum[a][0] = hn::MulAdd(f, x0, sum[a][0]);
            sum[a][1] = hn::MulAdd(f, x1, sum[a][1]);
          }
        }
        ATP_UNROLL
        for (int a = 0; a < kTile; ++a) {
          if (a >= tile) break;
          float* to = out + (a0 + a) * out_stride + c;
          hn::Store(hn::Add(hn::Load(d, to), sum[a][0]), d, to);
          hn::Store(hn::Add(hn::Load(d, to + lanes), sum[a][1]), d, to + lanes);
        }
      }
    }
  }
}

// x[0..size) *= factor of 1 / Σ x; the sum.
HWY_INLINE float Normalize(float* HWY_RESTRICT x, size_t size, float least) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V sum = hn::Zero(d);
  for (size_t i = 0; i < size; i += lanes) sum = hn::Add(sum, hn::Load(d, x + i));
  const float total = hn::GetLane(hn::SumOfLanes(d, sum));
  const V scale = hn::Set(d, 1.0f / std::max(total, least));
  for (size_t i = 0; i < size; i += lanes) hn::Store(hn::Mul(hn::Load(d, x + i), scale), d, x + i);
  return total;
}

// x := exp(x - max x)
HWY_INLINE void Exponentials(float* HWY_RESTRICT x, size_t size) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V top = hn::Load(d, x);
  for (size_t i = lanes; i < size; i += lanes) top = hn::Max(top, hn::Load(d, x + i));
  top = hn::MaxOfLanes(d, top);
  for (size_t i = 0; i < size; i += lanes) hn::Store(hn::Exp(d, hn::Sub(hn::Load(d, x + i), top)), d, x + i);
}

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

// Columns of the Gram matrix AᵀA, computed when they are asked for, a tile of them at a time.
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
    Compute(wanted, count);
  }

 private:
  const PrincipalFitProblem& p_;
  const PrincipalFitRoom& room_;
  int columns_ = 0;
};

// One step of the Cholesky factorisation of the Gram matrix: row `step` of the factor, and what is left of
// every column that is not a pivot (those have rest < 0).
void Eliminate(const PrincipalFitRoom& room, const float* HWY_RESTRICT column, int pivot, int step,
               double best) {
  const D64 d;
  const DHalf half;
  const size_t n = room.padded_n, lanes = hn::Lanes(d);
  const V64 scale = hn::Set(d, 1 / std::sqrt(best)), zero = hn::Zero(d);
  constexpr int kVectors = 4;
  for (size_t i = 0; i < n; i += kVectors * lanes) {
    V64 g[kVectors];
    ATP_UNROLL
    for (int v = 0; v < kVectors; ++v) g[v] = hn::PromoteTo(d, hn::Load(half, column + i + v * lanes));
    const double* HWY_RESTRICT row = room.factor + i;
    for (int k = 0; k < step; ++k, row += n) {
      const V64 f = hn::Set(d, room.factor[k * n + pivot]);
      ATP_UNROLL
      for (int v = 0; v < kVectors; ++v) g[v] = hn::NegMulAdd(f, hn::Load(d, row + v * lanes), g[v]);
    }
    ATP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const size_t at = i + v * lanes;
      const V64 l = hn::Mul(g[v], scale), rest = hn::Load(d, room.rest + at);
      V64 left = hn::NegMulAdd(l, l, rest);
      // What is less than the rounding of the column's norm is nothing.
      left = hn::IfThenElseZero(hn::Gt(left, hn::Mul(hn::Set(d, kGramNoise), hn::Load(d, room.norms + at))),
                                left);
      hn::Store(hn::IfThenElse(hn::Lt(rest, zero), rest, left), d, room.rest + at);
      hn::Store(l, d, room.factor + step * n + at);
    }
  }
}

// Pivoted Cholesky of the Gram matrix: the same pivots as column-pivoted QR of A.
void ChoosePrincipal(const PrincipalFitProblem& p, const PrincipalFitRoom& room, GramColumns* gram,
                     int32_t* chosen) {
  const double* norms = room.norms;
  double* rest = room.rest;
  std::copy_n(norms, room.padded_n, rest);
  const double noise = kPrincipalNoise * *std::max_element(norms, norms + p.n);
  int found = 0;
  while (found < p.forced) chosen[found] = found, ++found;
  for (int step = 0; found < p.count; ++step) {
    const int pivot = static_cast<int>(std::max_element(rest, rest + p.n) - rest);
    const double best = rest[pivot];
    if (!(best > noise)) break;
    if (pivot >= p.forced) chosen[found++] = pivot;
    if (found == p.count) break;
    if (!gram->Has(pivot)) gram->ComputeFor(pivot);
    rest[pivot] = -1;
    Eliminate(room, (*gram)[pivot], pivot, step, best);
  }
  const auto free = [&](int i) {
    return i >= p.forced && std::find(chosen, chosen + found, i) == chosen + found;
  };
  while (found < p.count) {
    int next = -1;
    for (int i = p.forced; i < p.n; ++i)
      if ((next < 0 || norms[i] > norms[next]) && free(i)) next = i;
    chosen[found++] = next;
  }
  std::sort(chosen, chosen + p.count);
}

// y := matrix x, for a symmetric matrix [r, stride]; x and y are padded.
HWY_INLINE void Multiply(const float* HWY_RESTRICT matrix, const float* HWY_RESTRICT x, int r, size_t stride,
                         float* HWY_RESTRICT y) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  for (size_t c = 0; c < stride; c += 2 * lanes) {
    V sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
    const float* row = matrix + c;
    int j = 0;
    for (; j + 1 < r; j += 2, row += 2 * stride) {
      const V f0 = hn::Set(d, x[j]), f1 = hn::Set(d, x[j + 1]);
      sum[0] = hn::MulAdd(f0, hn::Load(d, row), sum[0]);
      sum[1] = hn::MulAdd(f0, hn::Load(d, row + lanes), sum[1]);
      sum[2] = hn::MulAdd(f1, hn::Load(d, row + stride), sum[2]);
      sum[3] = hn::MulAdd(f1, hn::Load(d, row + stride + lanes), sum[3]);
    }
    if (j < r) {
      const V f0 = hn::Set(d, x[j]);
      sum[0] = hn::MulAdd(f0, hn::Load(d, row), sum[0]);
      sum[1] = hn::MulAdd(f0, hn::Load(d, row + lanes), sum[1]);
    }
    hn::Store(hn::Add(sum[0], sum[2]), d, y + c);
    hn::Store(hn::Add(sum[1], sum[3]), d, y + c + lanes);
  }
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

// to[j] -= factor · from[j], j in [begin, size); both rows are aligned and may be read from begin's vector
// on.
HWY_INLINE void Subtract(double* HWY_RESTRICT to, double factor, const double* HWY_RESTRICT from,
                         size_t begin, size_t size) {
  const D64 d;
  const V64 f = hn::Set(d, factor);
  for (size_t j = begin / hn::Lanes(d) * hn::Lanes(d); j < size; j += hn::Lanes(d))
    hn::Store(hn::NegMulAdd(f, hn::Load(d, from + j), hn::Load(d, to + j)), d, to + j);
}

// x [r, width] := matrix⁻¹ x by Cholesky of the upper triangle in place; false when the matrix [r, stride] is
// not positive definite.
bool SolvePositive(double* HWY_RESTRICT matrix, int r, size_t stride, double* HWY_RESTRICT x, size_t width) {
  for (int k = 0; k < r; ++k) {
    double* row = matrix + k * stride;
    if (!(row[k] > 0)) return false;
    const double scale = 1 / std::sqrt(row[k]);
    for (int j = k; j < r; ++j) row[j] *= scale;
    for (int i = k + 1; i < r; ++i) Subtract(matrix + i * stride, row[i], row, i, stride);
  }
  for (int i = 0; i < r; ++i) {
    double* row = x + i * width;
    for (int k = 0; k < i; ++k) Subtract(row, matrix[k * stride + i], x + k * width, 0, width);
    for (size_t c = 0; c < width; ++c) row[c] /= matrix[i * stride + i];
  }
  for (int i = r - 1; i >= 0; --i) {
    double* row = x + i * width;
    for (int k = i + 1; k < r; ++k) Subtract(row, matrix[i * stride + k], x + k * width, 0, width);
    for (size_t c = 0; c < width; ++c) row[c] /= matrix[i * stride + i];
  }
  return true;
}

double SumOfProducts(const float* x, const float* y, size_t size) {
  const D d;
  double total = 0;
  constexpr size_t kRun = 2048;
  for (size_t begin = 0; begin < size; begin += kRun) {
    V sum = hn::Zero(d);
    for (size_t i = begin; i < std::min(begin + kRun, size); i += hn::Lanes(d))
      sum = hn::MulAdd(hn::Load(d, x + i), hn::Load(d, y + i), sum);
    total += double{hn::GetLane(hn::SumOfLanes(d, sum))};
  }
  return total;
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
  for (size_t i = 0; i < r * stride; ++i) room.system[i] = room.gram[i];
  for (int j = 0; j < r; ++j) room.system[j * stride + j] += kPrincipalRidge * trace / r;
  for (size_t i = 0; i < r * width; ++i) room.shift[i] = double{target[i]} - kept[i];
  if (!SolvePositive(room.system, r, stride, room.shift, width)) return false;
  if (!std::all_of(room.shift, room.shift + r * width, [](double x) { return std::isfinite(x); }))
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
  take(&factor, std::min<size_t>(n, 2 * r), padded_n);
  for (double** row : {&sums, &norms, &rest}) take(row, 1, padded_n);
  take(&system, r, padded_r), take(&shift, r, padded_d);
  take(&keys, d, padded_n), take(&bias, 1, padded_n);
  take(&attention, m, padded_n), take(&columns, n, padded_n);
  take(&values, n, padded_d), take(&output, m, padded_d);
  take(&share, m, padded_r), take(&gram, r, padded_r);
  take(&mass, 1, padded_r), take(&vectors, 4, padded_r);
  take(&products, 2 * r, padded_d), take(&fitted, r, padded_d);
  take(&column_of, 1, n);
}

size_t PrincipalFitScratch(int n, int m, int d, int count) {
  return PrincipalFitRoom(n, m, d, count, nullptr).floats;
}

HWY_EXPORT(FitPrincipal);
PrincipalFitFn PrincipalFitFor(int64_t target) { return ATP_FUNCTION_FOR(target, FitPrincipal); }

}  // namespace atp::cpu
#endif
