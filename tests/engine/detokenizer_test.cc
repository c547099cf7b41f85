#include "engine/detokenizer.h"

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/utf8.h"

namespace atp {
namespace {

// Each id is a byte, but 256 and up: whole words, and a control token.
class ByteTokenizer : public Tokenizer {
 public:
  explicit ByteTokenizer(bool dummy_prefix, bool lines = false)
      : dummy_prefix_(dummy_prefix), lines_(lines) {}
  int vocab_size() const override { return 260; }
  const SpecialTokens& special() const override { return special_; }
  bool adds_bos() const override { return false; }
  std::vector<TokenId> Encode(std::string_view text, bool, bool) const override {
    std::vector<TokenId> ids;
    for (char c : text) ids.push_back(static_cast<uint8_t>(c));
    return ids;
  }
  std::string TokenBytes(TokenId id, bool keep_special) const override {
    if (id < 0 || id >= 260) return "";
    if (id < 256) return std::string(1, static_cast<char>(id));
    if (id == 256) return keep_special ? "<s>" : "";
    if (id == 257) return " the";
    if (id == 258) return "\xF0\x9F";  // the first half of an emoji
    return " \xA6\x99";                // a space where the second half should be
  }
  bool strips_leading_space() const override { return dummy_prefix_; }
  bool lines_are_separate() const override { return lines_; }
  std::optional<TokenId> IdOf(std::string_view) const override { return std::nullopt; }

