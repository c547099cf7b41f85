// The Walsh–Hadamard transform: a basis in which a vector whose few large elements would set the step of all
// others is spread evenly. Orthonormal and its own inverse, so products of two transformed vectors are those
// of the vectors. d that are no powers of two go by blocks of the largest one that divides them.
#ifndef ATP_KERNELS_WALSH_HADAMARD_H_
#define ATP_KERNELS_WALSH_HADAMARD_H_

#include <cmath>

namespace atp {

constexpr int WalshHadamardBlock(int d) { return d & -d; }

// x: [d], in place. Sums and one product, in this order on every backend: the same bits.
inline void WalshHadamard(float* x, int d) {
  const int size = WalshHadamardBlock(d);
  for (int h = 1; h < size; h *= 2) {
    for (int i = 0; i < d; i += 2 * h) {
      for (int j = i; j < i + h; ++j) {
        const float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
    }
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  for (int i = 0; i < d; ++i) x[i] *= scale;
}

}  // namespace atp

#endif  // ATP_KERNELS_WALSH_HADAMARD_H_
