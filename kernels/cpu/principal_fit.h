// The principal fit (kernels/principal_fit.h), vectorised. Products over references and entries are in fp32,
// summed in short runs; what amplifies rounding, the elimination that chooses pivots and the ridge system, is
// in double.
#ifndef ATP_KERNELS_CPU_PRINCIPAL_FIT_H_
#define ATP_KERNELS_CPU_PRINCIPAL_FIT_H_

#include <cstddef>
#include <cstdint>

#include "kernels/principal_fit.h"

namespace atp::cpu {

// The matrices of one fit, row-major, rows padded to whole vectors with zeros.
struct PrincipalFitRoom {
  static constexpr size_t kPad = 32;  // two vectors of every target

  // scratch: 64-byte aligned, or null to know `floats`, its size.
  PrincipalFitRoom(int n, int m, int d, int count, float* scratch);

  size_t padded_n, padded_d, padded_r;
  double* factor;               // [min(n, 2 r), padded_n]: of the Gram matrix, transposed
  double *sums, *norms, *rest;  // [padded_n]: of A's columns; what of their norms² is not spanned yet
  double *system, *shift;       // [r, padded_r], [r, padded_d]
  float *keys, *bias;           // [d, padded_n], [padded_n]
  float *attention, *columns;   // A [m, padded_n]; columns of AᵀA, at most n, [padded_n] each
  float *values, *output;       // [n, padded_d], A V [m, padded_d]
  float *share, *gram;          // P [m, padded_r]; A_JᵀA_J, later PᵀP [r, padded_r]
  float *mass, *vectors;        // [padded_r], [4, padded_r]
  float *products, *fitted;     // [2, r, padded_d], [r, padded_d]
  int32_t* column_of;           // [n], where the Gram column of an entry is, or -1
  size_t floats;
};

// Floats of scratch that a fit of this size needs (64-byte aligned).
size_t PrincipalFitScratch(int n, int m, int d, int count);

// One fit, one thread; allocates nothing.
using PrincipalFitFn = void (*)(const PrincipalFitProblem& problem, float* scratch, PrincipalFit* fit);
PrincipalFitFn PrincipalFitFor(int64_t target);

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_PRINCIPAL_FIT_H_
