// Which block of threads attends to what in one layer, made on the host from the entry counts alone.
#ifndef ATP_KERNELS_CUDA_ATTENTION_PLAN_H_
#define ATP_KERNELS_CUDA_ATTENTION_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/ops.h"
#include "kernels/op_args.h"

namespace atp::cuda {

struct AttentionPlan {
  // Some queries of one kv head of one sequence. A packed query is row · group + head of the group.
  struct Tile {
    int32_t sequence, kv_head, tile;
    int32_t first_chunk, chunks;  // the slots of its chunks; few queries only
  };
  // One block's work where queries are few.
  struct Work {
    int32_t tile;   // index in `few`
    int32_t chunk;  // of its part
    int32_t slot;   // where its state goes
  };
  // Tiles of few queries whose chunks have slots at the same time.
  struct Wave {
    size_t tiles_end = 0;                     // in `few`
    size_t work_end[2][kKvFormatCount] = {};  // in `work`
    int slots = 0;
  };

  static constexpr int kFewQueries = 8;  // of a tile of few
  // A sequence with at least this many packed queries in a step goes the other way.
  static constexpr int kManyQueries = 8 * kFewQueries;

  // tile_queries: of a tile of many, where a page is fp32 and where none is.
  void Make(const AttentionArgs& args, int tile_queries_wide, int tile_queries, size_t scratch_bytes);
  // Whether Make() would make the same. The sequences it was made of must still be there.
  bool Serves(const AttentionArgs& args) const;
  cudaError_t Upload(const OpContext& context);
  void Forget() { made_of_ = {}; }

  std::vector<Tile> few, many;
  std::vector<Work> work[2][kKvFormatCount];  // [principal][format]
  std::vector<Wave> waves;
  bool wide = false;  // some page is fp32
  int slots = 0;      // of the largest wave, or more
  int queries = 1;    // of a slot

  // Where the lists are on the device.
  const Tile *few_tiles = nullptr, *many_tiles = nullptr;
  const Work* items[2][kKvFormatCount] = {};

 private:
  void AddFew(const AttentionArgs& args, int sequence, int kv_head, int most_slots);
  void EndWave();

  Wave wave_;  // the one in the making
  std::span<const KvSequence> made_of_;
};

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_ATTENTION_PLAN_H_
