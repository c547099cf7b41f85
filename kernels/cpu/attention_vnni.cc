// GCC's own intrinsics read variables that they leave undefined on purpose (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "kernels/cpu/attention_vnni.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "hwy/highway.h"

#if HWY_ARCH_X86 && !HWY_COMPILER_MSVC
#include <immintrin.h>
#endif

namespace atp::cpu {

size_t IntegerOperandFloats(int queries, int head_dim) {
  const size_t dim = AlignedDim(head_dim), rows = (static_cast<size_t>(queries) + 15) / 16 * 16;
  return (rows * 2 * dim + 2 * kTile * dim) / 4 + 3 * rows;
}

void PlaceIntegerOperands(float* memory, int queries, int head_dim, IntegerOperands& operands) {
  const size_t dim = AlignedDim(head_dim), rows = (static_cast<size_t>(queries) + 15) / 16 * 16;
  operands.head_dim = head_dim;
  operands.queries = queries;
  operands.query_scale = memory;
  operands.query_sum = reinterpret_cast<int32_t*>(memory + rows);
  operands.query = reinterpret_cast<int8_t*>(memory + 3 * rows);
  operands.keys = reinterpret_cast<uint8_t*>(operands.query + rows * 2 * dim);
  operands.values = reinterpret_cast<int8_t*>(operands.keys + kTile * dim);
}

void QuantizeQueries(const float* query, int queries, size_t dim, IntegerOperands& operands) {
  const int head_dim = operands.head_dim;
  for (int q = 0; q < queries; ++q, query += dim) {
    int8_t* high = operands.query + static_cast<size_t>(q) * 2 * dim;
    int8_t* low = high + dim;
    float largest = 0;
    for (int i = 0; i < head_dim; ++i) largest = std::max(largest, std::abs(query[i]));
    const float inverse = largest > 0 ? 127 * 256 / largest : 0;
    int32_t sum = 0, high_sum = 0;
    for (int i = 0; i < head_dim; ++i) {
      const int value = static_cast<int>(std::lrintf(query[i] * inverse));
      const int top = (value + 128) >> 8;
      high[i] = static_cast<int8_t>(top);
      low[i] = static_cast<int8_t>(value - top * 256);
      sum += value;
      high_sum += top * 256;
    }
    operands.query_scale[q] = largest / (127 * 256);
    operands.query_sum[q] = high_sum;
    operands.query_sum[queries + q] = sum;
  }
}

}  // namespace atp::cpu

