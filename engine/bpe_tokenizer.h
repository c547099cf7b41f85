// A tokenizer over a BpeModel, whatever file it came from (tokenizer.json, tiktoken ranks).
#ifndef ATP_ENGINE_BPE_TOKENIZER_H_
#define ATP_ENGINE_BPE_TOKENIZER_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/added_tokens.h"
#include "engine/bpe_model.h"
#include "engine/normalizer.h"
#include "engine/pre_tokenizer.h"
#include "engine/tokenizer.h"
#include "engine/tokenizer_config.h"

namespace atp {

struct BpeParts {
  BpeModel model;
  BpeModel::Vocabulary vocabulary;  // the same as the model's
  std::vector<AddedToken> added_tokens;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::string space;  // what a token writes instead of " " ("▁"); "" when it writes bytes
  bool strips_leading_space = false;
  TokenizerDefaults defaults;
};

// InvalidArgument when an added token's id or `config` disagrees with the vocabulary.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(BpeParts parts, const TokenizerConfig& config);

}  // namespace atp

#endif  // ATP_ENGINE_BPE_TOKENIZER_H_
