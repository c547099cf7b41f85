#include "cli/evaluator.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/scheduler.h"

namespace atp {
namespace {

constexpr int kRowsPerStep = 256;
constexpr int kParallelSequences = 16;
constexpr int kParallelTokens = 8192;
constexpr int64_t kLogitBytes = 64 << 20;
// Exact log probabilities kept to compare with; more sequences are judged group by group.
constexpr int64_t kReferenceBytes = 256 << 20;

using Sequences = std::span<const std::vector<TokenId>>;

// Log probabilities of one sequence's judged positions under the exact cache: [positions, vocab].
using Reference = std::vector<float>;

double LogNormaliser(std::span<const float> logits, float top) {
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - top);
  return top + std::log(sum);
}

// `exact`: empty while the exact cache itself runs. `distance`: of RecallDistances().
void Judge(std::span<const float> logits, std::span<const float> exact, TokenId next, int distance,
           Score* score) {
  const auto best = std::max_element(logits.begin(), logits.end());
  const double log_sum = LogNormaliser(logits, *best);
  score->cross_entropy_sum += log_sum - logits[static_cast<size_t>(next)];
  const int right = best - logits.begin() == next ? 1 : 0;
  score->right += right;
  if (distance > 0) {
    Recall& recall = score->recall[static_cast<size_t>(std::min(std::ilogb(distance), kDistanceBuckets - 1))];
    recall.right += right;
    ++recall.tokens;
  }
  ++score->tokens;
  if (exact.empty()) {
    ++score->agree;
    return;
  }
  for (size_t i = 0; i < logits.size(); ++i) {
    const double p = exact[i];
    score->kl_sum += std::exp(p) * (p - (logits[i] - log_sum));
  }
  score->agree +=
      best - logits.begin() == std::max_element(exact.begin(), exact.end()) - exact.begin() ? 1 : 0;
}

// Runs one group of sequences in one case.
class Run {
 public:
  Run(LlamaModel* model, const KvCache& kv_cache, int parallel, int max_positions, Sequences sequences,
      int first, int recall_tokens, size_t block_bytes)
      : model_(model),
        kv_cache_(kv_cache),
        sequences_(sequences),
        first_(first),
        block_bytes_(static_cast<int64_t>(block_bytes)),
        vocab_(static_cast<size_t>(model->config().vocab_size)),
        options_(Options(*model, kv_cache, parallel, max_positions)),
        scheduler_(options_) {
    for (const auto& ids : sequences) distances_.push_back(RecallDistances(ids, recall_tokens));
  }

  // `references`: one per sequence; written where `exact`, else read. Null: there is nothing to compare.
  absl::StatusOr<std::vector<Score>> operator()(const std::shared_ptr<const CompressionPlan>& plan,
                                                bool exact, std::vector<Reference>* references) {
    if (plan != nullptr && plan->linear_rank() > 0) {
      const int longest = Scheduler::LongestScoredSegment(options_);
      if (plan->segment_tokens() > longest) {
        return absl::InvalidArgumentError(absl::StrCat("low-rank linear layers: segments of ",
                                                       plan->segment_tokens(),
                                                       " tokens, steps have room for ", longest));
      }
      if (absl::Status s = model_->ReserveLowRank(plan->segment_tokens()); !s.ok()) return s;
    }
    scores_.assign(sequences_.size(), Score());
    references_ = references;
    exact_ = exact;
    for (size_t i = 0; i < sequences_.size(); ++i) {
      if (absl::Status s = Admit(i, plan); !s.ok()) return s;
    }
    while (!scheduler_.empty()) {
      if (absl::Status s = Step(); !s.ok()) return s;
      scheduler_.TakeFinished();
    }
    return scores_;
  }

 private:
  static SchedulerOptions Options(const LlamaModel& model, const KvCache& kv_cache, int parallel,
                                  int max_positions) {
    SchedulerOptions options;
    options.max_batch_tokens = model.limits().max_batch_rows;
    options.max_prefill_chunk_tokens = model.limits().max_batch_rows;
    options.max_running_sequences = parallel;
    options.prefix_cache = false;
    options.max_logit_rows = model.limits().max_logit_rows;
    options.max_positions = max_positions;
    options.layers = kv_cache.shape().layers;
    options.kv_heads = kv_cache.shape().kv_heads;
    options.block_tokens = kv_cache.shape().block_tokens;
    options.num_blocks = kv_cache.num_blocks();
    options.compressible = kv_cache.shape().compressible;
    return options;
  }

