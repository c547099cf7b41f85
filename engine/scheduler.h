// Decides what runs in each step. Owns all sequences, the ids of their blocks and the prefix cache. Has no
// clock (the caller passes the time), no device pointer, and no idea what a cache byte means. One thread.
//
// The rules, and why nothing waits forever, are in engine/README.md.
#ifndef ATP_ENGINE_SCHEDULER_H_
#define ATP_ENGINE_SCHEDULER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/batch.h"
#include "engine/block_allocator.h"
#include "engine/prefix_cache.h"
#include "engine/sequence.h"

namespace atp {

struct SchedulerOptions {
  // Policy.
  int max_batch_tokens = 512;          // tokens per step
  int max_prefill_chunk_tokens = 256;  // of one sequence per step
  int max_running_sequences = 64;  // cut to what a step can always serve: max_batch_tokens, max_logit_rows
  bool prefix_cache = true;
  // What the model and the pool give.
  int max_logit_rows = 64;  // rows of logits per step
  int max_positions = 0;
  int layers = 0;
  int kv_heads = 0;
  int block_tokens = 16;
  int64_t num_blocks = 0;
  bool compressible = false;  // sequences may have a plan
};

struct SchedulerStats {
  int running = 0;  // sequences
  int running_requests = 0;
  int waiting = 0;  // sequences, preempted ones included
  int64_t blocks_total = 0;
  int64_t blocks_used = 0;    // held by sequences
  int64_t blocks_cached = 0;  // held by the prefix cache alone
  uint64_t preemptions = 0;
  uint64_t prefix_queries_tokens = 0;  // looked for, on first admissions
  uint64_t prefix_hits_tokens = 0;     // and found
  // Of running sequences; groups that are shared count for each of them.
  int64_t exact_blocks = 0;
  int64_t principal_blocks = 0;
  int64_t query_blocks = 0;
  int64_t exact_entries = 0;  // per head, summed over heads
  int64_t principal_entries = 0;
  int64_t tokens_compressed = 0;  // they see now only as principal entries
  int64_t blocks_saved = 0;       // that these tokens would take, less the principal ones
  uint64_t segments_closed = 0;   // fits of a whole segment since the start
  uint64_t tokens_closed = 0;
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);

  // InvalidArgument, with the numbers, when such a request could never be served whole. Reads constants only:
  // any thread.
  absl::Status CheckFits(int prompt_tokens, int max_tokens, const CompressionPlan* plan = nullptr) const;
  // The largest max_tokens that CheckFits() accepts, as far as longer answers need no fewer blocks (a first
  // segment that closes may free some); where none fits, what the positions leave.
  int LargestFit(int prompt_tokens, const CompressionPlan* plan = nullptr) const;
  // `max_tokens` cut to what the positions leave behind the prompt. Any thread.
  int MaxNewTokens(int prompt_tokens, int max_tokens) const;

  // Takes a new sequence, which waits. InvalidArgument as CheckFits, or for a sequence with nothing to
  // compute.
  absl::Status Admit(std::unique_ptr<Sequence> sequence);

  // Plans the next step: ends what is past its deadline, admits, preempts, takes blocks. Valid until the next
  // call. Not empty while there is a sequence that lives.
  const Batch& Schedule(absl::Time now);

  // After the step was computed. tokens: one per entry of the batch; ignored where the entry's sequence does
  // not sample (its rows end before its last token).
  void Commit(const Batch& batch, std::span<const TokenId> tokens);

  // All of these free the blocks at once.
  void Finish(Sequence* sequence, FinishReason reason);  // running or waiting; no-op when finished
  void Cancel(RequestId id);  // every answer of it, in any state; unknown ids are fine
  void FinishAll(FinishReason reason);
  void FinishRunning(FinishReason reason);
  void DropPrefixCache();  // its bytes can no longer be trusted; nothing may be running

  // Sequences that finished since the last call, in the order in which they did.
  std::vector<std::unique_ptr<Sequence>> TakeFinished();

