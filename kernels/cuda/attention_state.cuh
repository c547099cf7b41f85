// The state that a warp of many queries folds its units into.
#ifndef ATP_KERNELS_CUDA_ATTENTION_STATE_CUH_
#define ATP_KERNELS_CUDA_ATTENTION_STATE_CUH_

#include "kernels/cuda/attention_unit.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/online_softmax.cuh"

namespace atp::cuda {

// A state of many queries on its way through units and chunks. It lies in shared memory, each thread's part
// where only that thread looks: the registers are the unit's.
template <int kBlocks>
class FoldedState {
 public:
  static constexpr int kFloats = kBlocks * (32 + 4);  // per thread

  __device__ __forceinline__ explicit FoldedState(const Shared<float>& memory) : memory_(memory) {}
  __device__ __forceinline__ void Clear() { empty_ = true; }

  __device__ __forceinline__ void Add(const UnitState<kBlocks>& next) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const float4 moments =
          make_float4(next.maximum[b][0], next.maximum[b][1], next.total[b][0], next.total[b][1]);
      Fold(b, moments, [&](int i) {
        const auto& product = next.sum[b][i / 4][i % 4];
        return make_float4(product[0], product[1], product[2], product[3]);
      });
    }
    empty_ = false;
  }
  __device__ __forceinline__ void Add(const FoldedState& next) {
    if (next.empty_) return;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) Fold(b, next.Moments(b), [&](int i) { return next.Sums(b, i); });
    empty_ = false;
  }

  // maximum, maximum, total, total of queries 2t and 2t + 1 of block b.
  __device__ __forceinline__ float4 Moments(int b) const { return Load(kBlocks * 8 + b); }
  // Elements 0 and 2 are of query 2t, 1 and 3 of query 2t + 1; i counts (h, product).
  __device__ __forceinline__ float4 Sums(int b, int i) const { return Load(b * 8 + i); }

 private:
  static __device__ __forceinline__ int At(int i) {
    return (i * kAttentionThreads + static_cast<int>(threadIdx.x)) * 4;
  }
  __device__ __forceinline__ float4 Load(int i) const { return memory_.template LoadAs<float4>(At(i)); }
  __device__ __forceinline__ void Store(int i, const float4& value) const {
    memory_.template StoreAs<float4>(At(i), value);
  }

  // Factors 1 and 0 leave a state as it is; one that is not there yet is not read.
  template <class Sum>
  __device__ __forceinline__ void Fold(int b, const float4& moments, const Sum& sum) {
    float4 all = moments;
    float before[2] = {1, 1}, behind[2] = {0, 0};
    if (!empty_) {
      all = Moments(b);
      if (!IsEmpty(moments.x)) {
        const Merge merge(all.x, moments.x);
        all.x = merge.maximum, all.z = merge(all.z, moments.z);
        before[0] = merge.before, behind[0] = merge.next;
      }
      if (!IsEmpty(moments.y)) {
        const Merge merge(all.y, moments.y);
        all.y = merge.maximum, all.w = merge(all.w, moments.w);
        before[1] = merge.before, behind[1] = merge.next;
      }
    }
    Store(kBlocks * 8 + b, all);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float4 out = sum(i);
      if (!empty_) {
        const float4 old = Sums(b, i);
        out.x = fmaf(old.x, before[0], __fmul_rn(out.x, behind[0]));
        out.y = fmaf(old.y, before[1], __fmul_rn(out.y, behind[1]));
        out.z = fmaf(old.z, before[0], __fmul_rn(out.z, behind[0]));
        out.w = fmaf(old.w, before[1], __fmul_rn(out.w, behind[1]));
      }
      Store(b * 8 + i, out);
    }
  }

  Shared<float> memory_;
  bool empty_ = true;
};

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_ATTENTION_STATE_CUH_
