// What the backends' LowRankInput share: the random test matrix, and when a column is nothing new.
#ifndef ATP_KERNELS_LOW_RANK_H_
#define ATP_KERNELS_LOW_RANK_H_

#include <cstdint>

namespace atp {

// A second pass of Gram-Schmidt that leaves more than this of what the first one left has made the column
// orthogonal to those before ("twice is enough", Kahan in Parlett, The Symmetric Eigenvalue Problem, §6.9).
// Otherwise there is nothing in it but them, and it becomes zero. However little is left of the column as a
// whole, it counts: what is rounding only costs nothing as a direction, and a faint one must not be lost.
inline constexpr double kLowRankLeft = 0.5;

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