 private:
  bool dummy_prefix_, lines_;
  SpecialTokens special_;
};

std::vector<std::string> Stream(const Tokenizer& tokenizer, const std::vector<TokenId>& ids,
                                bool continues_text) {
  Detokenizer detokenizer(&tokenizer, continues_text);
  std::vector<std::string> pieces;
  for (TokenId id : ids) pieces.push_back(detokenizer.Append(id));
  pieces.push_back(detokenizer.Flush());
  return pieces;
}

std::string Joined(const std::vector<std::string>& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += piece;
  return text;
}

TEST(Detokenizer, HoldsBackHalfACodePoint) {
  const ByteTokenizer tokenizer(false);
  EXPECT_EQ(Stream(tokenizer, {'a', 258, 0xA6, 0x99, 'b'}, true),
            (std::vector<std::string>{"a", "", "", "\xF0\x9F\xA6\x99", "b", ""}));
}

TEST(Detokenizer, WhatCannotBecomeValidIsReplaced) {
  const ByteTokenizer tokenizer(false);
  // One U+FFFD per maximal part: F0 9F, then A6 and 99 by themselves behind the space.
  const std::string bad = "\xEF\xBF\xBD";
  EXPECT_EQ(Stream(tokenizer, {258, 259}, true), (std::vector<std::string>{"", bad + " " + bad + bad, ""}));
  EXPECT_EQ(Stream(tokenizer, {'x', 258}, true), (std::vector<std::string>{"x", "", bad}));
  EXPECT_EQ(tokenizer.Decode(std::vector<TokenId>{'x', 258}), "x" + bad);
}

TEST(Detokenizer, LeadingSpaceIsDroppedOnceAndOnlyAtTheStart) {
  const ByteTokenizer tokenizer(true);
  EXPECT_EQ(Joined(Stream(tokenizer, {256, 257, 257}, false)), "the the");
  EXPECT_EQ(Joined(Stream(tokenizer, {' ', ' ', 'a'}, false)), " a");
  EXPECT_EQ(Joined(Stream(tokenizer, {256, 257, 257}, true)), " the the");
  EXPECT_EQ(Joined(Stream(tokenizer, {'\n', 257}, false)), "\n the");
  EXPECT_EQ(Joined(Stream(ByteTokenizer(false), {257}, false)), " the");
}

TEST(Detokenizer, SeparateLinesDropTheirPrefixes) {
  const ByteTokenizer tokenizer(true, true);
  EXPECT_EQ(Joined(Stream(tokenizer, {257, '\n', 257, '\n', '\n', ' ', ' ', 'x'}, false)), "the\nthe\n\n x");
  EXPECT_EQ(Joined(Stream(tokenizer, {257, '\n', 257}, true)), " the\nthe");
}

// U+FFFD for each maximal ill-formed part, straight from the table 3-7 of the Unicode standard.
std::string NaiveReplace(const std::string& bytes) {
  struct Row {
    uint8_t first_low, first_high, second_low, second_high;
    int length;
  };
  const Row rows[] = {{0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3}, {0xE1, 0xEC, 0x80, 0xBF, 3},
                      {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3}, {0xF0, 0xF0, 0x90, 0xBF, 4},
                      {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4}};
  std::string text;
  for (size_t i = 0; i < bytes.size();) {
    const uint8_t lead = bytes[i];
    size_t good = 1;
    size_t need = lead < 0x80 ? 1 : 5;
    for (const Row& row : rows) {
      if (lead < row.first_low || lead > row.first_high) continue;
      need = row.length;
      while (good < need && i + good < bytes.size()) {
        const uint8_t b = bytes[i + good];
        if (b < (good == 1 ? row.second_low : 0x80) || b > (good == 1 ? row.second_high : 0xBF)) break;
        ++good;
      }
    }
    text += good == need ? bytes.substr(i, good) : "\xEF\xBF\xBD";
    i += good;
  }
  return text;
}

TEST(Detokenizer, StreamIsTheWholeDecodedForRandomTokens) {
  std::mt19937 random(11);
  const uint8_t leads[] = {0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC2, 0xE0,
                           0xE2, 0xED, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF};
  for (int round = 0; round < 20000; ++round) {
    const ByteTokenizer tokenizer(round % 2 == 0);
    std::vector<TokenId> ids(random() % 12);
    std::string bytes;
    for (TokenId& id : ids) {
      const uint32_t kind = random() % 4;
      id = kind == 0   ? static_cast<TokenId>(random() % 300) - 20
           : kind == 1 ? ' '
                       : leads[random() % std::size(leads)];
      bytes += tokenizer.TokenBytes(id, false);
    }
    for (bool continues_text : {false, true}) {
      const std::vector<std::string> pieces = Stream(tokenizer, ids, continues_text);
      for (const std::string& piece : pieces) ASSERT_TRUE(IsValidUtf8(piece));
      const bool drop =
          !continues_text && tokenizer.strips_leading_space() && !bytes.empty() && bytes[0] == ' ';
      ASSERT_EQ(Joined(pieces), NaiveReplace(bytes.substr(drop ? 1 : 0)));
    }
    ASSERT_EQ(Joined(Stream(tokenizer, ids, false)), tokenizer.Decode(ids));
  }
}

// The same on real vocabularies, whatever tokens a model may choose.
TEST(Detokenizer, RandomTokensOfRealVocabularies) {
  const std::string root = ATP_SOURCE_DIR;
  std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  const auto add = [&](absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer) {
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizers.push_back(*std::move(tokenizer));
  };
  add(LoadTokenizer(root + "/models/default", 0));
  add(LoadBpeTokenizer(root + "/tests/engine/tokenizer_vectors/llama3.json"));
  add(LoadBpeTokenizer(root + "/tests/engine/tokenizer_vectors/metaspace.json"));
  ASSERT_EQ(tokenizers.size(), 3u);
  std::mt19937 random(5);
  for (const auto& tokenizer : tokenizers) {
    for (int round = 0; round < 2000; ++round) {
      std::vector<TokenId> ids(1 + random() % 20);
      for (TokenId& id : ids)
        id = static_cast<TokenId>(random() % (round % 2 ? 300 : tokenizer->vocab_size() + 5));
      const std::vector<std::string> pieces = Stream(*tokenizer, ids, false);
      for (const std::string& piece : pieces) ASSERT_TRUE(IsValidUtf8(piece));
      ASSERT_EQ(Joined(pieces), tokenizer->Decode(ids));
      // A generation after a prompt keeps every space: its text is the end of the text of all tokens
      // together.
      std::string continued;
      for (TokenId id : ids) continued += tokenizer->TokenBytes(id, false);
      if (!tokenizer->lines_are_separate()) {
        ASSERT_EQ(Joined(Stream(*tokenizer, ids, true)), NaiveReplace(continued));
      }
    }
  }
}

}  // namespace
}  // namespace atp
