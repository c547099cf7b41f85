// Reading one JSON object field by field, for .cc files that parse bodies. The first problem is kept and
// names its field; later reads are harmless. null is absent.
#ifndef ATP_SERVER_JSON_OBJECT_H_
#define ATP_SERVER_JSON_OBJECT_H_

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/request.h"

namespace atp {

// A JSON object, or InvalidArgument: not JSON, not an object, nested too deeply, a duplicate key, invalid
// UTF-8.
absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text);

// "a string", "null", or a number's digits: what a message may say about a value without repeating it at
// length.
std::string Describe(const nlohmann::json& value);

// An integral number, also when written 1.0 or 1e3.
std::optional<int64_t> AsInteger(const nlohmann::json& value);

class JsonObject {
 public:
  // Both outlive the reader. `path` is put before the names in messages ("messages[2].").
  JsonObject(const nlohmann::json* object, absl::Status* status, std::string path = "")
      : object_(object), status_(status), path_(std::move(path)) {}

  // Null when the field is absent or null.
  const nlohmann::json* Find(std::string_view name) const;

  // The value is left alone when the field is absent or wrong.
  void Read(std::string_view name, bool* value) const;
  void Read(std::string_view name, float* value) const;
  void Read(std::string_view name, double* value) const;
  void Read(std::string_view name, std::string* value) const;
  void Read(std::string_view name, int* value) const;  // any int32
  void Read(std::string_view name, int min, int max, int* value) const;
  void ReadSeed(std::string_view name,
                std::optional<uint64_t>* value) const;  // any 64-bit integer, signed or not
  void ReadTokens(std::string_view name, std::vector<TokenId>* value) const;
  void ReadStrings(std::string_view name,
                   std::vector<std::string>* value) const;  // a string or an array of them

  // Fields that would change the answer and that we cannot honour.
  void Refuse(std::initializer_list<std::string_view> names) const;
  void Fail(std::string_view name, std::string_view problem) const;

 private:
  const nlohmann::json* object_;
  absl::Status* status_;
  std::string path_;
};

// The ids of an array, or what is wrong with it ("[3] must be a token id, got a string").
absl::StatusOr<std::vector<TokenId>> TokenArray(const nlohmann::json& array);

}  // namespace atp

#endif  // ATP_SERVER_JSON_OBJECT_H_
