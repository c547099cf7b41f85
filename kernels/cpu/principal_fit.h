// The principal fit (kernels/principal_fit.h), vectorised. Products over references and entries are in fp32,
// summed in short runs; what the elimination leaves of norms is in double.
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
  double *sums, *norms, *rest;      // [padded_n]: of A's columns; what of their norms² is not spanned yet
  float *system, *shift;            // [r, padded_r], [r, padded_d]
  float *keys, *bias;               // [d, padded_n], [padded_n]
  float* attention;                 // A [m, padded_n]
  float *columns, *reduced;         // of AᵀA, and less the steps of its factor; at most n of [padded_n]
  float* factor;                    // [min(n, 2 r), padded_n]: the Cholesky factor of AᵀA, transposed
  float *values, *output;           // [n, padded_d], A V [m, padded_d]
  float *share, *gram;              // P [m, padded_r]; A_JᵀA_J, later PᵀP [r, padded_r]
  float *mass, *vectors;            // [padded_r], [4, padded_r]
  float *products, *fitted;         // [2, r, padded_d], [r, padded_d]
  int32_t *column_of, *reduced_by;  // [n]: which column an entry has, or -1; steps in a reduced column
  size_t floats;
};

// Floats of scratch that a fit of this size needs (64-byte aligned).
size_t PrincipalFitScratch(int n, int m, int d, int count);

// One fit, one thread; allocates nothing.
using PrincipalFitFn = void (*)(const PrincipalFitProblem& problem, float* scratch, PrincipalFit* fit);
PrincipalFitFn PrincipalFitFor(int64_t target);

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_PRINCIPAL_FIT_H_
