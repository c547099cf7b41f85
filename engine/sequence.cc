#include "engine/sequence.h"

#include <utility>

namespace atp {

Sequence::Sequence(RequestId id, std::shared_ptr<const Request> request, int index, int max_new_tokens,
                   std::unique_ptr<AnswerStream> stream, std::shared_ptr<const CompressionPlan> plan)
    : id_(id),
      request_(std::move(request)),
      index_(index),
      max_new_tokens_(max_new_tokens),
      stream_(std::move(stream)),
      plan_(std::move(plan)),
      // The last token of an answer is sampled and never computed.
      fitted_segments_(
          plan_ != nullptr ? plan_->FittedSegments(max_total_tokens() - (max_new_tokens > 0 ? 1 : 0)) : 0) {
  SetLowRankTokens(scores_prompt() ? 0 : prompt_tokens() - 1);
}

Sequence::~Sequence() = default;

int64_t Sequence::held_blocks() const {
  int64_t blocks = static_cast<int64_t>(queries_.ids().size());
  for (const BlockGroup& group : groups_) blocks += static_cast<int64_t>(group.ids().size());
  for (const BlockGroup& group : principal_) blocks += static_cast<int64_t>(group.ids().size());
  return blocks;
}

}  // namespace atp
