// matmul_int8.cc for q4_k, q5_k and q6_k: a file of its own, so that the two compile side by side.
#define ATP_K_QUANTS 1
#include "kernels/cpu/matmul_int8.cc"  // NOLINT(bugprone-suspicious-include)
