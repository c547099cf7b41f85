// The text transformations of tokenizer.json's `normalizer`, before a text is split into words.
#ifndef ATP_ENGINE_NORMALIZER_H_
#define ATP_ENGINE_NORMALIZER_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace atp {

struct NormalizerStep {
  enum Kind { kNfc, kNfd, kNfkc, kNfkd, kPrepend, kReplace };
  Kind kind = kNfc;
  std::string from;  // kReplace: a literal
  std::string to;    // kReplace, kPrepend
};

class Normalizer {
 public:
  Normalizer() = default;
  // FailedPrecondition when the Unicode data of the ICU library is missing.
  static absl::StatusOr<Normalizer> Create(std::vector<NormalizerStep> steps);

  // Precondition: `text` is valid UTF-8. So is the result. Steps after one that grew the text beyond reason
  // are left out.
  std::string Apply(std::string_view text) const;
  bool empty() const { return steps_.empty(); }

 private:
  std::vector<NormalizerStep> steps_;
};

}  // namespace atp

#endif  // ATP_ENGINE_NORMALIZER_H_
