// Writes the step's keys (dimension-major) and values (entry-major) into exact blocks. These are copies and
// roundings in plain loops: the compiler vectorises them for each target, and they are nothing beside the
// matrix products. Elements of 8 and 4 bits are rounded by the page itself: its bits are the same on every
// target.
#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kv_store.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

HWY_INLINE void Convert(float from, float& to) { to = from; }
HWY_INLINE void Convert(float from, uint16_t& to) { to = FloatToBF16(from); }

// Entries [entry, entry + count) of one block. key, value: the first row; rows are `stride` floats apart.
template <typename T>
HWY_INLINE void StoreEntries(const KvPage& page, std::byte* block, int entry, int count,
                             const float* HWY_RESTRICT key, const float* HWY_RESTRICT value, size_t stride) {
  const int head_dim = page.head_dim();
  T* HWY_RESTRICT keys = reinterpret_cast<T*>(block + page.key_offset()) + entry;
  T* HWY_RESTRICT values =
      reinterpret_cast<T*>(block + page.value_offset()) + static_cast<size_t>(entry) * head_dim;
  for (int i = 0; i < head_dim; ++i) {
    for (int e = 0; e < count; ++e)
      Convert(key[e * stride + i], keys[static_cast<size_t>(i) * page.entries() + e]);
  }
  for (int e = 0; e < count; ++e) {
    for (int i = 0; i < head_dim; ++i)
      Convert(value[e * stride + i], values[static_cast<size_t>(e) * head_dim + i]);
  }
}

void StoreKv(const StoreKvArgs& args, const KvSequence& sequence, int kv_head) {
  const KvPage& page = *args.pool.exact;
  const size_t stride = static_cast<size_t>(args.kv_heads) * page.head_dim();
  const BlockId* blocks = sequence.heads[kv_head].exact;
  int row = 0;
  while (row < sequence.rows) {
    const int position = sequence.exact_entries - sequence.rows + row;
    const int entry = position % page.entries();
    const int count = std::min(page.entries() - entry, sequence.rows - row);
    const size_t source =
        (sequence.first_row + row) * stride + static_cast<size_t>(kv_head) * page.head_dim();
    std::byte* block =
        args.pool.data + static_cast<size_t>(blocks[position / page.entries()]) * args.pool.block_bytes;
    switch (page.format()) {
      case KvFormat::kF32:
        StoreEntries<float>(page, block, entry, count, args.key + source, args.value + source, stride);
        break;
      case KvFormat::kBF16:
        StoreEntries<uint16_t>(page, block, entry, count, args.key + source, args.value + source, stride);
        break;
      case KvFormat::kFp8:
      case KvFormat::kInt8:
      case KvFormat::kInt4:
        for (int e = 0; e < count; ++e) {
          page.Store(block, entry + e, args.key + source + e * stride, args.value + source + e * stride);
        }
        break;
    }
    row += count;
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(StoreKv);
StoreKvFn StoreKvFor(int64_t target) { return ATP_FUNCTION_FOR(target, StoreKv); }
}  // namespace atp::cpu
#endif
