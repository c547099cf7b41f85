#include "engine/bpe_model.h"

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace atp {
namespace {

TEST(BpeModel, PrintableFormIsABijection) {
  std::set<std::string> seen;
  for (int b = 0; b < 256; ++b) {
    const std::string byte(1, static_cast<char>(b));
    const std::string printable = BytesToPrintable(byte);
    EXPECT_TRUE(seen.insert(printable).second);
    EXPECT_EQ(PrintableToBytes(printable), byte);
  }
  EXPECT_EQ(BytesToPrintable(" a\n"),
            "\xC4\xA0"
            "a\xC4\x8A");  // Ġ and Ċ
  EXPECT_EQ(PrintableToBytes("\xE2\x96\x81"), std::nullopt);
  EXPECT_EQ(PrintableToBytes("a b"), std::nullopt);  // the space itself is not in the alphabet
}

// The definition, in its own words: again and again the merge of lowest rank, the leftmost one, until there
// is none.
std::vector<std::string> NaiveMerge(const std::string& word,
                                    const std::map<std::pair<std::string, std::string>, int>& ranks) {
  std::vector<std::string> parts;
  for (char c : word) parts.emplace_back(1, c);
  while (true) {
    int best = std::numeric_limits<int>::max();
    size_t at = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto it = ranks.find({parts[i], parts[i + 1]});
      if (it != ranks.end() && it->second < best) {
        best = it->second;
        at = i;
      }
    }
    if (best == std::numeric_limits<int>::max()) return parts;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST(BpeModel, MergesLikeTheDefinition) {
  std::mt19937 random(7);
  for (int round = 0; round < 50; ++round) {
    BpeModel::Vocabulary vocabulary;
    std::vector<std::string> tokens;
    std::set<std::string> known;
    const auto add = [&](const std::string& token) {
      if (!known.insert(token).second) return;
      vocabulary.emplace_back(token, static_cast<TokenId>(tokens.size()));
      tokens.push_back(token);
    };
    for (char c : std::string("abc")) add(std::string(1, c));
    std::map<std::pair<std::string, std::string>, int> ranks;
    for (int i = 0; i < 25; ++i) {
      const std::string left = tokens[random() % tokens.size()], right = tokens[random() % tokens.size()];
      if (left.size() + right.size() > 8) continue;
      add(left + right);
      ranks.emplace(std::pair(left, right), i);
    }
    auto model = BpeModel::Create(vocabulary, {});
    ASSERT_TRUE(model.ok());
    for (const auto& [pair, rank] : ranks) ASSERT_TRUE(model->AddMerge(pair.first, pair.second, rank).ok());
    for (int i = 0; i < 40; ++i) {
      std::string word(random() % 30, 'a');
      for (char& c : word) c = static_cast<char>('a' + random() % 3);
      std::vector<TokenId> expected, ids;
      for (const std::string& part : NaiveMerge(word, ranks)) expected.push_back(*model->IdOf(part));
      model->Encode(word, true, &ids);
      EXPECT_EQ(ids, expected) << word;
    }
  }
}

TEST(BpeModel, RanksGiveEveryMerge) {
  auto model = BpeModel::Create({{"a", 0}, {"b", 1}, {"c", 2}, {"bc", 3}, {"ab", 4}, {"abc", 5}}, {});
  ASSERT_TRUE(model.ok());
  model->AddMergesOfRanks();
  std::vector<TokenId> ids;
  model->Encode("abcab", true, &ids);
  EXPECT_EQ(ids, (std::vector<TokenId>{5, 4}));
}

TEST(BpeModel, UnknownAndFallback) {
  BpeOptions options;
  options.byte_level = false;
  options.byte_fallback = true;
  options.fuse_unknown = true;
  options.unknown = 0;
  // \xC3\xA9 has both of its bytes, \xC3\xA8 has not.
  auto model = BpeModel::Create({{"?", 0}, {"a", 1}, {"<0xC3>", 2}, {"<0xA9>", 3}}, options);
  ASSERT_TRUE(model.ok());
  std::vector<TokenId> ids;
  model->Encode(
      "a\xC3\xA9\xC3\xA8\xC3\xA8"
      "a",
      true, &ids);
  EXPECT_EQ(ids, (std::vector<TokenId>{1, 2, 3, 0, 1}));
}

TEST(BpeModel, RefusesWhatDisagrees) {
  EXPECT_FALSE(BpeModel::Create({{"a", 1'000'000'000}}, {}).ok());
  EXPECT_FALSE(BpeModel::Create({{"a", -1}}, {}).ok());
  auto model = BpeModel::Create({{"a", 0}, {"b", 1}}, {});
  ASSERT_TRUE(model.ok());
  const absl::Status status = model->AddMerge("a", "b", 3);
  EXPECT_NE(status.message().find("'ab'"), absl::string_view::npos) << status;
}

}  // namespace
}  // namespace atp
