// Seeded random life of a scheduler under tiny limits. After every event all blocks and counts must be where
// they belong, every step must compute something, and in the end every request must have ended. A second,
// naive model of the KV cache checks what a batch says: every entry's table must lead to blocks that hold
// exactly its tokens.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/scheduler.h"

namespace atp {
namespace {

constexpr int kEvents = 10000;

class Simulation {
 public:
  explicit Simulation(uint32_t seed) : random_(seed), options_(RandomOptions()), scheduler_(options_) {
    contents_.resize(options_.num_blocks, std::vector<TokenId>(options_.block_tokens, -1));
  }

  void Run() {
    for (int i = 0; i < kEvents && !testing::Test::HasFatalFailure(); ++i) {
      switch (Below(8)) {
        case 0:
        case 1:
          Admit();
          break;
        case 2:
          if (Below(3) == 0) Cancel();
          break;
        case 3:
          now_ += absl::Seconds(Below(3));
          break;
        case 4:
          if (Below(4) == 0) FinishEarly();
          break;
        default:
          Step();
      }
      Check();
    }
    for (int i = 0; !scheduler_.empty() && i < 200000 && !testing::Test::HasFatalFailure(); ++i) Step();
    Check();
    EXPECT_TRUE(scheduler_.empty());
    EXPECT_EQ(ended_, admitted_) << "every admitted sequence ends exactly once";
    const SchedulerStats stats = scheduler_.stats();
    EXPECT_EQ(stats.blocks_used, 0);
    preemptions_ = stats.preemptions;
    hits_ = stats.prefix_hits_tokens;
  }

  uint64_t preemptions() const { return preemptions_; }
  uint64_t hits() const { return hits_; }
  const std::set<FinishReason>& reasons() const { return reasons_; }
  int64_t refused() const { return refused_; }

 private:
  int Below(int n) { return static_cast<int>(random_() % n); }

  SchedulerOptions RandomOptions() {
    SchedulerOptions options;
    options.layers = 1 + Below(2);
    options.kv_heads = 1 + Below(2);
    options.block_tokens = 1 << Below(4);
    options.num_blocks = static_cast<int64_t>(options.layers) * options.kv_heads * (6 + Below(12)) + Below(2);
    options.max_batch_tokens = 3 + Below(30);
    options.max_prefill_chunk_tokens = 1 + Below(20);
    options.max_running_sequences = 1 + Below(8);
    options.max_logit_rows = 1 + Below(8);
    options.max_positions = 40 + Below(60);
    options.prefix_cache = Below(4) != 0;
    return options;
  }

  void Admit() {
    auto request = std::make_shared<Request>();
    request->prompt.resize(1 + Below(40));
    const int kinds = 1 + Below(3);  // few different tokens: prefixes meet
    for (TokenId& token : request->prompt) token = Below(kinds);
    request->sampling.max_tokens = Below(8) == 0 ? 60 : 1 + Below(15);
    request->sampling.n = Below(4) == 0 ? 1 + Below(3) : 1;
    request->priority = Below(3);
    if (Below(6) == 0) request->deadline = now_ + absl::Seconds(Below(40));
    if (Below(6) == 0) {
      request->echo_prompt = true;
      request->sampling.logprobs = 1;
    }
    const RequestId id = ++last_id_;
    const int prompt = static_cast<int>(request->prompt.size());
    if (!scheduler_.CheckFits(prompt, request->sampling.max_tokens).ok()) {
      ++refused_;
      return;
    }
    const int max_new_tokens = scheduler_.MaxNewTokens(prompt, request->sampling.max_tokens);
    for (int i = 0; i < request->sampling.n; ++i) {
      auto sequence = std::make_unique<Sequence>(id, request, i, max_new_tokens, nullptr);
      admitted_.insert({id, i});
      alive_.insert(sequence.get());
      ASSERT_EQ(scheduler_.Admit(std::move(sequence)), absl::OkStatus());
    }
  }

  void Cancel() {
    if (last_id_ > 0) scheduler_.Cancel(1 + Below(static_cast<int>(last_id_)));
    TakeFinished();
  }

  void FinishEarly() {  // as a stop string would, or a client that leaves
    if (alive_.empty()) return;
    auto it = alive_.begin();
    std::advance(it, Below(static_cast<int>(alive_.size())));
    scheduler_.Finish(*it, FinishReason::kStop);
    TakeFinished();
  }

  void Step() {
    const Batch& batch = scheduler_.Schedule(now_);
    ASSERT_EQ(scheduler_.CheckInvariants(), absl::OkStatus());
    ASSERT_EQ(batch.empty(), scheduler_.empty()) << "as long as somebody lives there is something to do";
    ASSERT_LE(batch.rows(), options_.max_batch_tokens);
    ASSERT_LE(static_cast<int>(batch.logit_rows.size()), options_.max_logit_rows);
    ASSERT_LE(static_cast<int>(batch.entries.size()), options_.max_running_sequences);
    std::vector<TokenId> tokens;
    for (const BatchEntry& entry : batch.entries) {
      ASSERT_GT(entry.rows, 0);
      Store(batch, entry);
    }
    for (const BatchEntry& entry : batch.entries) {
      ASSERT_NO_FATAL_FAILURE(CheckContents(entry));
      tokens.push_back(NextToken(*entry.sequence));
    }
    if (!batch.empty()) CheckTheFirstIsServed(batch);
    scheduler_.Commit(batch, tokens);
    for (const BatchEntry& entry : batch.entries) {
      Sequence* s = entry.sequence;
      ASSERT_LE(s->generated().size(), static_cast<size_t>(s->max_new_tokens()));
      if (s->generated().size() == static_cast<size_t>(s->max_new_tokens())) {
        scheduler_.Finish(s, FinishReason::kLength);
      }
    }
    TakeFinished();
  }

