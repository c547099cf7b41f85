#include "cli/evaluator.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <numeric>
#include <utility>

#include "engine/block_table.h"

namespace atp {
namespace {

constexpr int kRowsPerStep = 256;
constexpr int kParallelSequences = 16;
constexpr int kParallelTokens = 8192;
constexpr int64_t kLogitBytes = 64 << 20;

// One of the sequences that run side by side, in blocks of its own.
struct Lane {
  Lane(int layers, int kv_heads) : table(layers, kv_heads) {}
  BlockTable table;
  int sequence = -1;  // -1: free
  int done = 0;       // tokens in the cache
};

// The first `blocks` blocks per head of lane `lane`: lanes lie one behind the other in the pool.
void FillTable(const KvCache& kv_cache, int lane, int blocks, BlockTable* table) {
  const int heads = kv_cache.shape().heads_total();
  std::vector<BlockId> ids(static_cast<size_t>(heads));
  for (int b = 0; b < blocks; ++b) {
    std::iota(ids.begin(), ids.end(), static_cast<BlockId>((int64_t{lane} * blocks + b) * heads));
    table->AppendExact(ids);
  }
}

void Judge(std::span<const float> logits, TokenId next, Score* score) {
  const auto best = std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - *best);
  score->cross_entropy_sum += *best + std::log(sum) - logits[static_cast<size_t>(next)];
  score->right += best - logits.begin() == next ? 1 : 0;
  ++score->tokens;
}

// Adds the lane's next rows, as many as fit; false when none do.
bool AddRows(Lane* lane, const std::vector<TokenId>& ids, int first, const ModelLimits& limits,
             Batch* batch) {
  const int rows_left = limits.max_batch_rows - batch->rows();
  const int logits_left = limits.max_logit_rows - static_cast<int>(batch->logit_rows.size());
  // The last token predicts nothing that is known, so it is not computed.
  const int end = std::min(
      {static_cast<int>(ids.size()) - 1, lane->done + rows_left, std::max(lane->done, first) + logits_left});
  if (end <= lane->done) return false;
  BatchEntry entry;
  entry.table = &lane->table;
  entry.first_row = batch->rows();
  entry.rows = end - lane->done;
  entry.exact_entries = end;
  entry.first_logit = static_cast<int>(batch->logit_rows.size());
  entry.logits = std::max(0, end - std::max(lane->done, first));
  for (int p = lane->done; p < end; ++p) {
    batch->tokens.push_back(ids[static_cast<size_t>(p)]);
    batch->positions.push_back(p);
    if (p >= first) batch->logit_rows.push_back(batch->rows() - 1);
  }
  batch->entries.push_back(entry);
  lane->done = end;
  return true;
}

}  // namespace

ModelLimits EvaluationLimits(const LlamaConfig& config) {
  ModelLimits limits;
  limits.max_batch_rows = kRowsPerStep;
  limits.max_batch_entries = kParallelSequences;
  limits.max_logit_rows =
      static_cast<int>(std::clamp<int64_t>(kLogitBytes / (config.vocab_size * 4), 1, kRowsPerStep));
  return limits;
}

int ParallelSequences(size_t sequences, int context_tokens) {
  const size_t fill =
      static_cast<size_t>(std::clamp(kParallelTokens / context_tokens, 1, kParallelSequences));
  return static_cast<int>(std::clamp<size_t>(sequences, 1, fill));
}

absl::StatusOr<Score> Evaluate(LlamaModel* model, const KvCache& kv_cache, int parallel_sequences,
                               std::span<const std::vector<TokenId>> sequences, int first) {
  const LlamaConfig& config = model->config();
  size_t longest = 1;
  for (const auto& ids : sequences) longest = std::max(longest, ids.size());
  const int block_tokens = kv_cache.shape().block_tokens;
  const int blocks = (static_cast<int>(longest) + block_tokens - 1) / block_tokens;
  std::deque<Lane> lanes;
  for (int i = 0; i < parallel_sequences; ++i) {
    lanes.emplace_back(config.layers, config.kv_heads);
    FillTable(kv_cache, i, blocks, &lanes.back().table);
  }

  std::vector<Score> scores(sequences.size());
  size_t next = 0;
  const auto vocab = static_cast<size_t>(config.vocab_size);
  Batch batch;
  std::vector<Lane*> owners;  // of the batch's entries
  while (true) {
    batch.Clear();
    owners.clear();
    for (Lane& lane : lanes) {
      while (lane.sequence < 0 && next < sequences.size()) {
        if (sequences[next].size() >= 2) lane.sequence = static_cast<int>(next);
        lane.done = 0;
        ++next;
      }
      if (lane.sequence < 0) continue;
      if (AddRows(&lane, sequences[static_cast<size_t>(lane.sequence)], first, model->limits(), &batch)) {
        owners.push_back(&lane);
      }
    }
    if (batch.empty()) break;
    absl::StatusOr<std::span<const float>> logits = model->Forward(batch, kv_cache);
    if (!logits.ok()) return logits.status();
    for (size_t e = 0; e < owners.size(); ++e) {
      const BatchEntry& entry = batch.entries[e];
      const auto sequence = static_cast<size_t>(owners[e]->sequence);
      const std::vector<TokenId>& ids = sequences[sequence];
      for (int i = 0; i < entry.logits; ++i) {
        const auto row = static_cast<size_t>(entry.first_logit + i);
        const auto position =
            static_cast<size_t>(batch.positions[static_cast<size_t>(batch.logit_rows[row])]);
        Judge(logits->subspan(row * vocab, vocab), ids[position + 1], &scores[sequence]);
      }
      if (owners[e]->done + 1 >= static_cast<int>(ids.size())) owners[e]->sequence = -1;
    }
  }

  Score total;
  for (const Score& score : scores) {
    total.cross_entropy_sum += score.cross_entropy_sum;
    total.right += score.right;
    total.tokens += score.tokens;
  }
  return total;
}

}  // namespace atp
