// UTF-8, byte by byte: what is valid, what is broken, and what is only not finished yet.
#ifndef ATP_ENGINE_UTF8_H_
#define ATP_ENGINE_UTF8_H_

#include <cstddef>
#include <string>
#include <string_view>

namespace atp {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

enum class Utf8Kind {
  kValid,       // a whole code point
  kInvalid,     // the maximal ill-formed part (Unicode 15, 3.9, "substitution of maximal subparts")
  kIncomplete,  // a prefix of a code point, cut by the end of the bytes
};

struct Utf8Step {
  Utf8Kind kind;
  size_t length;  // in bytes, at least 1
};

// What `bytes` begins with. Precondition: !bytes.empty().
Utf8Step NextUtf8(std::string_view bytes);

// Appends `bytes` as valid UTF-8 to `text`, each ill-formed part as U+FFFD, and returns how many bytes it
// consumed: all but a cut code point at the end (at most three bytes), and those too when `at_end`.
size_t AppendUtf8(std::string_view bytes, bool at_end, std::string* text);

bool IsValidUtf8(std::string_view bytes);

// The code point of a valid step of `bytes`.
char32_t CodePoint(std::string_view bytes, size_t length);

// Unicode's White_Space property.
bool IsUnicodeSpace(char32_t c);

}  // namespace atp

#endif  // ATP_ENGINE_UTF8_H_
