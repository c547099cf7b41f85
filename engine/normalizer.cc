#include "engine/normalizer.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace atp {
namespace {

// ICU's instances are singletons of the library, immutable and shared between threads. Null when its data is
// missing.
const icu::Normalizer2* UnicodeForm(NormalizerStep::Kind kind, UErrorCode* error) {
  switch (kind) {
    case NormalizerStep::kNfc:
      return icu::Normalizer2::getNFCInstance(*error);
    case NormalizerStep::kNfd:
      return icu::Normalizer2::getNFDInstance(*error);
    case NormalizerStep::kNfkc:
      return icu::Normalizer2::getNFKCInstance(*error);
    case NormalizerStep::kNfkd:
      return icu::Normalizer2::getNFKDInstance(*error);
    case NormalizerStep::kPrepend:
    case NormalizerStep::kReplace:
      break;
  }
  return nullptr;
}

std::string ApplyUnicodeForm(NormalizerStep::Kind kind, std::string text) {
  UErrorCode error = U_ZERO_ERROR;
  const icu::Normalizer2* form = UnicodeForm(kind, &error);
  const icu::StringPiece piece(text.data(), static_cast<int32_t>(text.size()));
  if (form->isNormalizedUTF8(piece, error)) return text;
  std::string result;
  icu::StringByteSink<std::string> sink(&result);
  form->normalizeUTF8(0, piece, sink, nullptr, error);
  return U_SUCCESS(error) ? result : text;  // only memory can run out here: Create() has checked the rest
}

}  // namespace

absl::StatusOr<Normalizer> Normalizer::Create(std::vector<NormalizerStep> steps) {
  for (const NormalizerStep& step : steps) {
    if (step.kind == NormalizerStep::kPrepend || step.kind == NormalizerStep::kReplace) continue;
    UErrorCode error = U_ZERO_ERROR;
    if (UnicodeForm(step.kind, &error) == nullptr || U_FAILURE(error)) {
      return absl::FailedPreconditionError(absl::StrCat("the ICU library has no normalization data (",
                                                        u_errorName(error), "); reinstall libicu"));
    }
  }
  Normalizer normalizer;
  normalizer.steps_ = std::move(steps);
  return normalizer;
}

std::string Normalizer::Apply(std::string_view text) const {
  std::string result(text);
  // No Unicode form grows a text by more than 18 times; a chain of replacements that grows it more is an
  // attack.
  const size_t limit = 64 * text.size() + 4096;
  for (const NormalizerStep& step : steps_) {
    if (result.empty() || result.size() > limit) break;
    if (step.kind == NormalizerStep::kPrepend) {
      result.insert(0, step.to);
    } else if (step.kind == NormalizerStep::kReplace) {
      result = absl::StrReplaceAll(result, {{step.from, step.to}});
    } else {
      result = ApplyUnicodeForm(step.kind, std::move(result));
    }
  }
  return result;
}

}  // namespace atp
