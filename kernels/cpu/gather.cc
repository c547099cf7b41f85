// out[i] = table[indices[i]] as fp32.
#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gather.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

template <typename T>
void GatherOf(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t dim = args.table.cols;
  for (int64_t row = begin; row < end; ++row) {
    const T* from = static_cast<const T*>(args.table.data) + static_cast<int64_t>(args.indices[row]) * dim;
    float* to = args.out + row * dim;
    int64_t i = 0;
    for (; i + lanes <= dim; i += lanes) hn::StoreU(LoadFloats(d, from + i), d, to + i);
    const size_t rest = static_cast<size_t>(dim - i);
    if (rest != 0) StoreFirst(d, LoadFirst(d, from + i, rest), to + i, rest);
  }
}

void GatherRows(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  switch (args.table.dtype) {
    case DType::kF32:
      return GatherOf<float>(args, begin, end);
    case DType::kBF16:
      return GatherOf<hwy::bfloat16_t>(args, begin, end);
    case DType::kF16:
      return GatherOf<hwy::float16_t>(args, begin, end);
    default:
      return;  // Supports() refuses them
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(GatherRows);
GatherRowsFn GatherRowsFor(int64_t target) { return ATP_FUNCTION_FOR(target, GatherRows); }
}  // namespace atp::cpu
#endif