  // The promise behind "nothing waits forever": whoever is first in the order of service runs, or has just
  // made room.
  void CheckTheFirstIsServed(const Batch& batch) {
    const Sequence* first = nullptr;
    for (const Sequence* s : alive_) {
      if (s->state() != SequenceState::kFinished && (first == nullptr || Sequence::Before(*s, *first)))
        first = s;
    }
    const bool served = std::any_of(batch.entries.begin(), batch.entries.end(),
                                    [first](const BatchEntry& entry) { return entry.sequence == first; });
    const std::pair<RequestId, int> identity(first->id(), first->index());
    ASSERT_TRUE(served || identity != unserved_)
        << "request " << first->id() << ", first in the order of service, stood still for two steps; it has "
        << first->total_tokens() << " tokens, " << first->position() << " computed, priority "
        << first->priority() << ", state " << static_cast<int>(first->state()) << "; running "
        << scheduler_.stats().running << " of " << scheduler_.max_running_sequences();
    unserved_ = served ? std::pair<RequestId, int>() : identity;
  }

  // A pure function of the tokens so far: what a sequence generates must not depend on when it was preempted.
  static TokenId NextToken(const Sequence& s) {
    uint32_t hash = 17;
    for (int i = 0; i < s.total_tokens(); ++i) hash = hash * 31 + static_cast<uint32_t>(s.token(i));
    return static_cast<TokenId>((hash >> 8) % 3);
  }

  void Store(const Batch& batch, const BatchEntry& entry) {
    for (int layer = 0; layer < options_.layers; ++layer) {
      for (int head = 0; head < options_.kv_heads; ++head) {
        for (int r = 0; r < entry.rows; ++r) {
          const int e = entry.exact_entries - entry.rows + r;
          const BlockId block = entry.table->Layer(layer)[head].exact[e / options_.block_tokens];
          contents_[block][e % options_.block_tokens] = batch.tokens[entry.first_row + r];
        }
      }
    }
  }
  void CheckContents(const BatchEntry& entry) {
    const Sequence& s = *entry.sequence;
    for (int layer = 0; layer < options_.layers; ++layer) {
      for (int head = 0; head < options_.kv_heads; ++head) {
        for (int e = 0; e < entry.exact_entries; ++e) {
          const BlockId block = entry.table->Layer(layer)[head].exact[e / options_.block_tokens];
          ASSERT_EQ(contents_[block][e % options_.block_tokens], s.token(e))
              << "sequence " << s.id() << "/" << s.index() << " entry " << e;
        }
      }
    }
  }

  void TakeFinished() {
    for (const auto& s : scheduler_.TakeFinished()) {
      EXPECT_TRUE(ended_.insert({s->id(), s->index()}).second);
      reasons_.insert(s->finish_reason());
      alive_.erase(s.get());
    }
  }

  void Check() {
    ASSERT_EQ(scheduler_.CheckInvariants(), absl::OkStatus());
    const SchedulerStats stats = scheduler_.stats();
    ASSERT_LE(stats.blocks_used + stats.blocks_cached, stats.blocks_total);
    ASSERT_EQ(static_cast<size_t>(stats.running + stats.waiting), alive_.size());
  }

  // Alive sequences in the order of their admission, so that a run repeats exactly.
  struct ByIdentity {
    bool operator()(const Sequence* a, const Sequence* b) const {
      return std::pair(a->id(), a->index()) < std::pair(b->id(), b->index());
    }
  };

  std::mt19937 random_;
  SchedulerOptions options_;
  Scheduler scheduler_;
  std::vector<std::vector<TokenId>> contents_;  // what the model wrote into each block
  absl::Time now_ = absl::FromUnixSeconds(1);
  RequestId last_id_ = 0;
  std::set<std::pair<RequestId, int>> admitted_;
  std::set<std::pair<RequestId, int>> ended_;
  std::set<Sequence*, ByIdentity> alive_;
  std::set<FinishReason> reasons_;
  std::pair<RequestId, int> unserved_;  // the first in the order of service, when the last step passed it by
  int64_t refused_ = 0;
  uint64_t preemptions_ = 0;
  uint64_t hits_ = 0;
};

TEST(SchedulerSimulationTest, NothingIsLostWhateverHappens) {
  uint64_t preemptions = 0;
  uint64_t hits = 0;
  int64_t refused = 0;
  std::set<FinishReason> reasons;
  for (uint32_t seed = 1; seed <= 8; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation simulation(seed);
    simulation.Run();
    if (testing::Test::HasFailure()) return;
    preemptions += simulation.preemptions();
    hits += simulation.hits();
    refused += simulation.refused();
    reasons.insert(simulation.reasons().begin(), simulation.reasons().end());
  }
  // The simulation has been everywhere.
  EXPECT_GT(preemptions, 100u);
  EXPECT_GT(hits, 1000u);
  EXPECT_GT(refused, 10);
  for (FinishReason reason :
       {FinishReason::kStop, FinishReason::kLength, FinishReason::kCancelled, FinishReason::kDeadline}) {
    EXPECT_TRUE(reasons.contains(reason));
  }
}

}  // namespace
}  // namespace atp
