#include "engine/sequence.h"

#include <utility>

namespace atp {

Sequence::Sequence(RequestId id, std::shared_ptr<const Request> request, int index, int max_new_tokens,
                   std::unique_ptr<AnswerStream> stream)
    : id_(id),
      request_(std::move(request)),
      index_(index),
      max_new_tokens_(max_new_tokens),
      stream_(std::move(stream)) {}

Sequence::~Sequence() = default;

}  // namespace atp
