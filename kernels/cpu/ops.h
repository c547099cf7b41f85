// The loops behind the cpu backend's ops, one function per op and target. Each does a part of an op that is
// independent of all other parts, so that any thread may do it in any order; none allocates.
#ifndef ATP_KERNELS_CPU_OPS_H_
#define ATP_KERNELS_CPU_OPS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/op_args.h"

namespace atp::cpu {

// matmul.cc: y[row_begin..row_end, out_begin..out_end]. panel: scratch of kMatMulPanelFloats, 64-byte
// aligned. Splitting rows or outs in any way gives bit-identical results.
struct MatMulPart {
  int64_t row_begin, row_end;
  int64_t out_begin, out_end;
};
inline constexpr int64_t kMatMulRowsPerPart = 128;  // a part's x fits a core's second-level cache
inline constexpr int64_t kMatMulOutsPerTile =
    12;  // a multiple of every target's tile; parts should be multiples of it
inline constexpr size_t kMatMulPanelFloats = 8 * 1024;
using MatMulFn = void (*)(const MatMulArgs& args, const MatMulPart& part, float* panel);
MatMulFn MatMulFor(int64_t target);

// norm.cc, gather.cc: rows [begin, end).
using RmsNormFn = void (*)(const RmsNormArgs& args, int64_t begin, int64_t end);
RmsNormFn RmsNormFor(int64_t target);
using GatherRowsFn = void (*)(const GatherRowsArgs& args, int64_t begin, int64_t end);
GatherRowsFn GatherRowsFor(int64_t target);

// activation.cc: elements [begin, end) of rows * dim.
using SwiGluFn = void (*)(const SwiGluArgs& args, int64_t begin, int64_t end);
SwiGluFn SwiGluFor(int64_t target);

// rope.cc: rows [begin, end). angles: [rows, 2, head_dim / 2], the cosines of a row and then its sines.
using RopeFn = void (*)(const RopeArgs& args, const float* angles, int64_t begin, int64_t end);
RopeFn RopeFor(int64_t target);

// kv_store.cc: this step's entries of one sequence in one kv head.
using StoreKvFn = void (*)(const StoreKvArgs& args, const KvSequence& sequence, int kv_head);
StoreKvFn StoreKvFor(int64_t target);

// attention.cc: rows [row_begin, row_end) of one sequence, all query heads of one kv head, over chunks
// [chunk_begin, chunk_end) of the entries that the last row sees.
// scratch: AttentionScratchFloats(...), 64-byte aligned.
struct AttentionPart {
  const KvSequence* sequence;
  int kv_head;
  int row_begin, row_end;  // counted from the sequence's first row; at most AttentionRowsPerPart(group)
  int chunk_begin, chunk_end;
  // Null: the part has all chunks and writes `out`. Else it has one, whose state it leaves here
  // (AttentionPartialFloats(...), 64-byte aligned).
  float* partial;
};
int AttentionRowsPerPart(int group);
int AttentionChunks(const AttentionPart& part);  // chunk_begin, chunk_end and partial are not read
size_t AttentionPartialFloats(int queries, int head_dim);
size_t AttentionScratchFloats(int group, int head_dim);
// next: the part that the thread will probably do next, or null.
using AttentionFn = void (*)(const AttentionArgs& args, const AttentionPart& part, const AttentionPart* next,
                             float* scratch);
AttentionFn AttentionFor(int64_t target);
// Writes `out` from the states of chunks [chunk_begin, chunk_end), which lie one behind the other at
// `partial`.
using MergeAttentionFn = void (*)(const AttentionArgs& args, const AttentionPart& part, float* scratch);
MergeAttentionFn MergeAttentionFor(int64_t target);

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_OPS_H_
