// Every way a safetensors file or its index can be wrong, each with the line that a user reads.
#include "engine/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace atp {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

std::string File(const std::string& header, size_t data_bytes) {
  std::string file(8, '\0');
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(header.size() >> (8 * i));
  return file + header + std::string(data_bytes, '\x01');
}

absl::StatusOr<SafetensorsTensors> Parse(const std::string& file) {
  return ParseSafetensors(std::as_bytes(std::span(file.data(), file.size())), "dir/f.safetensors");
}

// The message of a file that must be refused: one line that begins with the file's name.
std::string Refusal(const std::string& file) {
  const absl::StatusOr<SafetensorsTensors> parsed = Parse(file);
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << parsed.status();
  const std::string message(parsed.status().message());
  EXPECT_EQ(message.rfind("dir/f.safetensors: ", 0), 0u) << message;
  EXPECT_THAT(message, Not(HasSubstr("\n")));
  EXPECT_LT(message.size(), 600u);
  return message;
}
std::string HeaderRefusal(const std::string& header, size_t data_bytes) {
  return Refusal(File(header, data_bytes));
}

constexpr char kGood[] =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
    R"("b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]},"none":{"dtype":"F16","shape":[0,9],"data_offsets":[26,26]}}   )";

TEST(SafetensorsHeader, ReadsTensors) {
  const std::string file = File(kGood, 26);
  const absl::StatusOr<SafetensorsTensors> tensors = Parse(file);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 3u);
  const SafetensorsTensor& a = tensors->at("a");
  EXPECT_EQ(a.dtype, "F32");
  EXPECT_THAT(a.shape, ElementsAre(2, 3));
  EXPECT_EQ(a.data.size(), 24u);
  EXPECT_EQ(reinterpret_cast<const char*>(a.data.data()), file.data() + file.size() - 26);
  EXPECT_EQ(tensors->at("b").data.data(), a.data.data() + 24);
  EXPECT_TRUE(tensors->at("b").shape.empty());
  EXPECT_TRUE(tensors->at("none").data.empty());
}

TEST(SafetensorsHeader, EveryTruncationIsRefused) {
  const std::string file = File(kGood, 26);
  for (size_t size = 0; size < file.size(); ++size) Refusal(file.substr(0, size));
  EXPECT_THAT(Refusal(file.substr(0, 5)),
              HasSubstr("expected at least 8 bytes of header length, found a file of 5 bytes"));
  EXPECT_THAT(
      Refusal(file.substr(0, file.size() - 1)),
      AllOf(HasSubstr("tensor 'b': data_offsets: expected an end of at most 25"), HasSubstr("found 26")));
}

TEST(SafetensorsHeader, LengthBeyondFile) {
  EXPECT_THAT(Refusal(std::string("\x10\0\0\0\0\0\0\0{}", 10)),
              HasSubstr("header length: expected at most 2 bytes, the rest of the file, found 16"));
}

TEST(SafetensorsHeader, LengthBeyondLimit) {
  EXPECT_THAT(Refusal(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)),
              HasSubstr("header length: expected at most 100000000 bytes, found 18446744073709551615"));
}

TEST(SafetensorsHeader, NotJson) {
  EXPECT_THAT(HeaderRefusal("", 0), HasSubstr("expected valid JSON, found a syntax error at byte"));
  EXPECT_THAT(HeaderRefusal(R"({"a":)", 0), HasSubstr("expected valid JSON, found a syntax error at byte"));
  EXPECT_THAT(HeaderRefusal(R"({} x)", 0), HasSubstr("expected valid JSON, found a syntax error at byte 4"));
  EXPECT_THAT(HeaderRefusal("{\"\xff\":1}", 0),
              HasSubstr("expected valid JSON, found a syntax error at byte 3"));
  EXPECT_THAT(HeaderRefusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[1e999]}}", 0),
              HasSubstr("expected valid JSON"));
}

