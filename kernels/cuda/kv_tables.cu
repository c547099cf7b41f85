#include <algorithm>
#include <cstring>

#include "absl/base/macros.h"
#include "kernels/cuda/kv_tables.h"

namespace atp::cuda {
namespace {

int32_t BlocksOf(int32_t entries, const KvPage* page) {
  return entries > 0 ? CeilDiv(entries, static_cast<int32_t>(page->entries())) : 0;
}

// Which of the pages seen so far this is, by layout: formats are few, heads are many.
int32_t PageIndex(const KvPage& page, const KvPage** seen, int32_t* count) {
  for (int32_t i = 0; i < *count; ++i) {
    if (seen[i] == &page || (seen[i]->format() == page.format() && seen[i]->entries() == page.entries()))
      return i;
  }
  ABSL_ASSERT(*count < KvTables::kMaxPages);
  seen[*count] = &page;
  return (*count)++;
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

KvTables UploadKvTables(const OpContext& context, std::span<const KvSequence> sequences, const KvPool& pool,
                        int kv_heads, bool principal, cudaError_t* error) {
  KvTables tables;
  tables.count = static_cast<int32_t>(sequences.size());
  tables.kv_heads = kv_heads;
  tables.pool = pool.data;
  tables.block_bytes = pool.block_bytes;
  tables.exact = LayoutOf(*pool.exact);

  size_t blocks = 0;
  for (const KvSequence& sequence : sequences) {
    for (int h = 0; h < kv_heads; ++h) {
      const KvHeadBlocks& head = sequence.heads[h];
      blocks += static_cast<size_t>(BlocksOf(sequence.exact_entries, pool.exact));
      if (principal) blocks += static_cast<size_t>(BlocksOf(head.principal_entries, head.principal_page));
    }
  }
  const size_t heads_at = sequences.size() * sizeof(SequenceTable);
  const size_t blocks_at = heads_at + sequences.size() * static_cast<size_t>(kv_heads) * sizeof(HeadTable);
  const Staging::Table table = context.staging->Take(blocks_at + blocks * sizeof(BlockId), error);
  if (table.host == nullptr) return tables;

  auto* sequence_out = reinterpret_cast<SequenceTable*>(table.host);
  auto* head_out = reinterpret_cast<HeadTable*>(table.host + heads_at);
  auto* block_out = reinterpret_cast<BlockId*>(table.host + blocks_at);
  const KvPage* pages[KvTables::kMaxPages];
  int32_t page_count = 0, used = 0;
  const auto append = [&](const BlockId* ids, int32_t count) {
    std::copy_n(ids, count, block_out + used);
    used += count;
    return used - count;
  };
  for (const KvSequence& sequence : sequences) {
    *sequence_out++ = {sequence.first_row, sequence.rows, sequence.exact_entries};
    for (int h = 0; h < kv_heads; ++h) {
      const KvHeadBlocks& head = sequence.heads[h];
      HeadTable entry;
      entry.exact = append(head.exact, BlocksOf(sequence.exact_entries, pool.exact));
      if (principal && head.principal_entries > 0) {
        entry.principal = append(head.principal, BlocksOf(head.principal_entries, head.principal_page));
        entry.principal_entries = head.principal_entries;
        entry.page = PageIndex(*head.principal_page, pages, &page_count);
      }
      *head_out++ = entry;
    }
  }
  for (int32_t i = 0; i < page_count; ++i) tables.pages[i] = LayoutOf(*pages[i]);
  *error = context.staging->Send(table, context.stream);
  tables.sequences = reinterpret_cast<const SequenceTable*>(table.device);
  tables.heads = reinterpret_cast<const HeadTable*>(table.device + heads_at);
  tables.blocks = reinterpret_cast<const BlockId*>(table.device + blocks_at);
  return tables;
}

}  // namespace atp::cuda
