// A scheduler without a model: the test plays the model, and looks at every step.
#ifndef ATP_TESTS_ENGINE_SCHEDULER_FIXTURE_H_
#define ATP_TESTS_ENGINE_SCHEDULER_FIXTURE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "engine/scheduler.h"

namespace atp {
inline constexpr int kHeads = 4;  // 2 layers of 2 kv heads
inline const absl::Time kNow = absl::FromUnixSeconds(1000);

inline SchedulerOptions Options(int groups) {
  SchedulerOptions options;
  options.max_batch_tokens = 32;
  options.max_prefill_chunk_tokens = 32;
  options.max_running_sequences = 8;
  options.max_logit_rows = 8;
  options.max_positions = 200;
  options.layers = 2;
  options.kv_heads = 2;
  options.block_tokens = 4;
  options.num_blocks = static_cast<int64_t>(groups) * kHeads;
  return options;
}

struct Ask {
  int prompt = 4;
  int max_tokens = 4;
  int priority = 0;
  int n = 1;
  absl::Time deadline = absl::InfiniteFuture();
  bool score = false;
  std::shared_ptr<const CompressionPlan> plan = nullptr;
  TokenId first_token = 0;  // requests with the same one share prefixes; 0: nobody else's
};

class SchedulerTest : public testing::Test {
 protected:
  void Make(const SchedulerOptions& options) { scheduler_ = std::make_unique<Scheduler>(options); }

  RequestId Admit(const Ask& ask) {
    const RequestId id = ++last_id_;
    auto request = std::make_shared<Request>();
    request->prompt.resize(ask.prompt);
    const TokenId first = ask.first_token != 0 ? ask.first_token : static_cast<TokenId>(1000 * id);
    std::iota(request->prompt.begin(), request->prompt.end(), first);
    request->sampling.max_tokens = ask.max_tokens;
    request->sampling.n = ask.n;
    request->priority = ask.priority;
    request->deadline = ask.deadline;
    if (ask.score) {
      request->echo_prompt = true;
      request->sampling.logprobs = 0;
    }
    for (int i = 0; i < ask.n; ++i) {
      auto sequence = std::make_unique<Sequence>(
          id, request, i, scheduler_->MaxNewTokens(ask.prompt, ask.max_tokens), nullptr, ask.plan);
      sequences_[{id, i}] = sequence.get();
      EXPECT_EQ(scheduler_->Admit(std::move(sequence)), absl::OkStatus());
    }
    return id;
  }

  // One step with a model that always answers 7. Returns rows by request, summed over its answers.
  std::map<RequestId, int> Step(absl::Time now = kNow) {
    const Batch& batch = scheduler_->Schedule(now);
    EXPECT_EQ(scheduler_->CheckInvariants(), absl::OkStatus());
    std::map<RequestId, int> rows;
    for (const BatchEntry& entry : batch.entries) rows[entry.sequence->id()] += entry.rows;
    rows_ = batch.rows();
    logit_rows_ = static_cast<int>(batch.logit_rows.size());
    scheduler_->Commit(batch, std::vector<TokenId>(batch.entries.size(), 7));
    for (const BatchEntry& entry : batch.entries) {
      Sequence* s = entry.sequence;
      if (s->generated().size() >= static_cast<size_t>(s->max_new_tokens()) && !s->generated().empty()) {
        scheduler_->Finish(s, FinishReason::kLength);
      }
    }
    for (auto& s : scheduler_->TakeFinished()) {
      ended_.push_back({s->id(), s->finish_reason()});
      generated_[s->id()] += s->generated().size();
      cached_[s->id()] = s->cached_tokens();
      sequences_.erase({s->id(), s->index()});
    }
    EXPECT_EQ(scheduler_->CheckInvariants(), absl::OkStatus());
    return rows;
  }
  void RunToEnd(int limit = 2000) {
    for (int i = 0; i < limit && !scheduler_->empty(); ++i) Step();
    EXPECT_TRUE(scheduler_->empty());
  }
  const Sequence& At(RequestId id, int index = 0) const { return *sequences_.at({id, index}); }
  bool Running(RequestId id) const { return At(id).state() == SequenceState::kRunning; }

  std::unique_ptr<Scheduler> scheduler_;
  RequestId last_id_ = 0;
  std::map<std::pair<RequestId, int>, Sequence*> sequences_;
  std::vector<std::pair<RequestId, FinishReason>> ended_;
  std::map<RequestId, size_t> generated_;
  std::map<RequestId, int> cached_;
  int rows_ = 0;
  int logit_rows_ = 0;
};

}  // namespace atp

#endif  // ATP_TESTS_ENGINE_SCHEDULER_FIXTURE_H_