#if HWY_ARCH_X86 && !HWY_COMPILER_MSVC
HWY_PUSH_ATTRIBUTES("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
namespace atp::cpu {
namespace {

// Byte tables of the shuffles below.
struct Shuffles {
  alignas(64) uint8_t int8_keys[64], int4_keys[64], pairs_low[64], pairs_high[64];
  alignas(64) uint16_t quads_low[32], quads_high[32];
  alignas(64) uint8_t iota[64];
};
constexpr Shuffles MakeShuffles() {
  Shuffles s{};
  for (int i = 0; i < 64; ++i) {
    const int entry = i / 4, row = i % 4;
    s.iota[i] = static_cast<uint8_t>(i);
    s.int8_keys[i] = static_cast<uint8_t>(row * 16 + entry);
    s.int4_keys[i] = static_cast<uint8_t>(row * 8 + entry % 8);
    s.pairs_low[i] = static_cast<uint8_t>(i / 2 + i % 2 * 64);
    s.pairs_high[i] = static_cast<uint8_t>(32 + i / 2 + i % 2 * 64);
  }
  for (int i = 0; i < 32; ++i) {
    s.quads_low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    s.quads_high[i] = static_cast<uint16_t>(16 + i / 2 + i % 2 * 32);
  }
  return s;
}
constexpr Shuffles kShuffles = MakeShuffles();

__m128i Load16(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

// 16 entries × 4 dimensions of keys, an entry's bytes side by side; `rows` are `stride` bytes apart.
__m512i Int8Keys(const uint8_t* rows, size_t stride) {
  __m512i x;
  if (stride == kSlice) {
    x = _mm512_loadu_si512(rows);
  } else {
    x = _mm512_castsi128_si512(Load16(rows));
    x = _mm512_inserti32x4(x, Load16(rows + stride), 1);
    x = _mm512_inserti32x4(x, Load16(rows + 2 * stride), 2);
    x = _mm512_inserti32x4(x, Load16(rows + 3 * stride), 3);
  }
  x = _mm512_permutexvar_epi8(_mm512_load_si512(kShuffles.int8_keys), x);
  return _mm512_xor_si512(x, _mm512_set1_epi8(static_cast<char>(0x80)));
}

__m512i Int4Keys(const uint8_t* rows, size_t stride) {
  int64_t row[4];
  for (int r = 0; r < 4; ++r) std::memcpy(&row[r], rows + r * stride, sizeof(row[r]));
  __m512i x = _mm512_castsi256_si512(_mm256_set_epi64x(row[3], row[2], row[1], row[0]));
  x = _mm512_permutexvar_epi8(_mm512_load_si512(kShuffles.int4_keys), x);
  // Entries 8 to 15 are the high halves of the bytes of entries 0 to 7.
  x = _mm512_mask_srli_epi32(x, 0xff00, x, 4);
  x = _mm512_and_si512(x, _mm512_set1_epi8(15));
  return _mm512_xor_si512(x, _mm512_set1_epi8(8));
}

template <bool kInt4>
void UnpackKeys(const TilePlace& tile, IntegerOperands& operands) {
  constexpr size_t kPerByte = kInt4 ? 2 : 1;
  const KvPage& page = *tile.page;
  const size_t stride = static_cast<size_t>(page.entries()) / kPerByte;
  for (int s = 0; s < tile.slices; ++s) {
    const auto* rows = reinterpret_cast<const uint8_t*>(tile.block[s] + page.key_offset()) +
                       static_cast<size_t>(tile.offset[s]) / kPerByte;
    uint8_t* out = operands.keys + s * 64;
    for (int i = 0; i < operands.head_dim; i += 4, rows += 4 * stride, out += kTile * 4) {
      _mm512_store_si512(out, kInt4 ? Int4Keys(rows, stride) : Int8Keys(rows, stride));
    }
  }
  operands.key_offset = kInt4 ? 8 : 128;
  operands.halves = kInt4 ? 1 : 2;
}

// Reads dimensions [first, first + 64) of values; those past the end are 0.
template <bool kInt4>
class ValueReader {
 public:
  ValueReader(int first, int head_dim) : first_(first) {
    there_ = ~__mmask64{0} >> (64 - std::min(64, head_dim - first));
    // Of int4, dimensions from the half on are the high halves of the bytes. head_dim is at most 128.
    const int half = head_dim / 2;
    bytes_ = ~__mmask64{0} >> (64 - half);
    const __m512i halves = _mm512_set1_epi8(static_cast<char>(half));
    const __m512i dimension =
        _mm512_add_epi8(_mm512_load_si512(kShuffles.iota), _mm512_set1_epi8(static_cast<char>(first)));
    high_ = _mm512_cmpge_epu8_mask(dimension, halves);
    byte_of_ = _mm512_mask_sub_epi8(dimension, high_, dimension, halves);
  }

  __m512i Read(const uint8_t* row) const {
    if (!kInt4) return _mm512_maskz_loadu_epi8(there_, row + first_);
    __m512i x = _mm512_permutexvar_epi8(byte_of_, _mm512_maskz_loadu_epi8(bytes_, row));
    x = _mm512_and_si512(_mm512_mask_blend_epi8(high_, x, _mm512_srli_epi16(x, 4)), _mm512_set1_epi8(15));
    const __m512i eight = _mm512_set1_epi8(8);
    return _mm512_maskz_sub_epi8(there_, _mm512_xor_si512(x, eight), eight);
  }

 private:
  int first_;
  __mmask64 there_, bytes_, high_;
  __m512i byte_of_;
};

// Up to four vectors of 16 dimensions, from `vector` on.
template <bool kInt4>
void UnpackValues(const TilePlace& tile, IntegerOperands& operands, int vector) {
  const KvPage& page = *tile.page;
  const size_t dim = AlignedDim(operands.head_dim);
  const size_t stride = static_cast<size_t>(operands.head_dim) / (kInt4 ? 2 : 1);
  const int vectors = std::min(4, static_cast<int>(dim) / 16 - vector);
  const ValueReader<kInt4> reader(vector * 16, operands.head_dim);
  const __m512i pairs_low = _mm512_load_si512(kShuffles.pairs_low);
  const __m512i pairs_high = _mm512_load_si512(kShuffles.pairs_high);
  const __m512i quads_low = _mm512_load_si512(kShuffles.quads_low);
  const __m512i quads_high = _mm512_load_si512(kShuffles.quads_high);
  int8_t* out = operands.values + vector * 64;
  for (int s = 0; s < tile.slices; ++s) {
    const auto* row = reinterpret_cast<const uint8_t*>(tile.block[s] + page.value_offset()) +
                      static_cast<size_t>(tile.offset[s]) * stride;
    for (int e = 0; e < kSlice; e += 4, row += 4 * stride, out += dim * 4) {
      const __m512i r0 = reader.Read(row), r1 = reader.Read(row + stride);
      const __m512i r2 = reader.Read(row + 2 * stride), r3 = reader.Read(row + 3 * stride);
      const __m512i low01 = _mm512_permutex2var_epi8(r0, pairs_low, r1);
      const __m512i low23 = _mm512_permutex2var_epi8(r2, pairs_low, r3);
      _mm512_store_si512(out, _mm512_permutex2var_epi16(low01, quads_low, low23));
      if (vectors > 1) _mm512_store_si512(out + 64, _mm512_permutex2var_epi16(low01, quads_high, low23));
      if (vectors <= 2) continue;
      const __m512i high01 = _mm512_permutex2var_epi8(r0, pairs_high, r1);
      const __m512i high23 = _mm512_permutex2var_epi8(r2, pairs_high, r3);
      _mm512_store_si512(out + 128, _mm512_permutex2var_epi16(high01, quads_low, high23));
      if (vectors > 3) _mm512_store_si512(out + 192, _mm512_permutex2var_epi16(high01, quads_high, high23));
    }
  }
}

template <bool kInt4>
void UnpackMatrices(const TilePlace& tile, IntegerOperands& operands) {
  UnpackKeys<kInt4>(tile, operands);
  const int vectors = static_cast<int>(AlignedDim(operands.head_dim)) / 16;
  for (int v = 0; v < vectors; v += 4) UnpackValues<kInt4>(tile, operands, v);
}

__m512 LoadScales(const std::byte* at) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// sum += four products of bytes in each 32 bits. As an intrinsic, GCC 12 copies every accumulator to another
// register and back.
inline void AddDot(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

__m512i Broadcast(const void* four_bytes) {
  int32_t value;
  std::memcpy(&value, four_bytes, sizeof(value));
  return _mm512_set1_epi32(value);
}

// M queries, N slices. high·256 + low, exact in 32 bits: 255·127·256·d for d up to 256.
template <int M, int N>
void Scores(IntegerOperands& operands, int slice, int first, float (*scores)[kTile]) {
  const size_t dim = AlignedDim(operands.head_dim);
  const int8_t* query = operands.query + static_cast<size_t>(first) * 2 * dim;
  __m512i acc[M][N];
#pragma GCC unroll 8
  for (int q = 0; q < M; ++q) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[q][n] = _mm512_setzero_si512();
  }
  const int32_t* sums = operands.query_sum + (operands.halves - 1) * operands.queries + first;
  for (int half = 0; half < operands.halves; ++half, query += dim) {
    const uint8_t* keys = operands.keys + slice * 64;
    for (int i = 0; i < operands.head_dim; i += 4, keys += kTile * 4) {
      operands.next.Prefetch();
      __m512i key[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) key[n] = _mm512_load_si512(keys + n * 64);
#pragma GCC unroll 8
      for (int q = 0; q < M; ++q) {
        const __m512i value = Broadcast(query + q * 2 * dim + i);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) AddDot(acc[q][n], key[n], value);
      }
    }
    if (half == 1) break;
#pragma GCC unroll 8
    for (int q = 0; q < M; ++q) {
      const __m512i moved = _mm512_set1_epi32(operands.key_offset * sums[q]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[q][n] = _mm512_sub_epi32(_mm512_slli_epi32(acc[q][n], 8), moved);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const __m512 scale = _mm512_load_ps(operands.key_scale + (slice + n) * kSlice);
    const float* log_mass = operands.log_mass[slice + n];
    const __m512 bias = log_mass != nullptr ? _mm512_loadu_ps(log_mass) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int q = 0; q < M; ++q) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(operands.query_scale[first + q]));
      _mm512_store_ps(scores[q] + (slice + n) * kSlice,
                      _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[q][n]), both, bias));
    }
  }
}

