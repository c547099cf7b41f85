#include "engine/stop_checker.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

namespace atp {
namespace {

TEST(StopChecker, HoldsBackOnlyWhatMayBecomeAStop) {
  StopChecker checker({"</end>", "STOP"}, false);
  EXPECT_EQ(checker.Append("hello").text, "hello");
  EXPECT_EQ(checker.Append(" <").text, " ");
  EXPECT_EQ(checker.Append("/en").text, "");
  EXPECT_EQ(checker.Append("try").text, "</entry");
  EXPECT_EQ(checker.Append("ST").text, "");
  const StopChecker::Result result = checker.Append("OP and more");
  EXPECT_TRUE(result.stopped);
  EXPECT_EQ(result.text, "");
  EXPECT_EQ(result.matched, "STOP");
  EXPECT_EQ(checker.Flush(), "");
}

TEST(StopChecker, OverlappingPrefixes) {
  StopChecker checker({"aab"}, false);
  EXPECT_EQ(checker.Append("aa").text, "");
  EXPECT_EQ(checker.Append("a").text, "a");
  const StopChecker::Result result = checker.Append("b");
  EXPECT_TRUE(result.stopped);
  EXPECT_EQ(result.text, "");
}

TEST(StopChecker, IncludesTheStopWhenAsked) {
  StopChecker checker({"\n\n"}, true);
  EXPECT_EQ(checker.Append("one\n").text, "one");
  const StopChecker::Result result = checker.Append("\ntwo");
  EXPECT_TRUE(result.stopped);
  EXPECT_EQ(result.text, "\n\n");
}

TEST(StopChecker, FlushGivesWhatWasHeld) {
  StopChecker checker({"stop"}, false);
  EXPECT_EQ(checker.Append("don't sto").text, "don't ");
  EXPECT_EQ(checker.Flush(), "sto");
  EXPECT_EQ(checker.Flush(), "");
}

TEST(StopChecker, BeforeMinTokensMatchesAreText) {
  StopChecker checker({"ab"}, false);
  EXPECT_EQ(checker.Append("xaby", false).text, "xaby");
  EXPECT_EQ(checker.Append("xab", false).text, "xab");
  EXPECT_EQ(checker.Append("za", false).text, "z");  // may still complete once stopping is allowed
  const StopChecker::Result result = checker.Append("b");
  EXPECT_TRUE(result.stopped);
  EXPECT_EQ(result.text, "");
}

TEST(StopChecker, EmptyStopsNeverMatch) {
  StopChecker checker({""}, false);
  const StopChecker::Result result = checker.Append("text");
  EXPECT_FALSE(result.stopped);
  EXPECT_EQ(result.text, "text");
}

// The definition: text grows byte by byte; the first time it ends with a stop, the longest such stop ends it.
struct Expected {
  std::string text, matched;
};
Expected Naive(const std::string& text, const std::vector<std::string>& stops, bool include) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::string best;
    for (const std::string& stop : stops) {
      if (end >= stop.size() && text.compare(end - stop.size(), stop.size(), stop) == 0 &&
          stop.size() > best.size()) {
        best = stop;
      }
    }
    if (!best.empty()) return {text.substr(0, include ? end : end - best.size()), best};
  }
  return {text, ""};
}

TEST(StopChecker, RandomTextInRandomPiecesMatchesTheDefinition) {
  std::mt19937 random(3);
  const auto word = [&](size_t longest) {
    std::string s(1 + random() % longest, 'a');
    for (char& c : s) c = static_cast<char>('a' + random() % 3);
    return s;
  };
  int stopped = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> stops;
    for (size_t i = random() % 4; i > 0; --i) stops.push_back(word(5));
    const std::string text = word(25);
    const bool include = random() % 2;
    const Expected expected = Naive(text, stops, include);
    StopChecker checker(stops, include);
    std::string sent, matched;
    for (size_t at = 0; at < text.size() && matched.empty();) {
      const size_t n = std::min<size_t>(text.size() - at, random() % 6);
      const StopChecker::Result result = checker.Append(text.substr(at, n));
      at += n;
      sent += result.text;
      matched = result.matched;
      ASSERT_EQ(result.stopped, !matched.empty());
      if (result.stopped) break;
      // Nothing is held but the longest end of the text that is a proper beginning of a stop.
      size_t held = 0;
      for (const std::string& stop : stops) {
        for (size_t k = 1; k < stop.size(); ++k) {
          if (k <= at && text.compare(at - k, k, stop, 0, k) == 0) held = std::max(held, k);
        }
      }
      ASSERT_EQ(sent, text.substr(0, at - held));
    }
    if (matched.empty()) sent += checker.Flush();
    stopped += !matched.empty();
    ASSERT_EQ(sent, expected.text);
    ASSERT_EQ(matched, expected.matched);
  }
  EXPECT_GT(stopped, 5000);
}

// What was passed through before min_tokens may still be held, as the beginning of a longer stop string.
TEST(StopChecker, AMatchThatWasPassedThroughStaysText) {
  StopChecker checker({"END", "ENDLESS"}, false);
  EXPECT_EQ(checker.Append("aEND", /*may_stop=*/false).text, "a");
  const StopChecker::Result result = checker.Append(" x");
  EXPECT_FALSE(result.stopped);
  EXPECT_EQ(result.text, "END x");
  EXPECT_EQ(checker.Append("bEND", /*may_stop=*/false).text, "b");
  const StopChecker::Result longer = checker.Append("LESS");
  EXPECT_TRUE(longer.stopped);
  EXPECT_EQ(longer.matched, "ENDLESS");
  EXPECT_EQ(longer.text, "");
}

}  // namespace
}  // namespace atp
