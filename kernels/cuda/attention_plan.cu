#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/online_softmax.cuh"

namespace atp::cuda {
namespace {

bool HasF32(const AttentionArgs& args) {
  if (args.pool.exact->format() == KvFormat::kF32) return true;
  for (const KvSequence& sequence : args.sequences) {
    for (int h = 0; h < args.kv_heads; ++h) {
      const KvHeadBlocks& head = sequence.heads[h];
      if (head.principal_entries > 0 && head.principal_page->format() == KvFormat::kF32) return true;
    }
  }
  return false;
}

bool SameWork(const KvHeadBlocks& a, const KvHeadBlocks& b) {
  return a.principal_entries == b.principal_entries &&
         (a.principal_entries == 0 || a.principal_page->format() == b.principal_page->format());
}

}  // namespace

void AttentionPlan::EndWave() {
  wave_.tiles_end = few.size();
  for (int p = 0; p < 2; ++p) {
    for (int f = 0; f < kKvFormatCount; ++f) wave_.work_end[p][f] = work[p][f].size();
  }
  slots = std::max(slots, wave_.slots);
  waves.push_back(wave_);
  wave_ = {};
}

void AttentionPlan::AddFew(const AttentionArgs& args, int s, int kv_head, int most_slots) {
  const KvSequence& sequence = args.sequences[static_cast<size_t>(s)];
  const KvHeadBlocks& head = sequence.heads[kv_head];
  const int group = args.heads / args.kv_heads, packed = sequence.rows * group;
  for (int tile = 0; tile < CeilDiv(packed, kFewQueries); ++tile) {
    const int last_row = (std::min((tile + 1) * kFewQueries, packed) - 1) / group;
    const int exact = sequence.exact_entries - sequence.rows + last_row + 1;
    const int principal_chunks = CeilDiv(head.principal_entries, kChunkEntries);
    const int chunks = principal_chunks + CeilDiv(exact, kChunkEntries);
    if (wave_.slots > 0 && chunks > most_slots - wave_.slots) EndWave();
    const int first = wave_.slots, index = static_cast<int>(few.size());
    for (int i = 0; i < chunks; ++i) {
      const bool principal = i < principal_chunks;
      const KvPage* page = principal ? head.principal_page : args.pool.exact;
      work[principal][static_cast<int>(page->format())].push_back(
          {index, principal ? i : i - principal_chunks, wave_.slots++});
    }
    few.push_back({s, kv_head, tile, first, chunks});
  }
}

void AttentionPlan::Make(const AttentionArgs& args, int tile_queries_wide, int tile_queries,
                         size_t scratch_bytes) {
  few.clear(), many.clear(), waves.clear();
  for (auto& part : work) {
    for (auto& items_of : part) items_of.clear();
  }
  wave_ = {};
  wide = HasF32(args), slots = 0, queries = 1;
  const int group = args.heads / args.kv_heads;
  for (const KvSequence& sequence : args.sequences) {
    if (sequence.rows * group < kManyQueries)
      queries = std::max(queries, std::min(sequence.rows * group, kFewQueries));
  }
  const size_t slot_bytes =
      static_cast<size_t>(queries) * static_cast<size_t>(args.pool.exact->head_dim() + 2) * sizeof(float);
  const int most_slots = static_cast<int>(std::max<size_t>(1, scratch_bytes / slot_bytes));
  for (int s = 0; s < static_cast<int>(args.sequences.size()); ++s) {
    const int packed = args.sequences[static_cast<size_t>(s)].rows * group;
    for (int h = 0; h < args.kv_heads; ++h) {
      if (packed < kManyQueries) {
        AddFew(args, s, h, most_slots);
        continue;
      }
      // The last rows see most: they begin first.
      for (int tile = CeilDiv(packed, wide ? tile_queries_wide : tile_queries); tile-- > 0;)
        many.push_back({s, h, tile, 0, 0});
    }
  }
  if (!few.empty()) EndWave();
  // The same scratch for numbers that are nearly the same.
  const auto rounded = static_cast<int>(SizeClass(static_cast<size_t>(slots)));
  slots = std::max(slots, std::min(rounded, most_slots));
  made_of_ = args.sequences;
}

bool AttentionPlan::Serves(const AttentionArgs& args) const {
  if (made_of_.empty() || made_of_.size() != args.sequences.size()) return false;
  for (size_t s = 0; s < made_of_.size(); ++s) {
    const KvSequence &a = made_of_[s], &b = args.sequences[s];
    if (a.rows != b.rows || a.exact_entries != b.exact_entries) return false;
    for (int h = 0; h < args.kv_heads; ++h) {
      if (!SameWork(a.heads[h], b.heads[h])) return false;
    }
  }
  return true;
}

cudaError_t AttentionPlan::Upload(const OpContext& context) {
  const auto for_each = [this](const auto& visit) {
    visit(few, &few_tiles), visit(many, &many_tiles);
    for (int p = 0; p < 2; ++p) {
      for (int f = 0; f < kKvFormatCount; ++f) visit(work[p][f], &items[p][f]);
    }
  };
  // Each list has room of its own: one that grows a little moves no other.
  size_t bytes = 0;
  for_each([&](const auto& list, auto* /*device*/) {
    if (!list.empty()) bytes += SizeClass(list.size() * sizeof(list[0]));
  });
  cudaError_t error;
  const Staging::Table table = context.staging->Take(bytes, &error);
  if (table.host == nullptr) return error;
  size_t at = 0;
  for_each([&](const auto& list, auto* device) {
    *device = nullptr;
    if (list.empty()) return;
    std::memcpy(table.host + at, list.data(), list.size() * sizeof(list[0]));
    *device = reinterpret_cast<std::remove_pointer_t<decltype(device)>>(table.device + at);
    at += SizeClass(list.size() * sizeof(list[0]));
  });
  return context.staging->Send(table, context.stream);
}

}  // namespace atp::cuda
