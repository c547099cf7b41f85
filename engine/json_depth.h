// How deeply a JSON text is nested, before anything parses it.
#ifndef ATP_ENGINE_JSON_DEPTH_H_
#define ATP_ENGINE_JSON_DEPTH_H_

#include <cstddef>
#include <string_view>

namespace atp {

// Counts brackets outside of strings, so that no parser, copy or destructor ever meets hostile nesting. A
// parser's callback could count, too, but costs nlohmann's a walk over all elements so far at the end of each
// object. Of text that is no JSON, any answer.
inline bool JsonDeeperThan(std::string_view text, int max_depth) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > max_depth) return true;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return false;
}

}  // namespace atp

#endif  // ATP_ENGINE_JSON_DEPTH_H_
