#include "cli/npy.h"

#include <cstdint>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace atp {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string File(const std::string& dictionary, const std::string& data) {
  std::string header = dictionary;
  header.resize((10 + dictionary.size() + 64) / 64 * 64 - 10, ' ');
  header.back() = '\n';
  std::string file("\x93NUMPY\x01\x00", 8);
  file += static_cast<char>(header.size() & 0xff);
  file += static_cast<char>(header.size() >> 8);
  return file + header + data;
}

std::string Dictionary(const std::string& type, const std::string& shape,
                       const std::string& fortran = "False") {
  return "{'descr': '" + type + "', 'fortran_order': " + fortran + ", 'shape': " + shape + ", }";
}

template <typename T>
std::string Bytes(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

std::string ErrorOf(const std::string& file) {
  const auto rows = ParseTokenIds(file, "f.npy", 100);
  return rows.ok() ? "" : std::string(rows.status().message());
}

TEST(Npy, ReadsTheThreeTypes) {
  const auto a =
      ParseTokenIds(File(Dictionary("<i4", "(2, 3)"), Bytes<int32_t>({1, 2, 3, 4, 5, 6})), "f", 100);
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_THAT(*a, ElementsAre(ElementsAre(1, 2, 3), ElementsAre(4, 5, 6)));
  const auto b = ParseTokenIds(File(Dictionary("<i8", "(1, 2)"), Bytes<int64_t>({99, 0})), "f", 100);
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_THAT(*b, ElementsAre(ElementsAre(99, 0)));
  const auto c = ParseTokenIds(File(Dictionary("<u2", "(3,)"), Bytes<uint16_t>({7, 8, 65535})), "f", 65536);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_THAT(*c, ElementsAre(ElementsAre(7, 8, 65535)));
}

TEST(Npy, RefusesWhatItDoesNotRead) {
  const std::string two = Bytes<int32_t>({1, 2});
  EXPECT_THAT(ErrorOf(""), HasSubstr("not a .npy file"));
  EXPECT_THAT(ErrorOf("\x93NUMPY"), HasSubstr("not a .npy file"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<f4", "(2,)"), two)), HasSubstr("found dtype '<f4'"));
  EXPECT_THAT(ErrorOf(File(Dictionary(">i4", "(2,)"), two)), HasSubstr("found dtype '>i4'"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(2,)", "True"), two)), HasSubstr("expected C order"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "()"), two)), HasSubstr("expected shape"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(1, 1, 2)"), two)), HasSubstr("expected shape"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(-1, 2)"), two)), HasSubstr("f.npy"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(x,)"), two)), HasSubstr("expected shape"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(2, 99999999999999999999)"), two)),
              HasSubstr("expected shape"));
  EXPECT_THAT(ErrorOf(File("{}", two)), HasSubstr("header without"));
}

TEST(Npy, RefusesSizesThatDoNotMatch) {
  const std::string two = Bytes<int32_t>({1, 2});
  for (const char* shape : {"(3,)", "(1,)", "(0,)", "(2, 2)", "(0, 2)", "(9223372036854775808, 2)",
                            "(4611686018427387905, 4)", "(99999999999999999999999,)"}) {
    EXPECT_THAT(ErrorOf(File(Dictionary("<i4", shape), two)), HasSubstr("f.npy: ")) << shape;
  }
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(2,)"), two + "x")), HasSubstr("does not match"));
  // One line, whatever the file says, and no longer than it must be.
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(\n3,)"), two)), HasSubstr("shape '(\\n3,)' of 4-byte"));
  EXPECT_LT(ErrorOf(File(Dictionary(std::string(40000, 'i'), "(2,)"), two)).size(), 500);
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(0,)"), "")), HasSubstr("no tokens"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(5000000000, 0)"), "")), HasSubstr("no tokens"));
  const std::string whole = File(Dictionary("<i4", "(2,)"), two);
  for (size_t size = 0; size < whole.size(); ++size) EXPECT_NE(ErrorOf(whole.substr(0, size)), "") << size;
  std::string huge_header = whole;
  huge_header[8] = '\xff';
  huge_header[9] = '\xff';
  EXPECT_THAT(ErrorOf(huge_header), HasSubstr("header of 65535 bytes"));
}

TEST(Npy, RefusesIdsOutsideTheVocabulary) {
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(1, 2)"), Bytes<int32_t>({1, 100}))),
              HasSubstr("token 100 at [0, 1] is outside the vocabulary [0, 100)"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<i8", "(1,)"), Bytes<int64_t>({int64_t{1} << 32}))),
              HasSubstr("outside"));
  EXPECT_THAT(ErrorOf(File(Dictionary("<i4", "(1,)"), Bytes<int32_t>({-1}))), HasSubstr("token -1"));
}

}  // namespace
}  // namespace atp
