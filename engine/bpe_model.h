// Byte-pair encoding of one word (Sennrich et al., arXiv 1508.07909): the vocabulary and its merges, nothing
// about text.
#ifndef ATP_ENGINE_BPE_MODEL_H_
#define ATP_ENGINE_BPE_MODEL_H_

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/request.h"

namespace atp {

// GPT-2's printable alphabet for the 256 bytes ("Ġ" is the space), in which tokenizer.json writes byte-level
// tokens.
std::string BytesToPrintable(std::string_view bytes);
std::optional<std::string> PrintableToBytes(
    std::string_view printable);  // none: a character outside the alphabet

struct BpeOptions {
  bool byte_level = true;      // symbols are bytes; else code points
  bool ignore_merges = false;  // a word that is a token is that token, whatever the merges say
  bool byte_fallback = false;  // code points without a token become the tokens <0x00> … <0xFF>
  bool fuse_unknown = false;   // neighbouring unknown symbols become one unknown token
  std::optional<TokenId> unknown;
};

class BpeModel {
 public:
  using Vocabulary = std::vector<std::pair<std::string, TokenId>>;  // keys are bytes, not printable forms

  // InvalidArgument for negative, sparse or repeated ids.
  static absl::StatusOr<BpeModel> Create(const Vocabulary& vocabulary, BpeOptions options);
  BpeModel(BpeModel&&) noexcept;
  BpeModel& operator=(BpeModel&&) noexcept;
  ~BpeModel();

  // `rank`: lower merges first. NotFound, naming it, when left, right or left + right is not in the
  // vocabulary. When a pair is given again, the later rank holds.
  absl::Status AddMerge(std::string_view left, std::string_view right, int32_t rank);
  // The merges of a vocabulary that lists none (tiktoken): each way to cut a token into two tokens, ranked by
  // its id.
  void AddMergesOfRanks();

  // Appends the ids of one word. Symbols without a token are dropped when there is no unknown token.
  // `as_whole`: whether ignore_merges may apply.
  void Encode(std::string_view word, bool as_whole, std::vector<TokenId>* ids) const;

  std::optional<TokenId> IdOf(std::string_view bytes) const;
  int id_limit() const;  // highest id + 1
  const BpeOptions& options() const;

 private:
  struct Tables;
  explicit BpeModel(std::unique_ptr<Tables> tables);
  std::unique_ptr<Tables> tables_;
};

}  // namespace atp

#endif  // ATP_ENGINE_BPE_MODEL_H_