template <int M>
void ScoresOf(IntegerOperands& operands, int slices, int first, float (*scores)[kTile]) {
  int slice = 0;
  for (; slice + 2 <= slices; slice += 2) Scores<M, 2>(operands, slice, first, scores);
  for (; slice < slices; ++slice) Scores<M, 1>(operands, slice, first, scores);
}

// Weights as 16-bit integers, high bytes and low bytes, in units of `unit`.
struct Weights {
  alignas(64) uint8_t bytes[2][kTile];
  float unit;
};

void QuantizeWeights(const float* value_scale, const float* p, Weights& out) {
  __m512 weight[kTileSlices];
  __m512 largest = _mm512_setzero_ps();
  for (int s = 0; s < kTileSlices; ++s) {
    weight[s] = _mm512_mul_ps(_mm512_load_ps(p + s * kSlice), _mm512_load_ps(value_scale + s * kSlice));
    largest = _mm512_max_ps(largest, weight[s]);
  }
  const float top = _mm512_reduce_max_ps(largest);
  // Below the least normal number, 65535 / top is infinite; such weights are nothing.
  const __m512 inverse = _mm512_set1_ps(top > 0x1p-100f ? 65535.0f / top : 0.0f);
  out.unit = top / 65535.0f;
  for (int s = 0; s < kTileSlices; ++s) {
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(weight[s], inverse));
    _mm_store_si128(reinterpret_cast<__m128i*>(out.bytes[0] + s * kSlice),
                    _mm512_cvtepi32_epi8(_mm512_srli_epi32(value, 8)));
    _mm_store_si128(reinterpret_cast<__m128i*>(out.bytes[1] + s * kSlice), _mm512_cvtepi32_epi8(value));
  }
}