TEST(SafetensorsHeader, WrongJsonTypes) {
  EXPECT_THAT(HeaderRefusal("[]", 0), HasSubstr("header: expected a JSON object, found an array"));
  EXPECT_THAT(HeaderRefusal("7", 0), HasSubstr("header: expected a JSON object, found 7"));
  EXPECT_THAT(HeaderRefusal(R"({"a":null})", 0), HasSubstr("tensor 'a': expected an object, found null"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"dtype":4}})", 0),
              HasSubstr("tensor 'a': dtype: expected a string, found 4"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"shape":"x"}})", 0),
              HasSubstr("tensor 'a': shape: expected an array of integers, found a string"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"shape":[-1]}})", 0),
              HasSubstr("tensor 'a': shape: expected an integer from 0 to 2^64 - 1, found -1"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"shape":[2.0]}})", 0),
              HasSubstr("tensor 'a': shape: expected an integer from 0 to 2^64 - 1, found 2.0"));
  EXPECT_THAT(
      HeaderRefusal(R"({"a":{"data_offsets":[0,36893488147419103232]}})", 0),
      HasSubstr(
          "tensor 'a': data_offsets: expected an integer from 0 to 2^64 - 1, found 36893488147419103232"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"dtype":"F32","color":[1]}})", 0),
              HasSubstr("tensor 'a': expected dtype, shape and data_offsets, found 'color'"));
  EXPECT_THAT(HeaderRefusal(R"({"__metadata__":{"a":1}})", 0),
              HasSubstr("tensor '__metadata__': expected strings only, found 1"));
}

TEST(SafetensorsHeader, MissingFields) {
  EXPECT_THAT(HeaderRefusal(R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4),
              HasSubstr("tensor 'a': expected a dtype, found none"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4),
              HasSubstr("tensor 'a': expected a shape, found none"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"dtype":"F32","shape":[1]}})", 4),
              HasSubstr("tensor 'a': data_offsets: expected 2 integers, found 0"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4),
              HasSubstr("tensor 'a': data_offsets: expected 2 integers, found 1"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}})", 4),
              HasSubstr("tensor 'a': data_offsets: expected at most 2 numbers, found more"));
}

TEST(SafetensorsHeader, UnknownDType) {
  EXPECT_THAT(
      HeaderRefusal(R"({"a":{"dtype":"Q4_0","shape":[1],"data_offsets":[0,4]}})", 4),
      HasSubstr(
          "tensor 'a': expected a dtype that is one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, "
          "I16, I8, U64, U32, U16, U8, BOOL, found 'Q4_0'"));
}

TEST(SafetensorsHeader, Duplicates) {
  const std::string a = R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  EXPECT_THAT(HeaderRefusal("{" + a + "," + a + "}", 4), HasSubstr("tensor 'a': expected once, found twice"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"dtype":"F32","dtype":"F32"}})", 0),
              HasSubstr("tensor 'a': expected one dtype, found two"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"shape":[],"shape":[]}})", 0),
              HasSubstr("tensor 'a': expected one shape, found two"));
  EXPECT_THAT(HeaderRefusal(R"({"__metadata__":{},"__metadata__":{}})", 0),
              HasSubstr("tensor '__metadata__': expected once, found twice"));
}

std::string TwoTensors(const std::string& first, const std::string& second) {
  return R"({"x":{"dtype":"U8","shape":[4],"data_offsets":)" + first +
         R"(},"y":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}";
}

TEST(SafetensorsHeader, Offsets) {
  EXPECT_TRUE(Parse(File(TwoTensors("[4,8]", "[0,4]"), 8)).ok());
  EXPECT_THAT(
      HeaderRefusal(TwoTensors("[0,4]", "[3,7]"), 8),
      HasSubstr("tensor 'y': expected data to begin at byte 4, where tensor 'x' ends, found 3 (overlapping"));
  EXPECT_THAT(
      HeaderRefusal(TwoTensors("[0,4]", "[0,4]"), 4),
      HasSubstr("tensor 'y': expected data to begin at byte 4, where tensor 'x' ends, found 0 (overlapping"));
  EXPECT_THAT(
      HeaderRefusal(TwoTensors("[0,4]", "[5,9]"), 9),
      HasSubstr("tensor 'y': expected data to begin at byte 4, where tensor 'x' ends, found 5 (a gap)"));
  EXPECT_THAT(HeaderRefusal(TwoTensors("[1,5]", "[5,9]"), 9),
              HasSubstr("tensor 'x': expected data to begin at byte 0, found 1 (a gap)"));
  EXPECT_THAT(HeaderRefusal(TwoTensors("[0,4]", "[4,8]"), 9),
              HasSubstr("expected 8 bytes of tensor data as the header says, found 9"));
  EXPECT_THAT(HeaderRefusal(TwoTensors("[0,4]", "[8,4]"), 8),
              HasSubstr("tensor 'y': data_offsets: expected begin <= end, found [8, 4]"));
  EXPECT_THAT(
      HeaderRefusal(TwoTensors("[0,4]", "[4,18446744073709551615]"), 8),
      HasSubstr(
          "tensor 'y': data_offsets: expected an end of at most 8, the bytes of data in the file, found "
          "18446744073709551615"));
}