  bool empty() const { return running_.empty() && waiting_.empty(); }
  SchedulerStats stats() const;
  // The longest segment that the first in the order of service gets whole in every step, whoever decodes:
  // plans whose linear layers take low-rank inputs must have none that are longer. And where all its rows
  // want logits.
  static int LongestSegment(const SchedulerOptions& options);
  static int LongestScoredSegment(const SchedulerOptions& options);
  int max_running_sequences() const { return max_running_; }

  // Whether every block and every count is where it belongs. For tests; slow.
  absl::Status CheckInvariants() const;

 private:
  using Order = std::pair<int64_t, uint64_t>;  // (-priority, arrival): Sequence::Before
  using Waiting = std::map<Order, std::unique_ptr<Sequence>>;

  static Order OrderOf(const Sequence& s) { return {-static_cast<int64_t>(s.priority()), s.arrival_}; }

  void ExpireDeadlines(absl::Time now);
  void PlanDecodes();
  void PlanPrefillsAndAdmissions();
  void BuildBatch();

  // Running sequences.
  bool PlanRows(Sequence* s);  // false: it was preempted itself
  int ChunkRows(const Sequence& s) const;
  int WantedLogits(const Sequence& s, int rows) const;
  bool EnsureBlocks(Sequence* s, int rows);
  bool TakeBlocks(Sequence* s, int rows);
  std::optional<BlockGroup> AllocateGroup(int blocks);
  void Preempt(Sequence* s);

  // Waiting sequences.
  bool TryAdmit(Waiting::iterator position);
  bool MakeRoom(const Sequence& s);
  bool WaitsForSibling(const Sequence& s) const;
  PrefixMatch MatchPrefix(const Sequence& s) const;
  int64_t BlocksShort(const Sequence& s) const;
  int64_t BlocksStillWanted(const Sequence& running) const;

  // Compression.
  bool IsLowRank(const Sequence& s, int position) const;
  bool FitsOpenSegment(const Sequence& s) const;
  bool ClosesSegment(const Sequence& s, int rows) const;
  void AdvanceWindow(Sequence* s);
  int64_t PeakBlocks(const CompressionPlan* plan, int fitted_segments, int from, int to) const;

  void IndexFullBlocks(Sequence* s);
  std::optional<CompressionKey> KeyOfBlock(const Sequence& s, int block) const;
  void RebuildTable(Sequence* s);
  absl::Status CheckCompression(const Sequence& s) const;
  void ReleaseBlocks(Sequence* s);
  std::unique_ptr<Sequence> RemoveRunning(Sequence* s);
  Sequence::Held Held(const Sequence& s) const;
  void MoveToFinished(std::unique_ptr<Sequence> s, FinishReason reason);

  int Groups(int entries) const { return (entries + options_.block_tokens - 1) / options_.block_tokens; }
  int group_blocks() const { return options_.layers * options_.kv_heads; }

  const SchedulerOptions options_;
  const int max_running_;
  BlockAllocator allocator_;
  PrefixCache cache_;

  std::vector<std::unique_ptr<Sequence>> running_;  // in order of service: the last is the first victim
  Waiting waiting_;                                 // in order of service
  std::vector<std::unique_ptr<Sequence>> finished_;

  Batch batch_;
  int tokens_left_ = 0;  // of the step being planned
  int logits_left_ = 0;
  std::optional<Order> first_preempted_;  // in it: nobody from here on is admitted in the same step
  mutable std::vector<TokenId> tokens_scratch_;

  uint64_t arrivals_ = 0;
  absl::Time next_deadline_ = absl::InfiniteFuture();
  uint64_t preemptions_ = 0;
  uint64_t prefix_queries_tokens_ = 0;
  uint64_t prefix_hits_tokens_ = 0;
  uint64_t segments_closed_ = 0;
  uint64_t tokens_closed_ = 0;
};

}  // namespace atp

#endif  // ATP_ENGINE_SCHEDULER_H_