// M queries, N vectors of 16 dimensions. high·256 + low, exact in 32 bits: 64·65535·128.
template <int M, int N>
void Values(IntegerOperands& operands, int slices, int vector, const Weights* weights, const float* shrink,
            float* sum) {
  const size_t dim = AlignedDim(operands.head_dim);
  __m512i acc[M][N];
#pragma GCC unroll 4
  for (int q = 0; q < M; ++q) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[q][n] = _mm512_setzero_si512();
  }
  for (int half = 0; half < 2; ++half) {
    const int8_t* values = operands.values + vector * 64;
    for (int e = 0; e < slices * kSlice; e += 4, values += dim * 4) {
      operands.next.Prefetch();
      __m512i value[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) value[n] = _mm512_load_si512(values + n * 64);
#pragma GCC unroll 4
      for (int q = 0; q < M; ++q) {
        const __m512i weight = Broadcast(weights[q].bytes[half] + e);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) AddDot(acc[q][n], weight, value[n]);
      }
    }
    if (half == 1) break;
#pragma GCC unroll 4
    for (int q = 0; q < M; ++q) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[q][n] = _mm512_slli_epi32(acc[q][n], 8);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < M; ++q) {
    const __m512 unit = _mm512_set1_ps(weights[q].unit), factor = _mm512_set1_ps(shrink[q]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at = sum + q * dim + (vector + n) * 16;
      const __m512 kept = _mm512_mul_ps(_mm512_load_ps(at), factor);
      _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[q][n]), unit, kept));
    }
  }
}

