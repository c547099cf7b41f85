#include <algorithm>

#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"

namespace atp::cuda {
namespace {

int32_t BlocksOf(int32_t entries, const KvPage* page) {
  return entries > 0 ? CeilDiv(entries, static_cast<int32_t>(page->entries())) : 0;
}

// Which of the pages seen so far this is, by layout: formats are few, heads are many. -1: one too many.
int32_t PageIndex(const KvPage& page, const KvPage** seen, int32_t* count) {
  for (int32_t i = 0; i < *count; ++i) {
    if (seen[i] == &page || (seen[i]->format() == page.format() && seen[i]->entries() == page.entries()))
      return i;
  }
  if (*count == KvTables::kMaxPages) return -1;
  seen[*count] = &page;
  return (*count)++;
}

// Block ids of all layers, one behind the other.
class IdList {
 public:
  explicit IdList(std::byte* to) : ids_(reinterpret_cast<BlockId*>(to)) {}
  // Where the first of them is.
  int32_t Append(const BlockId* ids, int32_t count) {
    std::copy_n(ids, count, ids_ + used_);
    used_ += count;
    return used_ - count;
  }

 private:
  BlockId* ids_;
  int32_t used_ = 0;
};

// One layer's heads. False: more pages than there is room for.
bool FillHeads(std::span<const KvSequence> sequences, const KvPool& pool, HeadTable* out, IdList& ids,
               KvTables& tables) {
  const KvPage* pages[KvTables::kMaxPages];
  int32_t page_count = 0;
  for (const KvSequence& sequence : sequences) {
    for (int h = 0; h < tables.kv_heads; ++h) {
      const KvHeadBlocks& head = sequence.heads[h];
      HeadTable entry;
      entry.exact = ids.Append(head.exact, BlocksOf(sequence.exact_entries, pool.exact));
      if (head.principal_entries > 0) {
        entry.principal = ids.Append(head.principal, BlocksOf(head.principal_entries, head.principal_page));
        entry.principal_entries = head.principal_entries;
        entry.page = PageIndex(*head.principal_page, pages, &page_count);
        if (entry.page < 0) return false;
      }
      *out++ = entry;
    }
  }
  for (int32_t i = 0; i < page_count; ++i) tables.pages[i] = LayoutOf(*pages[i]);
  return true;
}

size_t IdsOf(std::span<const KvSequence> sequences, const KvPool& pool, int kv_heads) {
  size_t ids = 0;
  for (const KvSequence& sequence : sequences) {
    for (int h = 0; h < kv_heads; ++h) {
      const KvHeadBlocks& head = sequence.heads[h];
      ids += static_cast<size_t>(BlocksOf(sequence.exact_entries, pool.exact));
      ids += static_cast<size_t>(BlocksOf(head.principal_entries, head.principal_page));
    }
  }
  return ids;
}

}  // namespace

PageLayout LayoutOf(const KvPage& page) {
  PageLayout layout;
  layout.format = page.format();
  layout.entries = page.entries();
  layout.head_dim = page.head_dim();
  layout.with_log_mass = page.with_log_mass();
  layout.value_offset = static_cast<uint32_t>(page.value_offset());
  layout.key_scale_offset = static_cast<uint32_t>(page.key_scale_offset());
  layout.value_scale_offset = static_cast<uint32_t>(page.value_scale_offset());
  layout.log_mass_offset = static_cast<uint32_t>(page.log_mass_offset());
  return layout;
}

cudaError_t StepTables::Begin(const OpContext& context, const StepArgs& args) {
  End();
  const size_t layers = static_cast<size_t>(args.layers), count = args.sequences.size() / layers;
  const size_t layer_heads = count * static_cast<size_t>(args.kv_heads);
  const size_t heads_at = count * sizeof(SequenceTable);
  const size_t positions_at = heads_at + layers * layer_heads * sizeof(HeadTable);
  const size_t ids_at = positions_at + args.positions.size_bytes();
  cudaError_t error;
  const Staging::Table table = context.staging->Take(
      ids_at + IdsOf(args.sequences, args.pool, args.kv_heads) * sizeof(BlockId), &error);
  if (table.host == nullptr) return error;

  auto* sequence_out = reinterpret_cast<SequenceTable*>(table.host);
  for (const KvSequence& sequence : args.sequences.first(count))
    *sequence_out++ = {sequence.first_row, sequence.rows, sequence.exact_entries};
  std::copy(args.positions.begin(), args.positions.end(),
            reinterpret_cast<int32_t*>(table.host + positions_at));
  auto* heads = reinterpret_cast<HeadTable*>(table.host + heads_at);
  IdList ids(table.host + ids_at);
  for (size_t layer = 0; layer < layers; ++layer) {
    KvTables& tables = tables_.emplace_back();
    tables.sequences = reinterpret_cast<const SequenceTable*>(table.device);
    tables.heads = reinterpret_cast<const HeadTable*>(table.device + heads_at) + layer * layer_heads;
    tables.blocks = reinterpret_cast<const BlockId*>(table.device + ids_at);
    tables.count = static_cast<int32_t>(count);
    tables.kv_heads = args.kv_heads;
    tables.pool = args.pool.data;
    tables.block_bytes = args.pool.block_bytes;
    tables.exact = LayoutOf(*args.pool.exact);
    if (!FillHeads(args.sequences.subspan(layer * count, count), args.pool, heads + layer * layer_heads, ids,
                   tables)) {
      return cudaErrorInvalidValue;
    }
  }
  error = context.staging->Send(table, context.stream);
  if (error != cudaSuccess) return error;
  sequences_ = args.sequences, positions_ = args.positions;
  device_positions_ = reinterpret_cast<const int32_t*>(table.device + positions_at);
  return cudaSuccess;
}

void StepTables::End() {
  sequences_ = {}, positions_ = {};
  tables_.clear();
  plan_.Forget();
}

size_t StepTables::BytesToSend(const StepLimits& limits) {
  constexpr int64_t kPerHead = 128;          // its entry, tiles, and chunks that are not whole
  constexpr int64_t kPerId = 5;              // and its part of a chunk
  constexpr int64_t kPerLogitRow = 8 << 10;  // adjustments
  constexpr int64_t kFew = 1 << 20;          // of everything
  const int64_t heads = limits.layers * limits.sequences * limits.kv_heads;
  // A quarter of the rows have their query kept, in a block for each head.
  const int64_t queries = limits.layers * limits.rows * limits.heads;
  const int64_t bytes = heads * kPerHead + limits.blocks * kPerId + queries + limits.rows * kPerId * 4 +
                        limits.logit_rows * kPerLogitRow + kFew;
  return static_cast<size_t>(bytes + bytes / 4);  // size classes
}

const KvTables* StepTables::Tables(std::span<const KvSequence> sequences) const {
  if (sequences_.empty() || sequences.size() * tables_.size() != sequences_.size()) return nullptr;
  for (size_t layer = 0; layer < tables_.size(); ++layer) {
    if (sequences.data() == sequences_.data() + layer * sequences.size()) return &tables_[layer];
  }
  return nullptr;
}

const int32_t* StepTables::Positions(std::span<const int32_t> positions) const {
  const bool same = positions.data() == positions_.data() && positions.size() == positions_.size();
  return same && !positions.empty() ? device_positions_ : nullptr;
}

KvTables TablesOf(const OpContext& context, std::span<const KvSequence> sequences, const KvPool& pool,
                  int kv_heads, cudaError_t* error) {
  *error = cudaSuccess;
  if (InStep(context, sequences)) return *context.step->Tables(sequences);
  StepTables own;
  *error = own.Begin(context, {sequences, 1, {}, pool, kv_heads});
  return *error == cudaSuccess ? *own.Tables(sequences) : KvTables();
}

const int32_t* PositionsOf(const OpContext& context, std::span<const int32_t> positions, cudaError_t* error) {
  *error = cudaSuccess;
  const int32_t* there = context.step != nullptr ? context.step->Positions(positions) : nullptr;
  return there != nullptr ? there : context.staging->Upload(positions, context.stream, error);
}

}  // namespace atp::cuda