TEST(SafetensorsHeader, ShapeDisagreesWithBytes) {
  EXPECT_THAT(HeaderRefusal(R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,12]}})", 12),
              HasSubstr("tensor 'a': expected 16 bytes for F32 [2, 2], found data_offsets of 12 bytes"));
  // 2^62 * 4 * 4 = 2^66: wraps to 0 in 64 bits.
  EXPECT_THAT(
      HeaderRefusal(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0),
      HasSubstr("tensor 'a': expected a shape whose bytes fit into 63 bits, found [4611686018427387904, 4]"));
  EXPECT_THAT(
      HeaderRefusal(R"({"a":{"dtype":"U8","shape":[18446744073709551615,0],"data_offsets":[0,0]}})", 0),
      HasSubstr("tensor 'a': expected a shape whose bytes fit into 63 bits"));
  EXPECT_THAT(HeaderRefusal(R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}})", 1),
              HasSubstr("tensor 'a': shape: expected at most 8 numbers, found more"));
}

TEST(SafetensorsHeader, DeepNestingCostsNothing) {
  constexpr size_t kDepth = 5'000'000;
  HeaderRefusal(std::string(kDepth, '['), 0);
  std::string objects;
  for (size_t i = 0; i < kDepth / 5; ++i) objects += "{\"a\":";
  EXPECT_THAT(HeaderRefusal(objects, 0),
              HasSubstr("tensor 'a': expected dtype, shape and data_offsets, found 'a'"));
}

TEST(SafetensorsHeader, NamesInMessagesAreHarmless) {
  EXPECT_THAT(HeaderRefusal(R"({"evil\n\u001b[2Jname":1})", 0),
              HasSubstr(R"(tensor 'evil\n\x1b[2Jname': expected an object, found 1)"));
  HeaderRefusal("{\"" + std::string(1 << 20, 'n') + "\":1}", 0);
}

std::string IndexRefusal(const std::string& json) {
  const absl::StatusOr<SafetensorsIndex> index = ParseSafetensorsIndex(json, "dir/index.json");
  EXPECT_EQ(index.status().code(), absl::StatusCode::kInvalidArgument) << index.status();
  const std::string message(index.status().message());
  EXPECT_EQ(message.rfind("dir/index.json: ", 0), 0u) << message;
  return message;
}

TEST(SafetensorsIndex, Reads) {
  const absl::StatusOr<SafetensorsIndex> index = ParseSafetensorsIndex(
      R"({"metadata":{"total_size":1,"deep":[[{"weight_map":2}]]},"weight_map":{"t":"m-1.safetensors"},"z":[1]})",
      "i");
  ASSERT_TRUE(index.ok()) << index.status();
  EXPECT_THAT(*index, ElementsAre(std::pair<const std::string, std::string>("t", "m-1.safetensors")));
}

TEST(SafetensorsIndex, Malformed) {
  EXPECT_THAT(IndexRefusal("{"), HasSubstr("expected valid JSON, found a syntax error at byte"));
  EXPECT_THAT(IndexRefusal("[]"), HasSubstr("expected a JSON object, found an array"));
  EXPECT_THAT(IndexRefusal("{}"), HasSubstr("expected a key weight_map, found none"));
  EXPECT_THAT(IndexRefusal(R"({"weight_map":[]})"),
              HasSubstr("weight_map: expected a JSON object, found an array"));
  EXPECT_THAT(IndexRefusal(R"({"weight_map":"x"})"),
              HasSubstr("weight_map: expected a JSON object, found a string"));
  EXPECT_THAT(IndexRefusal(R"({"weight_map":{"t":1}})"),
              HasSubstr("tensor 't': expected the name of a shard, found 1"));
  EXPECT_THAT(IndexRefusal(R"({"weight_map":{"t":{}}})"),
              HasSubstr("tensor 't': expected the name of a shard, found an object"));
  EXPECT_THAT(IndexRefusal(R"({"weight_map":{},"weight_map":{}})"),
              HasSubstr("weight_map: expected once, found twice"));
  EXPECT_THAT(IndexRefusal(R"({"weight_map":{"t":"a.safetensors","t":"a.safetensors"}})"),
              HasSubstr("tensor 't': expected once, found twice"));
}

TEST(SafetensorsIndex, NoPathTraversal) {
  for (const char* shard : {"../a.safetensors", "/etc/a.safetensors", "d/a.safetensors", "d\\\\a.safetensors",
                            "..", "", ".safetensors", "a.bin", "a\\u0000/.safetensors"}) {
    EXPECT_THAT(
        IndexRefusal(std::string(R"({"weight_map":{"t":")") + shard + "\"}}"),
        HasSubstr("tensor 't': expected the plain name of a .safetensors file beside the index, found '"))
        << shard;
  }
}

class SafetensorsSetTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "/safetensors_" + std::to_string(getpid()) + "_" +
           ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  void Write(const std::string& name, const std::string& bytes) {
    std::ofstream(dir_ + "/" + name, std::ios::binary) << bytes;
  }
  std::string OpenError() {
    const auto set = SafetensorsSet::Open(dir_);
    EXPECT_FALSE(set.ok());
    return std::string(set.status().message());
  }

  static constexpr char kOne[] = R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})";
  std::string dir_;
};