template <int M>
void ValuesOf(IntegerOperands& operands, int slices, const float (*p)[kTile], const float* shrink,
              float* sum) {
  Weights weights[M];
  for (int q = 0; q < M; ++q) QuantizeWeights(operands.value_scale, p[q], weights[q]);
  const int vectors = static_cast<int>(AlignedDim(operands.head_dim)) / 16;
  int v = 0;
  for (; v + 4 <= vectors; v += 4) Values<M, 4>(operands, slices, v, weights, shrink, sum);
  for (; v < vectors; ++v) Values<M, 1>(operands, slices, v, weights, shrink, sum);
}

}  // namespace

void UnpackIntegerTile(const TilePlace& tile, IntegerOperands& operands) {
  const KvPage& page = *tile.page;
  if (page.format() == KvFormat::kInt4) {
    UnpackMatrices<true>(tile, operands);
  } else {
    UnpackMatrices<false>(tile, operands);
  }
  for (int s = 0; s < kTileSlices; ++s) {
    operands.log_mass[s] = nullptr;
    _mm512_store_ps(operands.value_scale + s * kSlice, _mm512_setzero_ps());
    if (s >= tile.slices) continue;
    const size_t at = static_cast<size_t>(tile.offset[s]) * sizeof(uint16_t);
    const auto present = static_cast<__mmask16>(tile.present >> (s * kSlice));
    _mm512_store_ps(operands.key_scale + s * kSlice,
                    LoadScales(tile.block[s] + page.key_scale_offset() + at));
    _mm512_mask_store_ps(operands.value_scale + s * kSlice, present,
                         LoadScales(tile.block[s] + page.value_scale_offset() + at));
    operands.log_mass[s] = tile.LogMass(s);
  }
}

void IntegerScores(IntegerOperands& operands, int slices, int first, int count, float (*scores)[kTile]) {
  if (count == 8) return ScoresOf<8>(operands, slices, first, scores);
  int q = 0;
  for (; q + 4 <= count; q += 4) ScoresOf<4>(operands, slices, first + q, scores + q);
  for (; q < count; ++q) ScoresOf<1>(operands, slices, first + q, scores + q);
}

void IntegerValues(IntegerOperands& operands, int slices, int count, const float (*p)[kTile],
                   const float* shrink, float* sum) {
  const size_t dim = AlignedDim(operands.head_dim);
  int q = 0;
  for (; q + 4 <= count; q += 4) ValuesOf<4>(operands, slices, p + q, shrink + q, sum + q * dim);
  for (; q < count; ++q) ValuesOf<1>(operands, slices, p + q, shrink + q, sum + q * dim);
}

}  // namespace atp::cpu
HWY_POP_ATTRIBUTES

namespace atp::cpu {
bool VnniSupports(const KvPage& page) {
  static const bool available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  return available && IsInteger(page.format()) && page.head_dim() % 4 == 0 && page.head_dim() <= 128;
}
}  // namespace atp::cpu
#else
namespace atp::cpu {
bool VnniSupports(const KvPage&) { return false; }
void UnpackIntegerTile(const TilePlace&, IntegerOperands&) {}
void IntegerScores(IntegerOperands&, int, int, int, float (*)[kTile]) {}
void IntegerValues(IntegerOperands&, int, int, const float (*)[kTile], const float*, float*) {}
}  // namespace atp::cpu
#endif
