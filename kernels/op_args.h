// One plain struct per op. Pointers are device memory of the backend unless a comment says host; activations
// are fp32, row-major. A "row" is one token of the step's batch; rows of different sequences lie side by
// side.
#ifndef ATP_KERNELS_OP_ARGS_H_
#define ATP_KERNELS_OP_ARGS_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/kv_page.h"
#include "kernels/tensor_view.h"

namespace atp {

// out[i] = table[indices[i]], converted to fp32: token embedding, and picking the rows whose logits are
// wanted.
struct GatherRowsArgs {
  TensorView table;                  // [n, dim], any DType
  std::span<const int32_t> indices;  // host, [rows], each in [0, n)
  float* out = nullptr;              // [rows, dim]
};

// y = x·Wᵀ + bias, or y += x·Wᵀ + bias (residual connection). Each output element is accumulated in an order
// that does not depend on `rows`: that is what makes results independent of the batch.
struct MatMulArgs {
  const float* x = nullptr;     // [rows, in]
  TensorView weight;            // [out, in], any DType
  const float* bias = nullptr;  // [out] or null
  float* y = nullptr;           // [rows, out]; must not alias x
  int64_t rows = 0;
  bool accumulate = false;
};

// y = x / sqrt(mean(x²) + eps) · weight
struct RmsNormArgs {
  const float* x = nullptr;       // [rows, dim]
  const float* weight = nullptr;  // [dim]
  float* y = nullptr;             // [rows, dim]; may alias x
  int64_t rows = 0;
  int64_t dim = 0;
  float epsilon = 0;
};

// Rotates pairs (i, i + head_dim/2) of every head in place by angle positions[row] · inverse_frequency[i]
// (half-split pairs, as in Hugging Face checkpoints). The angle is computed in double, so far positions stay
// exact.
struct RopeArgs {
  float* x = nullptr;                        // [rows, heads, head_dim], in place
  std::span<const int32_t> positions;        // host, [rows]
  const float* inverse_frequency = nullptr;  // [head_dim / 2]
  int heads = 0;
  int head_dim = 0;
};

// out = silu(gate) · up
struct SwiGluArgs {
  const float* gate = nullptr;  // [rows, dim]
  const float* up = nullptr;    // [rows, dim]
  float* out = nullptr;         // [rows, dim]; may alias gate or up
  int64_t rows = 0;
  int64_t dim = 0;
};

// What one sequence holds in one kv head of one layer. Block ids live on the host.
struct KvHeadBlocks {
  const BlockId* exact =
      nullptr;  // [ceil(exact_entries / exact page entries)] blocks of exact tokens, in order
  const BlockId* principal =
      nullptr;  // [ceil(principal_entries / principal page entries)], all visible to every row
  int32_t principal_entries = 0;           // differs from head to head
  const KvPage* principal_page = nullptr;  // so does the format; null where there are none
};

// One sequence's part of the step's batch, in one layer. `exact_entries` counts this step's tokens too, whose
// keys and values StoreKv writes into the last `rows` entries; row i of the sequence sees exact entries [0,
// exact_entries - rows + i]. Entry counts and positions are different things: compressed history shortens the
// one, never the other.
struct KvSequence {
  int32_t first_row = 0;
  int32_t rows = 0;
  int32_t exact_entries = 0;
  const KvHeadBlocks* heads = nullptr;  // host, [kv_heads] of this layer
};

// The pool and how its blocks are laid out.
struct KvPool {
  std::byte* data = nullptr;  // pool; the page or block with id b starts at data + b * block_bytes
  size_t block_bytes = 0;     // from one id to the next: less than a page where several share a block
  const KvPage* exact = nullptr;
};

// What the ops of a step share. Where theirs are views of these (one layer of `sequences`, all of
// `positions`) a device has the contents already.
struct StepArgs {
  std::span<const KvSequence> sequences;  // host, [layers, sequences of the batch]
  int layers = 0;
  std::span<const int32_t> positions;  // host, [rows]
  KvPool pool;
  int kv_heads = 0;
};

// Writes keys and values of the step's tokens into the exact blocks of their sequences.
struct StoreKvArgs {
  const float* key = nullptr;    // [rows, kv_heads, head_dim], rotated
  const float* value = nullptr;  // [rows, kv_heads, head_dim]
  std::span<const KvSequence> sequences;
  KvPool pool;
  int kv_heads = 0;
};

// Rope of queries and keys and StoreKv in one.
struct RotateAndStoreArgs {
  float* query = nullptr;                    // [rows, heads, head_dim], in place
  float* key = nullptr;                      // [rows, kv_heads, head_dim]; afterwards rotated or not
  const float* value = nullptr;              // [rows, kv_heads, head_dim]
  std::span<const int32_t> positions;        // host, [rows]
  const float* inverse_frequency = nullptr;  // [head_dim / 2]
  std::span<const KvSequence> sequences;     // all rows belong to one of them
  KvPool pool;
  int heads = 0;
  int kv_heads = 0;
};

// out = softmax(scale · q·Kᵀ + log_mass) V over the principal entries and the causally visible exact entries
// of each row's sequence. One kernel family for exact and compressed context. Query head h reads kv head h /
// (heads / kv_heads).
struct AttentionArgs {
  const float* query = nullptr;  // [rows, heads, head_dim], rotated
  float* out = nullptr;          // [rows, heads, head_dim]
  std::span<const KvSequence> sequences;
  KvPool pool;
  int heads = 0;
  int kv_heads = 0;
  float scale = 0;  // 1/sqrt(head_dim)
};

// The queries that a segment's tokens asked, kept until it closes: they become the references of its
// principal fit. One row of the batch to keep. Layout: QueryPage in kernels/kv_page.h.
struct QuerySampleRow {
  int32_t row = 0;                  // of the batch
  int32_t sample = 0;               // its place among the segment's samples
  const BlockId* blocks = nullptr;  // host, [heads * QueryPage::blocks_per_head()] of this layer
};

struct StoreQueriesArgs {
  const float* query = nullptr;  // [rows, heads, head_dim], not rotated
  std::span<const QuerySampleRow> rows;
  KvPool pool;
  const QueryPage* page = nullptr;
  int heads = 0;
};

// Compresses one segment in one kv head of one layer (kernels/principal_fit.h): principal entries of a capped
// history, if any, and then the segment's exact entries become `count` principal entries. Block ids live on
// the host.
struct PrincipalFitJob {
  const BlockId* principal = nullptr;
  int32_t principal_entries = 0;   // padding (log_mass -inf) included; it is left out of the fit
  const BlockId* exact = nullptr;  // begins with the segment's first block
  int32_t exact_entries = 0;
  const BlockId* queries = nullptr;    // [group * QueryPage::blocks_per_head()] of the kv head's query heads
  const int32_t* positions = nullptr;  // host, [group * samples]: where each sample is asked from
  int32_t samples = 0;                 // per query head
  int32_t forced = 0;                  // first entries that are always kept (attention sinks)
  int32_t count = 0;
  const BlockId* out = nullptr;  // [ceil(count / page entries)]; the last block is padded
  const KvPage* page = nullptr;  // of `principal` and `out`
};

struct PrincipalFitReport {
  float mass_residual = 0;    // root mean square error of the softmax mass over the references, relative
  float output_residual = 0;  // relative Frobenius error of the output over the references
  bool fitted = false;        // false: entries were kept as they are
};

struct FitPrincipalKeysArgs {
  std::span<const PrincipalFitJob> jobs;
  std::span<PrincipalFitReport> reports;  // host, one per job, valid after Synchronize()
  KvPool pool;
  const QueryPage* query_page = nullptr;
  const float* inverse_frequency = nullptr;  // [head_dim / 2]
  int group = 1;                             // query heads per kv head
};

// x ≈ left · right, of rank `rank` + 1: x's rows less their mean by a randomised SVD with one power iteration
// (Halko, Martinsson, Tropp 2011), and the mean. With X' = x - mean:
//   Q = orth(X' X'ᵀ orth(X' Ω))        Ω [dim, rank]: LowRankTestMatrix()
//   left = (Q 1), right = (QᵀX' ; mean)
// A pure function of x; columns of Q that would be rounding only are zero.
struct LowRankInputArgs {
  const float* x = nullptr;  // [rows, dim]
  float* left = nullptr;     // [rows, rank + 1]
  float* right = nullptr;    // [rank + 1, dim]
  int64_t rows = 0;
  int64_t dim = 0;
  int64_t rank = 0;  // 1 to rows - 1
};

// y = left · product + bias, or y += that: what a linear layer makes of x, `product` being what it makes of
// `right` without bias.
struct LowRankOutputArgs {
  const float* left = nullptr;     // [rows, inner]
  const float* product = nullptr;  // [inner, out]
  const float* bias = nullptr;     // [out] or null
  float* y = nullptr;              // [rows, out]
  int64_t rows = 0;
  int64_t inner = 0;
  int64_t out = 0;
  bool accumulate = false;
};

// What is done to one token's logit before a draw, in this order.
struct LogitAdjustment {
  int32_t token = 0;
  float bias = 0;          // added
  bool seen = false;       // prompt or answer has it: repetition_penalty
  int32_t times = 0;       // that the answer has it: presence_penalty + times · frequency_penalty, where > 0
  bool forbidden = false;  // becomes -inf
};

inline constexpr int kMaxTopLogprobs = 20;

// What is wanted of one row of logits. Ranges: SamplingParams in engine/request.h.
struct SampleRow {
  int32_t row = 0;
  int32_t given = -1;     // at least 0: nothing is drawn, this is the token
  float temperature = 1;  // 0: the best token
  int32_t top_k = 0;      // 0: all
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  double uniform = 0;         // the draw's random number, in [0, 1)
  int32_t top_logprobs = -1;  // -1: no log probabilities; else of the token, and of so many likely ones
  std::span<const LogitAdjustment> adjustments;  // host, of distinct tokens in [0, vocab)
};

struct SampledRow {
  int32_t token = 0;
  float logprob = 0;  // where asked for, under softmax(logits) as they are, as the next
  int32_t top_tokens[kMaxTopLogprobs] = {};
  float top_logprobs[kMaxTopLogprobs] = {};
};

// The next token of each row. Order of operations: adjustments; temperature; top_k; top_p; min_p; draw.
// Tokens are ranked by logit, the smaller id first among equals. Weights are exp((logit - best) /
// temperature) in double: top_p keeps the fewest tokens, by rank, with top_p of the weight of top_k's; min_p
// those of a weight of at least min_p. The draw is the token, in order of ids, in whose share of the weight
// `uniform` falls. A NaN counts as -inf and is never chosen, +inf as the largest float; if all are -inf,
// the token is 0. A row's token does not depend on the others; backends' differ where a double's last digits
// decide.
struct SampleTokensArgs {
  const float* logits = nullptr;  // [any, vocab]
  int64_t vocab = 0;
  std::span<const SampleRow> rows;  // host
  std::span<SampledRow> out;        // host, one per row, valid after Synchronize()
};

// What the largest step to come has. 0: nothing of the kind.
struct StepLimits {
  int64_t rows = 0;
  int64_t logit_rows = 0;
  int64_t sequences = 0;
  int64_t vocab = 0;
  int64_t widest = 0;  // columns of a weight matrix
  int layers = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int64_t blocks = 0;  // ids in the block tables of all layers
  // Of a principal fit, which has jobs for every kv head of every sequence.
  int64_t fit_entries = 0;     // principal and exact ones of a job
  int64_t fit_references = 0;  // group * samples
  int64_t fit_count = 0;
};

}  // namespace atp

#endif  // ATP_KERNELS_OP_ARGS_H_
