// Pieces of KV pages as operands of a tensor core: from global memory straight into the registers of the
// threads that need them. Every byte of a page is loaded once per warp; no shared memory is involved.
//
// mma.m16n8k16 leaves open which keys, dimensions and entries its rows and columns are. Lane 4 g + t holds,
// of operand a, rows g and g + 8 and k = 2t, 2t + 1, 2t + 8, 2t + 9. A tile is 64 entries, in slices of 16.
//   scores    a = keys: rows of the four products are entries 8 g .. 8 g + 7 (half a slice), so that a lane
//             loads eight neighbours of one dimension at once; the k of step s are dimensions 16 s + 4 i + t.
//   values    a = values, transposed: rows are dimensions 64 h + 8 g .. + 7 of an entry; the k of step s are
//             entries 2 s, 2 s + 8, 2 s + 1, 2 s + 9 of slice t: those whose weights the lane gets when
//             the scores' 8 x 8 blocks are transposed.
// Either way a lane has four rows of eight neighbours, and turns them into the a of four products.
#ifndef ATP_KERNELS_CUDA_PAGE_FRAGMENTS_CUH_
#define ATP_KERNELS_CUDA_PAGE_FRAGMENTS_CUH_

#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"

namespace atp::cuda {

#ifndef ATP_CUDA_EMULATION

// Bytes of `low` are numbered 0 to 3, of `high` 4 to 7; nibble i of the selector names byte i of the result.
__device__ __forceinline__ uint32_t PermuteBytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// The transposed 8 x 8 matrix of 16-bit elements of which lane 4 g + t holds row g, columns 2t and 2t + 1.
__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// Two bf16 products of normal or subnormal numbers.
__device__ __forceinline__ uint32_t MultiplyPair(uint32_t a, uint32_t b) {
  constexpr uint32_t kMinusZero = 0x80008000u;
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(kMinusZero));
  return out;
}

// Two bf16 differences that are exact.
__device__ __forceinline__ uint32_t SubtractPair(uint32_t a, uint32_t b) {
  constexpr uint32_t kMinusOne = 0xbf80bf80u;
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(b), "r"(kMinusOne), "r"(a));
  return out;
}

#else

inline uint32_t PermuteBytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 255) << 8 * i;
  return out;
}

inline uint32_t TransposeMatrix(uint32_t pair) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, row = lane / 4, column = lane % 4 * 2;
  uint32_t halves[2];
  for (int i = 0; i < 2; ++i) {
    const uint32_t source = __shfl_sync(kWarpMask, pair, (column + i) * 4 + row / 2);
    halves[i] = row % 2 == 0 ? source & 0xffffu : source >> 16;
  }
  return halves[0] | halves[1] << 16;
}

inline uint32_t MultiplyPair(uint32_t a, uint32_t b) {
  return PackBF16(LowBF16(a) * LowBF16(b), HighBF16(a) * HighBF16(b));
}

inline uint32_t SubtractPair(uint32_t a, uint32_t b) {
  return PackBF16(LowBF16(a) - LowBF16(b), HighBF16(a) - HighBF16(b));
}

#endif  // ATP_CUDA_EMULATION

// Bf16 terms that an element is the sum of: fp32 has 24 bits of significand, bf16 has 8.
template <KvFormat kFormat>
inline constexpr int kTermsOf = kFormat == KvFormat::kF32 ? 3 : 1;

// Term `term` of x as a sum of bf16s, largest first.
template <int kTerms>
__device__ __forceinline__ float Term(float x, int term) {
  if constexpr (kTerms > 1) {  // what is left is rounded by who packs it
    for (int i = 0; i < term; ++i) x -= LowBF16(PackBF16(x, 0.0f));
  }
  return x;
}

// Eight neighbours of a row as they lie in a page.
template <KvFormat kFormat>
struct RowOf8 {
  static constexpr int kWords = kFormat == KvFormat::kF32 ? 8 : kFormat == KvFormat::kBF16 ? 4 : 2;
  uint32_t words[kWords];

