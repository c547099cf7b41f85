// Finds stop strings in one answer's streamed text and holds back whatever may still become one.
#ifndef ATP_ENGINE_STOP_CHECKER_H_
#define ATP_ENGINE_STOP_CHECKER_H_

#include <string>
#include <string_view>
#include <vector>

namespace atp {

class StopChecker {
 public:
  StopChecker(std::vector<std::string> stops, bool include_stop_in_output);

  struct Result {
    std::string text;  // safe to send now
    bool stopped = false;
    std::string matched;  // the stop string, when stopped
  };

  // Adds text; with `may_stop` false (fewer than min_tokens generated) matches are passed through as text.
  Result Append(std::string_view text, bool may_stop = true);
  std::string Flush();  // what was held back, at the end of the answer

 private:
  std::vector<std::string> stops_;
  bool include_;
  std::string held_;
  size_t passed_ = 0;  // bytes of held_ that came while matches were passed through
};

}  // namespace atp

#endif  // ATP_ENGINE_STOP_CHECKER_H_
