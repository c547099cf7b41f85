// out = silu(gate) · up, four elements a thread.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"

namespace atp::cuda {
namespace {

constexpr int kThreads = 256;

// expf, not __expf: decoding is bound by bytes, and the bound of the parity test is a few roundings.
__device__ __forceinline__ float SiluTimes(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

__global__ void __launch_bounds__(kThreads)
    SwiGluKernel(const float* gate, const float* up, float* out, int64_t count) {
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (begin + 4 <= count) {
    const float4 g = *reinterpret_cast<const float4*>(gate + begin);
    const float4 u = *reinterpret_cast<const float4*>(up + begin);
    *reinterpret_cast<float4*>(out + begin) =
        make_float4(SiluTimes(g.x, u.x), SiluTimes(g.y, u.y), SiluTimes(g.z, u.z), SiluTimes(g.w, u.w));
  } else {
    for (int64_t i = begin; i < count; ++i) out[i] = SiluTimes(gate[i], up[i]);
  }
}

}  // namespace

cudaError_t SwiGlu(const OpContext& context, const SwiGluArgs& args) {
  const int64_t count = args.rows * args.dim;
  const dim3 grid(static_cast<unsigned>(CeilDiv<int64_t, int64_t>(count, kThreads * 4)));
  return Launch("SwiGlu", SwiGluKernel, grid, dim3(kThreads), 0, context.stream, args.gate, args.up, args.out,
                count);
}

}  // namespace atp::cuda
