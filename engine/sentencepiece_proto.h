// The parts of a SentencePiece model file (sentencepiece_model.proto) that we look at ourselves, and a check
// of those that the library trusts: with a hostile file it would read outside its tables.
#ifndef ATP_ENGINE_SENTENCEPIECE_PROTO_H_
#define ATP_ENGINE_SENTENCEPIECE_PROTO_H_

#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace atp {

struct SentencePieceInfo {
  int pieces = 0;
  bool add_dummy_prefix = true;   // encoding puts a space before a text
  std::vector<int> user_defined;  // ids of pieces that the library finds in any text before all others
};

// InvalidArgument when the bytes are not such a file or would make the library misbehave.
absl::StatusOr<SentencePieceInfo> ParseSentencePieceProto(std::string_view bytes);

}  // namespace atp

#endif  // ATP_ENGINE_SENTENCEPIECE_PROTO_H_
