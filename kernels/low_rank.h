// What the backends' LowRankInput share: the random test matrix, and when a column is rounding only.
#ifndef ATP_KERNELS_LOW_RANK_H_
#define ATP_KERNELS_LOW_RANK_H_

#include <cstdint>

namespace atp {

// A column of which no more than this is left, as a share of its norm, once its components along those before
// are gone: the rows have no more directions. The rounding of an fp32 product of a few hundred terms is
// below.
inline constexpr double kLowRankNoise = 1e-5;

// Element i of the test matrix Ω, column by column [rank, dim]: 1 or -1, by a hash (splitmix64; Steele,
// Lea, Flood 2014). Signs serve as well as normal numbers do.
inline float LowRankTestMatrix(int64_t i) {
  uint64_t x = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return (x ^ (x >> 31)) & 1 ? 1.0f : -1.0f;
}

}  // namespace atp

#endif  // ATP_KERNELS_LOW_RANK_H_
