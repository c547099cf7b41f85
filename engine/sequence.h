// One answer of one request, as the scheduler sees it. n answers are n sequences that share the prompt's
// blocks through the prefix cache. Owned by the scheduler from Admit to TakeFinished.
#ifndef ATP_ENGINE_SEQUENCE_H_
#define ATP_ENGINE_SEQUENCE_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/answer_stream.h"
#include "engine/block_allocator.h"
#include "engine/block_table.h"
#include "engine/compression_plan.h"
#include "engine/prefix_cache.h"
#include "engine/request.h"

namespace atp {

// waiting ──► running ──► finished
//    ▲           │            ▲
//    └─preempted─┘            └── from waiting, too (cancelled, deadline, shutdown)
// A preempted sequence waits like any other, with its tokens kept and its blocks gone.
enum class SequenceState : uint8_t { kWaiting, kRunning, kFinished };

class Sequence {
 public:
  // `request` is shared with the other answers and never changes. `max_new_tokens`:
  // SamplingParams::max_tokens, cut to what the model's positions leave. `stream` receives what is generated;
  // the scheduler never looks at it. `plan`: how its history is compressed; null: exact.
  Sequence(RequestId id, std::shared_ptr<const Request> request, int index, int max_new_tokens,
           std::unique_ptr<AnswerStream> stream, std::shared_ptr<const CompressionPlan> plan = nullptr);
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  // --- what it is ---
  RequestId id() const { return id_; }
  int index() const { return index_; }  // which of the n answers
  const Request& request() const { return *request_; }
  int priority() const { return request_->priority; }
  int max_new_tokens() const { return max_new_tokens_; }
  const CompressionPlan* plan() const { return plan_.get(); }
  // Segments that will be compressed, because a token that may be computed sees them so; 0: it is exact, plan
  // or not, and nothing is spent on compression.
  int fitted_segments() const { return fitted_segments_; }
  // Segments at the start of its prompt whose linear layers take low-rank inputs: each is computed whole, in
  // one step, or found whole. Never among them: what is generated, the prompt's last token, whose logits
  // begin the answer, and a prompt that is scored, since a low-rank row has seen the rows behind it.
  int low_rank_segments() const { return low_rank_segments_; }
  // For eval, before it is admitted: whole segments of the first `tokens` tokens, scored or not.
  void SetLowRankTokens(int tokens) {
    low_rank_segments_ = plan_ != nullptr ? plan_->LowRankSegments(tokens) : 0;
  }
  // Whether log probabilities of the prompt are wanted: then every row of it needs logits.
  bool scores_prompt() const { return request_->echo_prompt && request_->sampling.logprobs.has_value(); }

  // --- its tokens: prompt, then what was generated; kept over preemption ---
  std::span<const TokenId> prompt() const { return request_->prompt; }
  std::span<const TokenId> generated() const { return generated_; }
  int prompt_tokens() const { return static_cast<int>(request_->prompt.size()); }
  int total_tokens() const { return prompt_tokens() + static_cast<int>(generated_.size()); }
  int max_total_tokens() const { return prompt_tokens() + max_new_tokens_; }
  TokenId token(int i) const {
    return i < prompt_tokens() ? request_->prompt[i] : generated_[i - prompt_tokens()];
  }

  // --- where it stands ---
  SequenceState state() const { return state_; }
  FinishReason finish_reason() const { return finish_reason_; }  // meaningful when finished
  // Tokens whose keys and values were computed: the position of the next one.
  int position() const { return position_; }
  // Entries its exact blocks hold. A different thing from the position: compressed history shortens this one
  // only.
  int exact_entries() const { return exact_entries_; }
  std::span<const BlockGroup> groups() const { return groups_; }
  // Segments whose principal entries it sees instead of their tokens.
  int visible_segments() const { return visible_segments_; }
  // Principal groups it holds, of segments in a row: those that it sees first, then those still in the
  // window.
  std::span<const BlockGroup> principal_groups() const { return principal_; }
  const BlockGroup& query_group() const { return queries_; }
  int64_t held_blocks() const;                         // in all its groups
  const BlockTable& table() const { return *table_; }  // of a running sequence
  int cached_tokens() const { return cached_tokens_; }
  // What it held when it finished.
  struct Held {
    int tokens = 0;
    int compressed_tokens = 0;
    int64_t entries = 0;  // over layers and kv heads
    int64_t blocks = 0;
  };
  const Held& held() const { return held_; }
  // Prompt rows whose logits were seen; rows before are not asked for again after a preemption.
  int scored_tokens() const { return scored_tokens_; }

  AnswerStream* stream() const { return stream_.get(); }

  // Order of service: higher priority first, then who came first. Total, and fixed for life.
  static bool Before(const Sequence& a, const Sequence& b) {
    return a.priority() != b.priority() ? a.priority() > b.priority() : a.arrival_ < b.arrival_;
  }

 private:
  friend class Scheduler;  // the only one to change it

  RequestId id_;
  std::shared_ptr<const Request> request_;
  int index_;
  int max_new_tokens_;
  std::unique_ptr<AnswerStream> stream_;
  std::shared_ptr<const CompressionPlan> plan_;
  int fitted_segments_;
  int low_rank_segments_ = 0;
  std::vector<TokenId> generated_;

  SequenceState state_ = SequenceState::kWaiting;
  FinishReason finish_reason_ = FinishReason::kStop;
  uint64_t arrival_ = 0;  // given by Admit

  int position_ = 0;
  int exact_entries_ = 0;
  int cached_tokens_ = 0;
  int scored_tokens_ = 0;
  Held held_;
  bool was_running_ = false;  // cached tokens count once, not again after a preemption

  // One per block of exact tokens, in order, from the first token that is not compressed.
  std::vector<BlockGroup> groups_;
  int visible_segments_ = 0;
  int closed_segments_ = 0;  // of the fitted ones: those whose principal entries are computed
  int first_principal_ = 0;  // segment of principal_[0]
  std::vector<BlockGroup> principal_;
  BlockGroup queries_;                 // kept queries of the open segment; from the first to the last fit
  std::unique_ptr<BlockTable> table_;  // the ids of all these
  PrefixNode cache_node_;              // the prefix cache's name of the first indexed_blocks_ blocks
  int indexed_blocks_ = 0;             // of its tokens, compressed ones too
  bool indexing_ = true;               // false: the prefix cache had no room for more of it

  int planned_rows_ = 0;  // in the step being made
  int planned_logits_ = 0;
};

}  // namespace atp

#endif  // ATP_ENGINE_SEQUENCE_H_
