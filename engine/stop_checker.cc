#include "engine/stop_checker.h"

#include <algorithm>
#include <utility>

namespace atp {
namespace {

// The longest suffix of `text` that is a proper prefix of `stop`: what must wait for more text.
size_t HeldLength(std::string_view text, std::string_view stop) {
  for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
    if (text.substr(text.size() - n) == stop.substr(0, n)) return n;
  }
  return 0;
}

}  // namespace

StopChecker::StopChecker(std::vector<std::string> stops, bool include_stop_in_output)
    : stops_(std::move(stops)), include_(include_stop_in_output) {
  std::erase(stops_, std::string());  // an empty string would match before the first byte
}

// The match that ends first wins, the longest of those that end together: so the answer does not depend on
// how the text was cut into pieces.
StopChecker::Result StopChecker::Append(std::string_view text, bool may_stop) {
  Result result;
  held_.append(text);
  if (!may_stop) passed_ = held_.size();
  if (may_stop) {
    const std::string* best = nullptr;
    size_t best_end = std::string::npos;
    for (const std::string& stop : stops_) {
      // What ends behind the text that was passed through.
      const size_t begin = held_.find(stop, passed_ + 1 > stop.size() ? passed_ + 1 - stop.size() : 0);
      if (begin == std::string::npos) continue;
      const size_t end = begin + stop.size();
      if (best == nullptr || end < best_end || (end == best_end && stop.size() > best->size())) {
        best = &stop;
        best_end = end;
      }
    }
    if (best != nullptr) {
      result.stopped = true;
      result.matched = *best;
      result.text = held_.substr(0, include_ ? best_end : best_end - best->size());
      held_.clear();
      return result;
    }
  }
  size_t held = 0;
  for (const std::string& stop : stops_) held = std::max(held, HeldLength(held_, stop));
  result.text = held_.substr(0, held_.size() - held);
  held_.erase(0, held_.size() - held);
  passed_ -= std::min(passed_, result.text.size());
  return result;
}

std::string StopChecker::Flush() { return std::exchange(held_, std::string()); }

}  // namespace atp