  // The last token predicts nothing that is known, so it is not computed.
  absl::Status Admit(size_t index, const std::shared_ptr<const CompressionPlan>& plan) {
    const std::vector<TokenId>& ids = sequences_[index];
    if (ids.size() < 2) return absl::OkStatus();
    auto request = std::make_shared<Request>();
    request->prompt.assign(ids.begin(), ids.end() - 1);
    request->echo_prompt = true;
    request->sampling.logprobs = 0;
    request->sampling.max_tokens = 0;
    auto sequence = std::make_unique<Sequence>(static_cast<RequestId>(index), request, 0, 0, nullptr, plan);
    // Serving reads the logits of no low-rank row, which has seen the rows behind it: nor is one judged.
    sequence->SetLowRankTokens(std::min(first_, sequence->prompt_tokens()));
    return scheduler_.Admit(std::move(sequence));
  }

  absl::Status Step() {
    const Batch& batch = scheduler_.Schedule(absl::UnixEpoch());
    absl::StatusOr<std::span<const float>> logits = model_->Forward(batch, kv_cache_);
    if (!logits.ok()) return logits.status();
    for (const BatchEntry& entry : batch.entries) JudgeEntry(batch, entry, *logits);
    tokens_.assign(batch.entries.size(), 0);  // sampled behind the prompt, and not used
    scheduler_.Commit(batch, tokens_);
    for (const BatchEntry& entry : batch.entries) {
      Sequence* const s = entry.sequence;
      if (s->position() < s->prompt_tokens()) continue;
      Score& score = scores_[s->id()];
      score.held_bytes = s->held_blocks() * block_bytes_;
      score.exact_bytes = ExactBytes(s->prompt_tokens());
      scheduler_.Finish(s, FinishReason::kLength);
    }
    return absl::OkStatus();
  }

  int64_t ExactBytes(int tokens) const {
    const KvCache::Shape& shape = kv_cache_.shape();
    const int64_t blocks = (tokens + shape.block_tokens - 1) / shape.block_tokens;
    return blocks * shape.heads_total() * static_cast<int64_t>(kv_cache_.pool().exact->bytes());
  }

  void JudgeEntry(const Batch& batch, const BatchEntry& entry, std::span<const float> logits) {
    const size_t index = entry.sequence->id();
    const std::vector<TokenId>& ids = sequences_[index];
    for (int i = 0; i < entry.logits; ++i) {
      const auto row = static_cast<size_t>(entry.first_logit + i);
      const int position = batch.positions[static_cast<size_t>(batch.logit_rows[row])];
      if (position < first_) continue;
      const std::span<const float> values = logits.subspan(row * vocab_, vocab_);
      const auto judged = static_cast<size_t>(position - first_);
      const int distance = distances_[index][static_cast<size_t>(position)];
      if (exact_) {
        if (references_ != nullptr) Keep(values, judged, &(*references_)[index]);
        Judge(values, {}, ids[static_cast<size_t>(position) + 1], distance, &scores_[index]);
      } else {
        const std::span<const float> reference = (*references_)[index];
        Judge(values, reference.subspan(judged * vocab_, vocab_), ids[static_cast<size_t>(position) + 1],
              distance, &scores_[index]);
      }
    }
  }

  void Keep(std::span<const float> logits, size_t judged, Reference* reference) const {
    reference->resize(std::max(reference->size(), (judged + 1) * vocab_));
    const double log_sum = LogNormaliser(logits, *std::max_element(logits.begin(), logits.end()));
    std::transform(logits.begin(), logits.end(), reference->begin() + static_cast<ptrdiff_t>(judged * vocab_),
                   [log_sum](float logit) { return static_cast<float>(logit - log_sum); });
  }

  LlamaModel* const model_;
  const KvCache& kv_cache_;
  const Sequences sequences_;
  const int first_;
  const int64_t block_bytes_;
  const size_t vocab_;
  const SchedulerOptions options_;
  Scheduler scheduler_;
  std::vector<std::vector<int>> distances_;  // [sequences][positions]
  std::vector<Score> scores_;
  std::vector<Reference>* references_ = nullptr;
  bool exact_ = false;
  std::vector<TokenId> tokens_;
};

// How many of `sequences` run side by side: enough to fill a step, without a cache of many long ones.
int ParallelSequences(size_t sequences, int tokens) {
  const auto fill = static_cast<size_t>(std::clamp(kParallelTokens / tokens, 1, kParallelSequences));
  return static_cast<int>(std::clamp<size_t>(sequences, 1, fill));
}

// Blocks that a sequence of `tokens` needs in the hungriest case, and room for the scheduler to plan ahead.
int64_t BlocksPerSequence(const KvCache::Shape& shape, int tokens, std::span<const EvaluationCase> cases) {
  const int64_t group = shape.heads_total();
  int64_t blocks = (tokens + shape.block_tokens - 1) / shape.block_tokens * group;
  for (const EvaluationCase& c : cases) {
    if (c.plan != nullptr)
      blocks = std::max(blocks, c.plan->PeakBlocks(0, tokens, c.plan->FittedSegments(tokens)));
  }
  return blocks + group;
}

}  // namespace

