#include "engine/pre_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace atp {
namespace {

using testing::ElementsAre;

WordRegex Regex(const std::string& pattern) {
  auto regex = WordRegex::Create(pattern, false);
  EXPECT_TRUE(regex.ok()) << regex.status();
  return *std::move(regex);
}

std::vector<std::string> Split(const std::string& pattern, const std::string& text,
                               SplitBehavior behavior = SplitBehavior::kIsolated, bool invert = false) {
  std::vector<PreTokenizerStep> steps(1);
  steps[0].regex = std::make_unique<WordRegex>(Regex(pattern));
  steps[0].behavior = behavior;
  steps[0].invert = invert;
  const PreTokenizer pre_tokenizer(std::move(steps));
  const Words words = pre_tokenizer.Split(text, true);
  return {words.words.begin(), words.words.end()};
}

TEST(PreTokenizer, Gpt2Pattern) {
  EXPECT_THAT(Split(kGpt2Pattern, "Hello world's  12345 things!?\n\n x"),
              ElementsAre("Hello", " world", "'s", " ", " 12345", " things", "!?", "\n\n", " x"));
  EXPECT_THAT(Split(kGpt2Pattern, "we'LL go   "), ElementsAre("we", "'", "LL", " go", "   "));
  EXPECT_THAT(Split(kGpt2Pattern, "\xC3\xA9t\xC3\xA9 \xD7\xA9\xD7\x9C\xD7\x95\xD7\x9D \xC2\xBD"),
              ElementsAre("\xC3\xA9t\xC3\xA9", " \xD7\xA9\xD7\x9C\xD7\x95\xD7\x9D", " \xC2\xBD"));
}

TEST(PreTokenizer, Llama3Pattern) {
  EXPECT_THAT(Split(kLlama3Pattern, "we'LL pay 12345, ok?\r\n\r\n  next"),
              ElementsAre("we", "'LL", " pay", " ", "123", "45", ",", " ok", "?\r\n\r\n", " ", " next"));
  EXPECT_THAT(Split(kLlama3Pattern, "(a)\t\tb \n c"), ElementsAre("(a", ")", "\t", "\tb", " \n", " c"));
}

TEST(PreTokenizer, Qwen2PatternTakesDigitsOneByOne) {
  const std::string qwen2 =
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  EXPECT_THAT(Split(qwen2, "in 2024: \xE4\xBD\xA0\xE5\xA5\xBD"),
              ElementsAre("in", " ", "2", "0", "2", "4", ":", " \xE4\xBD\xA0\xE5\xA5\xBD"));
}

TEST(PreTokenizer, SpaceIsUnicodesWhiteSpace) {
  EXPECT_THAT(Split("\\s",
                    "a\xC2\xA0"
                    "b\xE3\x80\x80"
                    "c\xC2\x85"
                    "d",
                    SplitBehavior::kRemoved),
              ElementsAre("a", "b", "c", "d"));
  // U+180E is no space since Unicode 6.3.
  EXPECT_THAT(Split("[\\s]+",
                    "a\xE1\xA0\x8E"
                    "b",
                    SplitBehavior::kRemoved),
              ElementsAre("a\xE1\xA0\x8E"
                          "b"));
  // An escaped backslash before an s is no class.
  EXPECT_THAT(Split("\\\\s", "a\\sb c"), ElementsAre("a", "\\s", "b c"));
}

TEST(PreTokenizer, Behaviors) {
  const std::string text = "-ab--cd-";
  EXPECT_THAT(Split("-", text, SplitBehavior::kRemoved), ElementsAre("ab", "cd"));
  EXPECT_THAT(Split("-", text, SplitBehavior::kIsolated), ElementsAre("-", "ab", "-", "-", "cd", "-"));
  EXPECT_THAT(Split("-", text, SplitBehavior::kMergedWithPrevious), ElementsAre("-", "ab-", "-", "cd-"));
  EXPECT_THAT(Split("-", text, SplitBehavior::kMergedWithNext), ElementsAre("-ab", "-", "-cd", "-"));
  EXPECT_THAT(Split("-", text, SplitBehavior::kContiguous), ElementsAre("-", "ab", "--", "cd", "-"));
  EXPECT_THAT(Split("[a-z]+", text, SplitBehavior::kRemoved, true), ElementsAre("ab", "cd"));
}

TEST(PreTokenizer, EmptyMatchesDoNotHang) {
  EXPECT_THAT(Split("x*", "a\xC3\xA9xxb"), ElementsAre("a\xC3\xA9", "xx", "b"));
  EXPECT_THAT(Split("(?=b)", "abab"), ElementsAre("abab"));
}

TEST(PreTokenizer, HostilePatternsEndAndLoseNothing) {
  const std::string text = std::string(5000, 'a') + "!";
  std::string joined;
  for (const std::string& word : Split("(a+)+(a+)+$", text)) joined += word;
  EXPECT_EQ(joined, text);
  EXPECT_FALSE(WordRegex::Create("(", false).ok());
  EXPECT_FALSE(WordRegex::Create("", false).ok());
  EXPECT_FALSE(WordRegex::Create(std::string(1 << 20, 'a'), false).ok());
  EXPECT_FALSE(WordRegex::Create(std::string(10000, '('), false).ok());
}

}  // namespace
}  // namespace atp
