// Block tables of a batch's sequences, as kernels read them: flat arrays that one copy carries to the device,
// for all layers of a step.
#ifndef ATP_KERNELS_CUDA_KV_TABLES_H_
#define ATP_KERNELS_CUDA_KV_TABLES_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/ops.h"
#include "kernels/kv_page.h"
#include "kernels/op_args.h"

namespace atp::cuda {

// A KvPage, by value. Where an element is inside its array: keys [head_dim, entries], values [entries,
// head_dim], and the order of int4 below.
struct PageLayout {
  KvFormat format = KvFormat::kF32;
  uint8_t padding[3] = {};
  int32_t entries = 0;
  int32_t head_dim = 0;
  bool with_log_mass = false;
  uint8_t more_padding[3] = {};
  uint32_t value_offset = 0, key_scale_offset = 0, value_scale_offset = 0, log_mass_offset = 0;  // bytes

  // Index of an element, counted in elements; int4: element 2i is the low half of byte i.
  __host__ __device__ int KeyIndex(int dimension, int entry) const {
    const int row = dimension * entries;
    if (format != KvFormat::kInt4) return row + entry;
    return row + entry / 16 * 16 + entry % 8 * 2 + (entry % 16 >= 8 ? 1 : 0);
  }
  __host__ __device__ int ValueIndex(int dimension, int entry) const {
    const int row = entry * head_dim;
    if (format != KvFormat::kInt4) return row + dimension;
    const int half = head_dim / 2;
    return row + dimension % half * 2 + (dimension >= half ? 1 : 0);
  }
};
PageLayout LayoutOf(const KvPage& page);

struct HeadTable {
  int32_t exact = 0;      // index in KvTables::blocks of the head's first exact block
  int32_t principal = 0;  // … and of its first principal block
  int32_t principal_entries = 0;
  int32_t page = 0;  // index in KvTables::pages; meaningless without principal entries
};

struct SequenceTable {
  int32_t first_row = 0;
  int32_t rows = 0;
  int32_t exact_entries = 0;
};

// Passed to kernels by value; the pointers are device memory, valid until the stream is synchronized.
struct KvTables {
  // Principal pages have three widths of element, in one to eight eighths of a block.
  static constexpr int kMaxPages = 12;

  const SequenceTable* sequences = nullptr;  // [count]
  const HeadTable* heads = nullptr;          // [count, kv_heads]
  const BlockId* blocks = nullptr;
  int32_t count = 0;
  int32_t kv_heads = 0;
  std::byte* pool = nullptr;
  size_t block_bytes = 0;
  PageLayout exact;
  PageLayout pages[kMaxPages];

  __host__ __device__ std::byte* Block(BlockId id) const {
    return pool + static_cast<size_t>(id) * block_bytes;
  }
};

// What the ops of an announced step find on the device: the tables of all layers and the positions, carried
// there by one copy; and the plan of attention that a layer left, for the next one that is like it.
class StepTables {
 public:
  // The host's block ids are not read again after this returns.
  cudaError_t Begin(const OpContext& context, const StepArgs& args);
  void End();

  // Of a step within limits, what Begin() and the ops after it send to the device: tables, plans, row
  // indices, adjustments of logits (as many as some hundreds a row).
  static size_t BytesToSend(const StepLimits& limits);

  // Null where the op's are not of the step.
  const KvTables* Tables(std::span<const KvSequence> sequences) const;
  const int32_t* Positions(std::span<const int32_t> positions) const;
  AttentionPlan& plan() { return plan_; }

 private:
  std::span<const KvSequence> sequences_;  // [layers, count]
  std::span<const int32_t> positions_;
  std::vector<KvTables> tables_;  // [layers]
  const int32_t* device_positions_ = nullptr;
  AttentionPlan plan_;
};

inline bool InStep(const OpContext& context, std::span<const KvSequence> sequences) {
  return context.step != nullptr && context.step->Tables(sequences) != nullptr;
}

// The step's, or else what is uploaded for this op alone.
KvTables TablesOf(const OpContext& context, std::span<const KvSequence> sequences, const KvPool& pool,
                  int kv_heads, cudaError_t* error);
const int32_t* PositionsOf(const OpContext& context, std::span<const int32_t> positions, cudaError_t* error);

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_KV_TABLES_H_