void Score::Add(const Score& other) {
  cross_entropy_sum += other.cross_entropy_sum;
  kl_sum += other.kl_sum;
  agree += other.agree;
  right += other.right;
  tokens += other.tokens;
  held_bytes += other.held_bytes;
  exact_bytes += other.exact_bytes;
  for (size_t i = 0; i < recall.size(); ++i) {
    recall[i].right += other.recall[i].right;
    recall[i].tokens += other.recall[i].tokens;
  }
}

std::vector<int> RecallDistances(std::span<const TokenId> ids, int tokens) {
  std::vector<int> distances(ids.size(), 0);
  std::map<std::vector<TokenId>, int> last;  // where those tokens ended, most recently
  for (int p = tokens - 1; p + 1 < static_cast<int>(ids.size()); ++p) {
    const auto context = ids.subspan(static_cast<size_t>(p - tokens + 1), static_cast<size_t>(tokens));
    int& before = last.try_emplace({context.begin(), context.end()}, -1).first->second;
    if (before >= 0 && ids[static_cast<size_t>(before) + 1] == ids[static_cast<size_t>(p) + 1])
      distances[static_cast<size_t>(p)] = p - before;
    before = p;
  }
  return distances;
}

ModelLimits EvaluationLimits(const LlamaConfig& config, int low_rank_segment) {
  ModelLimits limits;
  limits.max_batch_rows = kRowsPerStep;
  limits.max_batch_entries = kParallelSequences;
  limits.max_logit_rows =
      static_cast<int>(std::clamp<int64_t>(kLogitBytes / (config.vocab_size * 4), 1, kRowsPerStep));
  if (low_rank_segment > 0) {  // a whole one beside a row of each other sequence
    limits.max_batch_rows = std::max(limits.max_batch_rows, low_rank_segment + kParallelSequences);
    limits.max_logit_rows = std::max(limits.max_logit_rows, low_rank_segment + kParallelSequences);
  }
  return limits;
}

absl::StatusOr<std::vector<Score>> Evaluate(LlamaModel* model, Backend* backend, const KvCache::Shape& shape,
                                            std::span<const std::vector<TokenId>> sequences, int first,
                                            std::span<const EvaluationCase> cases, int recall_tokens,
                                            const std::function<void(int, int)>& progress) {
  size_t longest = 2;
  for (const auto& ids : sequences) longest = std::max(longest, ids.size());
  const int tokens = static_cast<int>(longest);
  const int64_t reference_bytes =
      std::max<int64_t>(1, tokens - first) * model->config().vocab_size * static_cast<int64_t>(sizeof(float));
  // Without cases there is nothing to compare with.
  const int64_t most = cases.empty() ? std::ssize(sequences) : kReferenceBytes / reference_bytes;
  const auto group = static_cast<size_t>(std::max<int64_t>(1, most));
  const int parallel = ParallelSequences(std::min(sequences.size(), group), tokens);
  const KvPage page(shape.format, shape.block_tokens, shape.head_dim, shape.compressible);
  absl::StatusOr<KvCache> kv_cache =
      KvCache::Create(backend, shape,
                      static_cast<size_t>(parallel * BlocksPerSequence(shape, tokens, cases)) *
                          std::max(page.bytes(), shape.block_bytes));
  if (!kv_cache.ok()) return kv_cache.status();

  const int runs = static_cast<int>((sequences.size() + group - 1) / group * (cases.size() + 1));
  int done = 0;
  std::vector<Score> totals(cases.size() + 1);
  for (size_t begin = 0; begin < sequences.size(); begin += group) {
    const Sequences part = sequences.subspan(begin, std::min(group, sequences.size() - begin));
    std::vector<Reference> references(part.size());
    for (size_t c = 0; c < totals.size(); ++c) {
      const bool exact = c == 0;
      if (!exact && cases[c - 1].prepare) cases[c - 1].prepare();
      const size_t block_bytes =
          exact || cases[c - 1].block_bytes == 0 ? kv_cache->pool().exact->bytes() : cases[c - 1].block_bytes;
      Run run(model, *kv_cache, parallel, tokens, part, first, recall_tokens, block_bytes);
      absl::StatusOr<std::vector<Score>> scores =
          run(exact ? nullptr : cases[c - 1].plan, exact, cases.empty() ? nullptr : &references);
      if (!scores.ok()) return scores.status();
      for (const Score& score : *scores) totals[c].Add(score);
      if (!std::isfinite(totals[c].cross_entropy_sum + totals[c].kl_sum)) {
        return absl::InvalidArgumentError(
            "the model's logits are not finite: its weights have infinities or NaN, or overflow");
      }
      if (progress) progress(++done, runs);
    }
  }
  return totals;
}

}  // namespace atp