TEST_F(SafetensorsSetTest, SingleFile) {
  Write("model.safetensors", File(kGood, 26));
  const auto set = SafetensorsSet::Open(dir_);
  ASSERT_TRUE(set.ok()) << set.status();
  ASSERT_NE((*set)->Find("a"), nullptr);
  EXPECT_EQ(std::to_integer<int>((*set)->Find("a")->data[23]), 1);
  EXPECT_EQ((*set)->Find("a")->file, dir_ + "/model.safetensors");
  EXPECT_EQ((*set)->Find("__metadata__"), nullptr);
}

TEST_F(SafetensorsSetTest, Shards) {
  Write("model.safetensors.index.json", R"({"weight_map":{"a":"s-1.safetensors","b":"s-2.safetensors"}})");
  Write("s-1.safetensors", File(kOne, 4));
  Write("s-2.safetensors", File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                                3));
  const auto set = SafetensorsSet::Open(dir_);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ((*set)->Find("a")->data.size(), 4u);  // from the shard that the index names
  EXPECT_EQ((*set)->Find("b")->file, dir_ + "/s-2.safetensors");
}

TEST_F(SafetensorsSetTest, MissingShard) {
  Write("model.safetensors.index.json", R"({"weight_map":{"a":"s-1.safetensors"}})");
  EXPECT_EQ(OpenError(), dir_ + "/model.safetensors.index.json: tensor 'a': expected shard " + dir_ +
                             "/s-1.safetensors, found no such file");
}

TEST_F(SafetensorsSetTest, TensorMissingInShard) {
  Write("model.safetensors.index.json", R"({"weight_map":{"b":"s-1.safetensors"}})");
  Write("s-1.safetensors", File(kOne, 4));
  EXPECT_EQ(OpenError(),
            dir_ +
                "/s-1.safetensors: tensor 'b': expected here by model.safetensors.index.json, found no "
                "such tensor");
}

TEST_F(SafetensorsSetTest, MalformedShard) {
  Write("model.safetensors.index.json", R"({"weight_map":{"a":"s-1.safetensors"}})");
  Write("s-1.safetensors", File(kOne, 3));
  EXPECT_THAT(OpenError(),
              HasSubstr("s-1.safetensors: tensor 'a': data_offsets: expected an end of at most 3"));
}

TEST_F(SafetensorsSetTest, NotAFile) {
  EXPECT_EQ(OpenError().rfind(
                dir_ + ": expected model.safetensors or model.safetensors.index.json, found neither", 0),
            0u);
  Write("model.safetensors", "");
  EXPECT_EQ(OpenError(), dir_ + "/model.safetensors: expected a regular file, found an empty one");
  std::filesystem::remove(dir_ + "/model.safetensors");
  std::filesystem::create_directory(dir_ + "/model.safetensors");
  EXPECT_EQ(OpenError(), dir_ + "/model.safetensors: expected a regular file, found something else");
  std::filesystem::remove(dir_ + "/model.safetensors");
  ASSERT_EQ(mkfifo((dir_ + "/model.safetensors").c_str(), 0600), 0);  // must not wait for a writer
  EXPECT_EQ(OpenError(), dir_ + "/model.safetensors: expected a regular file, found something else");
}

}  // namespace
}  // namespace atp
