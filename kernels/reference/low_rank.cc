#include "kernels/reference/low_rank.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/low_rank.h"

namespace atp {
namespace {

using Vector = std::vector<double>;

double Dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Columns, one vector each: Gram-Schmidt, twice, so that they are orthogonal to rounding (kLowRankLeft).
void Orthonormalize(std::vector<Vector>& columns) {
  for (size_t j = 0; j < columns.size(); ++j) {
    double left[2];  // by each pass
    for (double& norm : left) {
      for (size_t k = 0; k < j; ++k) {
        const double part = Dot(columns[j], columns[k]);
        for (size_t i = 0; i < columns[j].size(); ++i) columns[j][i] -= part * columns[k][i];
      }
      norm = std::sqrt(Dot(columns[j], columns[j]));
    }
    const double scale = left[1] > kLowRankLeft * left[0] ? 1 / left[1] : 0;
    for (double& x : columns[j]) x *= scale;
  }
}

}  // namespace

void ReferenceLowRankInput(const LowRankInputArgs& args) {
  const size_t rows = static_cast<size_t>(args.rows), dim = static_cast<size_t>(args.dim),
               rank = static_cast<size_t>(args.rank);
  Vector mean(dim);
  for (size_t i = 0; i < rows; ++i)
    for (size_t c = 0; c < dim; ++c) mean[c] += args.x[i * dim + c] / static_cast<double>(rows);
  std::vector<Vector> centred(rows, Vector(dim));
  for (size_t i = 0; i < rows; ++i)
    for (size_t c = 0; c < dim; ++c) centred[i][c] = args.x[i * dim + c] - mean[c];

  const auto times = [&](const Vector& v) {  // X' v
    Vector product(rows);
    for (size_t i = 0; i < rows; ++i) product[i] = Dot(centred[i], v);
    return product;
  };
  const auto back = [&](const Vector& v) {  // X'ᵀ v
    Vector product(dim);
    for (size_t i = 0; i < rows; ++i)
      for (size_t c = 0; c < dim; ++c) product[c] += v[i] * centred[i][c];
    return product;
  };
  std::vector<Vector> basis;
  for (size_t j = 0; j < rank; ++j) {
    Vector column(dim);
    for (size_t c = 0; c < dim; ++c) column[c] = LowRankTestMatrix(static_cast<int64_t>(j * dim + c));
    basis.push_back(times(column));
  }
  Orthonormalize(basis);
  for (Vector& column : basis) column = times(back(column));
  Orthonormalize(basis);

  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < rank; ++j) args.left[i * (rank + 1) + j] = static_cast<float>(basis[j][i]);
    args.left[i * (rank + 1) + rank] = 1;
  }
  for (size_t j = 0; j < rank; ++j) {
    const Vector row = back(basis[j]);
    std::copy(row.begin(), row.end(), args.right + j * dim);
  }
  std::copy(mean.begin(), mean.end(), args.right + rank * dim);
}

void ReferenceLowRankOutput(const LowRankOutputArgs& args) {
  for (int64_t i = 0; i < args.rows; ++i) {
    for (int64_t c = 0; c < args.out; ++c) {
      double sum = args.bias != nullptr ? args.bias[c] : 0.0;
      if (args.accumulate) sum += args.y[i * args.out + c];
      for (int64_t j = 0; j < args.inner; ++j)
        sum += double{args.left[i * args.inner + j]} * args.product[j * args.out + c];
      args.y[i * args.out + c] = static_cast<float>(sum);
    }
  }
}

}  // namespace atp
