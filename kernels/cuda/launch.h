// How every .cu file sees the machine. Built by nvcc, this is CUDA; built by a host compiler with
// ATP_CUDA_EMULATION and tests/kernels/cuda_emulation/ first in the include path, <cuda_runtime.h> is an
// emulation of the execution model there, which supplies the CUDA names and everything between #ifndef and
// #endif below.
//
// Rules for kernels, so that both see the same:
//   - Shared memory comes from a SharedArena; elements are reached through Shared<T> only, so that the
//     emulation sees each access. `auto x = tile[i]` would hold a reference, not a value: name the type.
//   - Warp functions (__shfl_*_sync, __ballot_sync, __syncwarp, mma, ldmatrix) are called by whole warps:
//     blocks are multiples of 32 threads and the mask is kWarpMask. A thread that returned is missing at the
//     next barrier: leave with the whole block, or stay.
//   - Shuffles order no memory: __syncwarp() between a write and another lane's read of shared memory.
//   - Structs that are arguments have no holes, members fill them: a step is known by its arguments' bytes
//     (step_graph.h).
#ifndef ATP_KERNELS_CUDA_LAUNCH_H_
#define ATP_KERNELS_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <tuple>

#include "kernels/cuda/step_graph.h"
#include "kernels/dtype.h"

namespace atp::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kWarpMask = 0xffffffffu;

template <class A, class B>
__host__ __device__ constexpr auto CeilDiv(A a, B b) {
  return (a + b - 1) / b;
}

// Bytes of a block's shared memory that Take<T>(count) uses: the sum over a kernel's takes is what its launch
// asks for.
template <class T>
__host__ __device__ constexpr size_t SharedBytes(int count) {
  return (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
}

#ifndef ATP_CUDA_EMULATION

// An array in shared memory. Sixteen-byte aligned.
template <class T>
class Shared {
 public:
  __device__ explicit Shared(T* data) : data_(data) {}
  __device__ T& operator[](int index) const { return data_[index]; }
  // V (float4, uint4, …) over consecutive elements beginning at `index`, aligned to sizeof(V).
  template <class V>
  __device__ V LoadAs(int index) const {
    return *reinterpret_cast<const V*>(data_ + index);
  }
  template <class V>
  __device__ void StoreAs(int index, const V& value) const {
    *reinterpret_cast<V*>(data_ + index) = value;
  }
  __device__ T AtomicAdd(int index, T value) const { return atomicAdd(data_ + index, value); }
  __device__ uint32_t Address(int index) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(data_ + index));
  }

 private:
  T* data_;
};

// The block's dynamic shared memory, handed out front to back; every thread takes the same in the same order.
class SharedArena {
 public:
  template <class T>
  __device__ Shared<T> Take(int count) {
    extern __shared__ __align__(16) unsigned char atp_shared_memory[];
    T* data = reinterpret_cast<T*>(atp_shared_memory + offset_);
    offset_ += SharedBytes<T>(count);
    return Shared<T>(data);
  }

 private:
  size_t offset_ = 0;
};

// Copies 16 bytes from global to shared memory, behind the thread's back; zeros where not `valid` (then
// `from` is not read). Both addresses are 16-byte aligned.
template <class T>
__device__ __forceinline__ void CpAsync16(const Shared<T>& to, int index, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.Address(index)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of the thread's latest groups are under way. Others see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// c += a·b on bf16 fragments, fp32 sums: a [16 x 16] row-major, b [16 x 8] column-major, c [16 x 8]. With
// g = lane / 4 and t = lane % 4: a = {A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..]} (pairs), b =
// {B[2t..][g], B[2t+8..][g]} (pairs), c = {C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1]}.
__device__ __forceinline__ void MmaBF16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements: lane l names the row l % 8 of matrix l / 8 by the index of its
// first element (16-byte aligned). out[j] is the pair M_j[lane / 4][2 (lane % 4)..]; transposed: the pair
// M_j[2 (lane % 4)..][lane / 4].
template <class T>
__device__ __forceinline__ void LdMatrix4(uint32_t (&out)[4], const Shared<T>& from, int index) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from.Address(index))
               : "memory");
}
template <class T>
__device__ __forceinline__ void LdMatrix4Transposed(uint32_t (&out)[4], const Shared<T>& from, int index) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from.Address(index))
               : "memory");
}

// Two floats as bf16, rounded to nearest even; `low` in the low half.
__device__ __forceinline__ uint32_t PackBF16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The emulation is told what it is about to run.
template <class... Parameters>
void DeclareKernel(const char* /*name*/, void (* /*kernel*/)(Parameters...)) {}

#endif  // ATP_CUDA_EMULATION

// A launch names its kernel, for messages. An empty grid launches nothing.
template <class... Parameters, class... Arguments>
cudaError_t Launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, const Stream& stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  DeclareKernel(name, kernel);
  static constexpr size_t sizes[] = {sizeof(Parameters)...};
  std::tuple<Parameters...> values(arguments...);
  return std::apply(
      [&](auto&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
        return Enqueue(stream, {name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                                pointers, sizes});
      },
      values);
}

__device__ __forceinline__ float LowBF16(uint32_t pair) { return BF16ToFloat(static_cast<uint16_t>(pair)); }
__device__ __forceinline__ float HighBF16(uint32_t pair) {
  return BF16ToFloat(static_cast<uint16_t>(pair >> 16));
}

// As FloatToE4M3(): in hardware where there is such an instruction.
__device__ __forceinline__ uint32_t ToE4M3(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(0.0f), "f"(value));
  return packed;
#else
  return FloatToE4M3(value);
#endif
}

__device__ __forceinline__ float HalfToFloat(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  return F16ToFloat(half);
#endif
}

// Over a warp; every lane has the result.
__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWarpMask, value, distance);
  }
  return value;
}
__device__ __forceinline__ float WarpMax(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kWarpMask, value, distance));
  }
  return value;
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_LAUNCH_H_
