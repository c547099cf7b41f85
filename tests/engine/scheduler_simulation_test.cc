// Seeded random life of a scheduler under tiny limits. After every event all blocks and counts must be where
// they belong, every step must compute something, and in the end every request must have ended. A second,
// naive model of the KV cache checks what a batch says: every entry's table must lead to blocks that hold
// exactly its tokens, and, where history is compressed, to principal entries that were made of exactly the
// tokens they stand for.
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
  Simulation(uint32_t seed, bool compress)
      : random_(seed), options_(RandomOptions(compress)), scheduler_(options_) {
    contents_.resize(static_cast<size_t>(options_.num_blocks) * kBlockParts);
    shape_ = RandomShape();
    plans_.push_back(nullptr);
    for (int i = 0; compress && i < 3; ++i) plans_.push_back(RandomPlan());
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
    segments_closed_ = stats.segments_closed;
  }

  uint64_t preemptions() const { return preemptions_; }
  uint64_t hits() const { return hits_; }
  const std::set<FinishReason>& reasons() const { return reasons_; }
  int64_t refused() const { return refused_; }
  uint64_t segments_closed() const { return segments_closed_; }
  int64_t compressed_steps() const { return compressed_steps_; }
  int64_t replaced_states() const { return replaced_states_; }

 private:
  int Below(int n) { return static_cast<int>(random_() % n); }

  SchedulerOptions RandomOptions(bool compress) {
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
    options.compressible = compress;
    if (compress) options.num_blocks += options.layers * options.kv_heads * Below(12);
    return options;
  }

  // Uneven heads, with and without a cap and a window.
  std::shared_ptr<const CompressionPlan> RandomPlan() {
    CompressionSettings settings;
    settings.segment_tokens = options_.block_tokens * (1 + Below(4));
    settings.window_tokens = options_.block_tokens * Below(4);
    settings.sink_tokens = Below(2);
    if (Below(2) == 0 && settings.segment_tokens > 1 &&
        settings.segment_tokens <= Scheduler::LongestSegment(options_)) {
      settings.linear_rank = 0.5;
      settings.linear_layers = kGateUp;
    }
    if (Below(2) == 0) settings.max_principal_keys = 1 + Below(2 * settings.segment_tokens);
    for (int i = 0; i < options_.layers * options_.kv_heads; ++i)
      settings.head_ratio.push_back((i == 0 ? 1 + Below(8) : Below(9)) / 8.0);
    for (int i = 0; i < options_.layers * options_.kv_heads; ++i)
      settings.head_bits.push_back(std::vector<int>{16, 16, 8, 4}[Below(4)]);
    return MakeCompressionPlan(settings, shape_).value();  // null where there is nothing to compress
  }

  CompressionShape RandomShape() {
    CompressionShape shape;
    shape.layers = options_.layers;
    shape.heads = options_.kv_heads * 2;
    shape.kv_heads = options_.kv_heads;
    shape.head_dim = 2;
    shape.block_tokens = options_.block_tokens;
    shape.query_blocks_per_head = 1 + Below(2);
    shape.max_positions = options_.max_positions;
    return shape;
  }

  // Every request chooses. New plans come while sequences of old ones live, and equal ones that are two
  // objects: an engine forgets plans and makes them again.
  std::shared_ptr<const CompressionPlan> AnyPlan() {
    const int choice = Below(static_cast<int>(plans_.size()));
    if (choice == 0) return nullptr;
    std::shared_ptr<const CompressionPlan>& plan = plans_[choice];
    if (Below(16) == 0) plan = RandomPlan();
    if (plan != nullptr && Below(4) == 0) plan = MakeCompressionPlan(plan->settings(), shape_).value();
    return plan;
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
    const std::shared_ptr<const CompressionPlan> plan = AnyPlan();
    if (!scheduler_.CheckFits(prompt, request->sampling.max_tokens, plan.get()).ok()) {
      ++refused_;
      return;
    }
    const int max_new_tokens = scheduler_.MaxNewTokens(prompt, request->sampling.max_tokens);
    for (int i = 0; i < request->sampling.n; ++i) {
      auto sequence = std::make_unique<Sequence>(id, request, i, max_new_tokens, nullptr, plan);
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
    for (const Sequence* s : alive_) {
      ASSERT_TRUE(s->state() == SequenceState::kFinished || s->request().deadline > now_);
    }
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
    for (const BatchEntry& entry : batch.entries) {
      if (!entry.closes_segment) continue;
      ASSERT_NO_FATAL_FAILURE(Fit(batch, entry));
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

  // What a block holds: a number in each place that somebody has written.
  using Contents = std::map<int, uint64_t>;

  void Store(const Batch& batch, const BatchEntry& entry) {
    const int bt = options_.block_tokens;
    for (int head = 0; head < options_.layers * options_.kv_heads; ++head) {
      for (int r = 0; r < entry.rows; ++r) {
        const int e = entry.exact_entries - entry.rows + r;
        Write(entry.table->exact(head)[e / bt], e % bt,
              Exact(*entry.sequence, batch.positions[entry.first_row + r]), kBlockParts);
      }
    }
    if (entry.plan == nullptr) return;
    for (int r = 0; r < entry.rows; ++r) {
      const int position = batch.positions[entry.first_row + r];
      const int sample = entry.plan->SampleAt(position % entry.plan->segment_tokens());
      if (sample < 0) continue;
      for (const BlockId block : entry.table->queries())
        Write(block, sample, Query(*entry.sequence, position), kBlockParts);
    }
  }
  // A page, or a whole block, which is where its first page begins.
  void Write(BlockId block, int place, uint64_t what, int parts = 1) {
    for (int p = 0; place == 0 && p < parts; ++p)
      contents_[block + p].clear();  // all fill them from the front
    contents_[block][place] = what;
  }

  // A token's keys and values depend on the plan, too, once it sees something compressed.
  static uint64_t Exact(const Sequence& s, int position) {
    const bool touched = s.plan() != nullptr && s.plan()->VisibleSegments(position) > 0;
    return static_cast<uint64_t>(s.token(position)) ^ (touched ? s.plan()->id() : 0);
  }
  static uint64_t TokensHash(const Sequence& s, int tokens) {
    uint64_t hash = 1;
    for (int i = 0; i < tokens; ++i) hash = hash * 1000003 + static_cast<uint64_t>(s.token(i)) + 1;
    return hash;
  }
  static uint64_t Query(const Sequence& s, int position) { return TokensHash(s, position + 1) ^ 0x5555; }
  // The content of block `block` of a principal group, a pure function of tokens and plan.
  static uint64_t Principal(const Sequence& s, int segment, int head, int block) {
    const uint64_t tokens = TokensHash(s, (segment + 1) * s.plan()->segment_tokens());
    return (tokens ^ s.plan()->id()) * 31 + static_cast<uint64_t>(segment * 10000 + head * 100 + block);
  }

  // Everything that the entry's rows see.
  void CheckContents(const BatchEntry& entry) {
    const Sequence& s = *entry.sequence;
    const CompressionPlan* plan = s.plan();
    const int position = s.position();
    const int visible = plan != nullptr ? plan->VisibleSegments(position) : 0;
    if (plan != nullptr) {
      ASSERT_TRUE(s.fitted_segments() == 0 ||
                  position / plan->segment_tokens() == (position + entry.rows - 1) / plan->segment_tokens());
      compressed_steps_ += visible > 0;
    }
    const int first_token = visible > 0 ? visible * plan->segment_tokens() : 0;
    ASSERT_EQ(entry.exact_entries, position + entry.rows - first_token);
    for (int head = 0; head < options_.layers * options_.kv_heads; ++head) {
      const KvHeadBlocks& blocks = entry.table->Layer(head / options_.kv_heads)[head % options_.kv_heads];
      ASSERT_NO_FATAL_FAILURE(CheckExact(s, blocks.exact, first_token, entry.exact_entries));
      const int principal_blocks = visible > 0 ? plan->StatePages(visible - 1, head) : 0;
      ASSERT_EQ(blocks.principal_entries, visible > 0 ? principal_blocks * plan->Page(head)->entries() : 0);
      if (visible == 0) continue;
      ASSERT_NO_FATAL_FAILURE(CheckState(s, visible - 1, head, blocks.principal));
    }
  }
  void CheckExact(const Sequence& s, const BlockId* blocks, int first_token, int entries) {
    for (int e = 0; e < entries; ++e) {
      const Contents& contents = contents_[blocks[e / options_.block_tokens]];
      const auto found = contents.find(e % options_.block_tokens);
      ASSERT_TRUE(found != contents.end() && found->second == Exact(s, first_token + e))
          << "sequence " << s.id() << "/" << s.index() << " token " << first_token + e;
    }
  }
  void CheckState(const Sequence& s, int state, int head, const BlockId* blocks) {
    for (int segment = s.plan()->StateBegin(state); segment <= state; ++segment) {
      for (int b = 0; b < s.plan()->GroupPages(segment)[head]; ++b, ++blocks) {
        const Contents& contents = contents_[*blocks];
        const auto found = contents.find(0);
        ASSERT_TRUE(found != contents.end() && found->second == Principal(s, segment, head, b))
            << "sequence " << s.id() << "/" << s.index() << " segment " << segment << " block " << b;
      }
    }
  }

  // A fit reads the history before, the segment's tokens and its queries, and writes its group.
  void Fit(const Batch& batch, const BatchEntry& entry) {
    const Sequence& s = *entry.sequence;
    const CompressionPlan& plan = *entry.plan;
    const int segment = batch.positions[entry.first_row] / plan.segment_tokens();
    ASSERT_LT(segment, s.fitted_segments());
    for (const BlockId block : entry.table->queries()) {
      for (int sample = 0; sample < plan.samples(); ++sample) {
        const auto found = contents_[block].find(sample);
        const int position = segment * plan.segment_tokens() + plan.SampleOffset(sample);
        ASSERT_TRUE(found != contents_[block].end() && found->second == Query(s, position))
            << "sequence " << s.id() << "/" << s.index() << " has lost the query of token " << position;
      }
    }
    for (int head = 0; head < options_.layers * options_.kv_heads; ++head) {
      const BlockId* exact = entry.table->exact(head).data() +
                             (entry.exact_entries - plan.segment_tokens()) / plan.block_tokens();
      ASSERT_NO_FATAL_FAILURE(CheckExact(s, exact, segment * plan.segment_tokens(), plan.segment_tokens()));
      const int blocks = plan.GroupPages(segment)[head];
      const std::span<const BlockId> principal = entry.table->principal(head);
      const BlockId* out = principal.data() + principal.size() - blocks;
      if (plan.Replaces(segment) && segment > 0) {
        ++replaced_states_;
        ASSERT_NO_FATAL_FAILURE(CheckState(s, segment - 1, head, out - plan.StatePages(segment - 1, head)));
      }
      for (int b = 0; b < blocks; ++b) Write(out[b], 0, Principal(s, segment, head, b));
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
    std::set<const Request*> running;
    for (const Sequence* s : alive_) {
      if (s->state() == SequenceState::kRunning) running.insert(&s->request());
    }
    ASSERT_EQ(static_cast<size_t>(stats.running_requests), running.size());
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
  std::vector<Contents> contents_;  // what the model wrote into each page or block, by id
  CompressionShape shape_;
  std::vector<std::shared_ptr<const CompressionPlan>> plans_;
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
  uint64_t segments_closed_ = 0;
  int64_t compressed_steps_ = 0;
  int64_t replaced_states_ = 0;
};

// Runs all seeds and looks whether the simulation has been everywhere.
void Simulate(bool compress) {
  uint64_t preemptions = 0, hits = 0, segments_closed = 0;
  int64_t refused = 0, compressed_steps = 0, replaced_states = 0;
  std::set<FinishReason> reasons;
  for (uint32_t seed = 1; seed <= (compress ? 24u : 8u); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation simulation(seed, compress);
    simulation.Run();
    if (testing::Test::HasFailure()) return;
    preemptions += simulation.preemptions();
    hits += simulation.hits();
    refused += simulation.refused();
    segments_closed += simulation.segments_closed();
    compressed_steps += simulation.compressed_steps();
    replaced_states += simulation.replaced_states();
    reasons.insert(simulation.reasons().begin(), simulation.reasons().end());
  }
  EXPECT_GT(preemptions, 100u);
  EXPECT_GT(hits, 1000u);
  EXPECT_GT(refused, 10);
  EXPECT_EQ(segments_closed > 1000, compress);
  EXPECT_EQ(compressed_steps > 1000, compress);
  EXPECT_EQ(replaced_states > 1000, compress);
  for (FinishReason reason :
       {FinishReason::kStop, FinishReason::kLength, FinishReason::kCancelled, FinishReason::kDeadline}) {
    EXPECT_TRUE(reasons.contains(reason));
  }
}

TEST(SchedulerSimulationTest, NothingIsLostWhateverHappens) { Simulate(false); }

TEST(SchedulerSimulationTest, NothingIsLostWhileHistoryIsCompressed) { Simulate(true); }

}  // namespace
}  // namespace atp