  // there: false gives zeros and reads nothing. shift: 4 for the high halves of int4 bytes, else 0.
  __device__ __forceinline__ void Load(const std::byte* from, bool there, int shift) {
    if constexpr (kWords == 2) {
      const uint2 v = there ? *reinterpret_cast<const uint2*>(from) : make_uint2(0, 0);
      words[0] = v.x >> shift, words[1] = v.y >> shift;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = there ? reinterpret_cast<const uint4*>(from)[i / 4] : make_uint4(0, 0, 0, 0);
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      }
    }
  }
};

// Element `index` of two rows as a pair of bf16; of a bf16 page without conversion, of a page with scales
// without them (integers to 256 and fp8 are exact in bf16).
template <KvFormat kFormat>
__device__ __forceinline__ uint32_t PairOf(const RowOf8<kFormat>& first, const RowOf8<kFormat>& second,
                                           int index, int term) {
  if constexpr (kFormat == KvFormat::kF32) {
    const float a = __int_as_float(static_cast<int>(first.words[index]));
    const float b = __int_as_float(static_cast<int>(second.words[index]));
    return PackBF16(Term<3>(a, term), Term<3>(b, term));
  } else if constexpr (kFormat == KvFormat::kBF16) {
    return PermuteBytes(first.words[index / 2], second.words[index / 2], index % 2 == 0 ? 0x5410 : 0x7632);
  } else {
    const uint32_t byte = static_cast<uint32_t>(index % 4);
    const uint32_t pair =
        PermuteBytes(first.words[index / 4], second.words[index / 4], byte * 0x0011u + (byte + 4) * 0x1100u);
    // bf16 counts 128, 129, … 255 by ones: 0x4300 | i is 128 + i, 0x4380 is 256.
    if constexpr (kFormat == KvFormat::kFp8) {
      // Exponent and mantissa in the low ends of bf16's: the value over 2^120, subnormals too.
      return MultiplyPair((pair & 0x80008000u) | (pair & 0x007f007fu) << 4, 0x7b807b80u);
    } else if constexpr (kFormat == KvFormat::kInt8) {
      return SubtractPair((pair & 0x007f007fu) | 0x43004300u, (pair & 0x00800080u) | 0x43004300u);
    } else {
      return SubtractPair((pair & 0x000f000fu) ^ 0x43084308u, 0x43084308u);
    }
  }
}

// The a of product `product` (0 to 3) from four rows.
template <KvFormat kFormat>
__device__ __forceinline__ void FragmentOf(const RowOf8<kFormat> (&rows)[4], int product, int term,
                                           uint32_t (&a)[4]) {
  a[0] = PairOf<kFormat>(rows[0], rows[1], 2 * product, term);
  a[1] = PairOf<kFormat>(rows[0], rows[1], 2 * product + 1, term);
  a[2] = PairOf<kFormat>(rows[2], rows[3], 2 * product, term);
  a[3] = PairOf<kFormat>(rows[2], rows[3], 2 * product + 1, term);
}

// Where rows of a slice lie: `block` is the slice's page, `offset` its first entry there. Eight neighbours
// are whole bytes in every format.
template <KvFormat kFormat>
__device__ __forceinline__ const std::byte* KeyRow(const std::byte* block, const PageLayout& page, int offset,
                                                   int dimension, int half) {
  if (kFormat == KvFormat::kInt4) return block + (dimension * page.entries + offset) / 2;
  constexpr int kBytes = BitsOf(kFormat) / 8 + (kFormat == KvFormat::kInt4);
  return block + (dimension * page.entries + offset + 8 * half) * kBytes;
}
template <KvFormat kFormat>
__device__ __forceinline__ const std::byte* ValueRow(const std::byte* block, const PageLayout& page,
                                                     int head_dim, int entry, int dimension) {
  const std::byte* values = block + page.value_offset;
  if (kFormat == KvFormat::kInt4) {
    const int half = head_dim / 2;
    return values + entry * half + (dimension >= half ? dimension - half : dimension);
  }
  constexpr int kBytes = BitsOf(kFormat) / 8 + (kFormat == KvFormat::kInt4);
  return values + (entry * head_dim + dimension) * kBytes;
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_PAGE_FRAGMENTS_CUH_
