// The loops behind the cpu backend's ops, one function per op and target. Each does a part of an op that is
// independent of all other parts, so that any thread may do it in any order; none allocates.
#ifndef ATP_KERNELS_CPU_OPS_H_
#define ATP_KERNELS_CPU_OPS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/op_args.h"

namespace atp::cpu {

// Matrix products (matmul_float.cc, matmul_bf16.cc, matmul_int8.cc) go in two steps: the rows of x are put
// into the form and order that the kernel reads, in tiles of `tile_rows` rows (the last tile has what is
// left), and then parts of y are computed. x is always read in words of four bytes, of a tile: [word][row of
// the tile].
enum class RowForm {
  kF32,   // a word is one element
  kBF16,  // two elements, rounded to bf16
  kInt8,  // four elements, rounded to int8 (or half as many, as int16) under one scale per group
};
// Blocks of 32 elements under one scale, counted from the row's start: 256 elements, as llama.cpp has it for
// its K-quants. The weights' scales alone change from block to block, so that a row's is applied rarely.
inline constexpr int64_t kRowGroupBlocks = 8;
// Further words that kInt8 keeps per 32 elements, of a tile: [block][RowWord][row of the tile].
enum RowWord : int {
  kRowScale,      // fp32: element = scale · integer; the group's
  kRowSum,        // fp32: sum of the integers
  kRowOffset,     // int32: -128 · sum
  kRowHalfFirst,  // int32: -32 · sum of the first 16
  kRowHalfSecond,
  kRowWords,
};
// Kernels may read, and then leave unused, so many words behind the last.
inline constexpr size_t kReadPast = 1024;
struct PackedRows {
  uint32_t* words;  // tile t starts at t * tile_rows * words_per_row
  uint32_t* block_words;
  int64_t words_per_row;
  int64_t block_words_per_row;
  int tile_rows;
};
struct MatMulPart {
  int64_t row_begin, row_end;      // row_begin: a multiple of tile_rows
  int64_t panel_begin, panel_end;  // both even, kernels/cpu/panels.h
};
// Rows of a part: unpacking weights is lost among so many, and their x fits a core's second-level cache. (A
// few more, where tiles end.)
inline constexpr int64_t kMatMulRowsPerPart = 192;
inline constexpr size_t kMatMulScratchBytes = 320 << 10;
struct MatMulKernel {
  RowForm form = RowForm::kF32;
  int tile_rows = 1;    // at most,
  int few_rows = 1;     // but so many rows, or fewer, are one tile: then weights are read once
  int words_per_4 = 4;  // words that four elements of x take
  // Tiles [begin, end).
  void (*pack_rows)(const MatMulArgs& args, const PackedRows& rows, int64_t begin, int64_t end) = nullptr;
  // scratch: kMatMulScratchBytes, 64-byte aligned. Splitting in any way gives bit-identical results.
  void (*multiply)(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part,
                   std::byte* scratch) = nullptr;
  int64_t rows_per_part = kMatMulRowsPerPart;  // at most; fewer where they are long
};
MatMulKernel FloatMatMulFor(const Isa& isa);   // f32, f16, bf16
MatMulKernel BF16MatMulFor(const Isa& isa);    // bf16 with x in bf16; `multiply` is null where the ISA cannot
MatMulKernel Int8MatMulFor(const Isa& isa);    // q8_0, q4_0, q4
MatMulKernel KQuantMatMulFor(const Isa& isa);  // q4_k, q5_k, q6_k
// With AMX; `multiply` is null where there is none.
MatMulKernel AmxInt8MatMulFor(const Isa& isa);  // block-quantised weights: the bits of the two above
MatMulKernel AmxBF16MatMulFor(
    const Isa& isa);  // BF16MatMulFor's, of a multiple of 32 columns; bits of its own

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

// low_rank.cc: the parts of LowRankInput that are no matrix products.
struct LowRankLoops {
  // Columns [begin, end): their means, in the last row of args.right, and x less these in centred [rows,
  // dim].
  void (*centre)(const LowRankInputArgs& args, int64_t begin, int64_t end, float* centred) = nullptr;
  // columns: [count, size]. Each becomes orthogonal to those before, of length 1 or 0 where nothing is left.
  void (*orthonormalize)(float* columns, int64_t count, int64_t size) = nullptr;
};
LowRankLoops LowRankLoopsFor(int64_t target);

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_OPS_H_
