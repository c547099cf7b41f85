#include "server/json_object.h"

#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/json_depth.h"

namespace atp {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 32;

absl::string_view ToAbsl(std::string_view text) { return {text.data(), text.size()}; }

// Notices a key that an object has twice: which one counts would depend on who reads it. Errors are the
// parser's to find. (As a callback of the parser this would make it walk all elements so far at each object's
// end.)
class DuplicateKeys : public nlohmann::json_sax<json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(int64_t) override { return true; }
  bool number_unsigned(uint64_t) override { return true; }
  bool number_float(double, const std::string&) override { return true; }
  bool string(std::string&) override { return true; }
  bool binary(json::binary_t&) override { return true; }
  bool start_array(size_t) override { return true; }
  bool end_array() override { return true; }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return false; }
  bool start_object(size_t) override {
    keys_.emplace_back();
    return true;
  }
  bool end_object() override {
    keys_.pop_back();
    return true;
  }
  bool key(std::string& key) override {
    if (keys_.back().insert(key).second) return true;
    found_ = key;
    return false;
  }
  const std::optional<std::string>& found() const { return found_; }

 private:
  std::vector<std::set<std::string>> keys_;
  std::optional<std::string> found_;
};

}  // namespace

absl::StatusOr<json> ParseJsonObject(std::string_view text) {
  if (text.empty()) return absl::InvalidArgumentError("the body is empty; send a JSON object");
  if (JsonDeeperThan(text, kMaxDepth)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the body is nested more than ", kMaxDepth, " levels deep"));
  }
  try {
    json parsed = json::parse(text.begin(), text.end());
    DuplicateKeys duplicates;
    json::sax_parse(text.begin(), text.end(), &duplicates);
    if (duplicates.found()) {
      return absl::InvalidArgumentError(absl::StrCat(duplicates.found()->substr(0, 64), ": is given twice"));
    }
    if (!parsed.is_object()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the body must be a JSON object, got ", Describe(parsed)));
    }
    return parsed;
  } catch (const json::parse_error& e) {
    return absl::InvalidArgumentError(
        absl::StrCat("the body is not valid UTF-8 JSON (at byte ", e.byte, ")"));
  } catch (const json::exception&) {  // out_of_range: 1e999
    return absl::InvalidArgumentError("the body has a number that is out of range");
  }
}

std::string Describe(const json& value) {
  switch (value.type()) {
    case json::value_t::null:
      return "null";
    case json::value_t::object:
      return "an object";
    case json::value_t::array:
      return value.empty() ? "an empty array" : "an array";
    case json::value_t::string:
      return "a string";
    default:
      return value.dump();  // a number or a boolean
  }
}

std::optional<int64_t> AsInteger(const json& value) {
  if (value.is_number_unsigned()) {
    const uint64_t number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const double number = value.get<double>();
    // Beyond 2^53 a double no longer says which integer was meant.
    if (std::abs(number) <= 9007199254740992.0 && number == std::floor(number))
      return static_cast<int64_t>(number);
  }
  return std::nullopt;
}

const json* JsonObject::Find(std::string_view name) const {
  const auto found = object_->find(std::string(name));
  return found == object_->end() || found->is_null() ? nullptr : &*found;
}

void JsonObject::Fail(std::string_view name, std::string_view problem) const {
  if (status_->ok()) {
    *status_ = absl::InvalidArgumentError(absl::StrCat(path_, ToAbsl(name), ": ", ToAbsl(problem)));
  }
}

void JsonObject::Read(std::string_view name, bool* value) const {
  const json* found = Find(name);
  if (found == nullptr) return;
  if (!found->is_boolean()) return Fail(name, absl::StrCat("must be true or false, got ", Describe(*found)));
  *value = found->get<bool>();
}

void JsonObject::Read(std::string_view name, double* value) const {
  const json* found = Find(name);
  if (found == nullptr) return;
  if (!found->is_number()) return Fail(name, absl::StrCat("must be a number, got ", Describe(*found)));
  *value = found->get<double>();
}

void JsonObject::Read(std::string_view name, float* value) const {
  const json* found = Find(name);
  if (found == nullptr) return;
  if (!found->is_number()) return Fail(name, absl::StrCat("must be a number, got ", Describe(*found)));
  const double number = found->get<double>();
  if (!(std::abs(number) <= std::numeric_limits<float>::max())) {
    return Fail(name, absl::StrCat("is out of range: ", Describe(*found)));
  }
  *value = static_cast<float>(number);
}

void JsonObject::Read(std::string_view name, std::string* value) const {
  const json* found = Find(name);
  if (found == nullptr) return;
  if (!found->is_string()) return Fail(name, absl::StrCat("must be a string, got ", Describe(*found)));
  *value = found->get<std::string>();
}

void JsonObject::Read(std::string_view name, int* value) const {
  Read(name, std::numeric_limits<int>::min(), std::numeric_limits<int>::max(), value);
}

void JsonObject::Read(std::string_view name, int min, int max, int* value) const {
  const json* found = Find(name);
  if (found == nullptr) return;
  const std::optional<int64_t> number = AsInteger(*found);
  if (!found->is_number() || (!number && found->is_number_float())) {
    return Fail(name, absl::StrCat("must be an integer, got ", Describe(*found)));
  }
  if (!number || *number < min || *number > max) {
    return Fail(name, absl::StrCat("must be in [", min, ", ", max, "], got ", Describe(*found)));
  }
  *value = static_cast<int>(*number);
}

void JsonObject::ReadSeed(std::string_view name, std::optional<uint64_t>* value) const {
  const json* found = Find(name);
  if (found == nullptr) return;
  if (found->is_number_unsigned()) {
    *value = found->get<uint64_t>();
    return;
  }
  const std::optional<int64_t> number = AsInteger(*found);
  if (!number) return Fail(name, absl::StrCat("must be a 64-bit integer, got ", Describe(*found)));
  if (*number == -1) return;  // vLLM's and llama-server's word for none
  *value = static_cast<uint64_t>(*number);
}

absl::StatusOr<std::vector<TokenId>> TokenArray(const json& array) {
  std::vector<TokenId> tokens;
  tokens.reserve(array.size());
  for (size_t i = 0; i < array.size(); ++i) {
    const std::optional<int64_t> id = AsInteger(array[i]);
    if (!id || *id < 0 || *id > std::numeric_limits<TokenId>::max()) {
      return absl::InvalidArgumentError(
          absl::StrCat("[", i, "] must be a token id, got ", Describe(array[i])));
    }
    tokens.push_back(static_cast<TokenId>(*id));
  }
  return tokens;
}

void JsonObject::ReadTokens(std::string_view name, std::vector<TokenId>* value) const {
  const json* found = Find(name);
  if (found == nullptr) return;
  if (!found->is_array())
    return Fail(name, absl::StrCat("must be an array of token ids, got ", Describe(*found)));
  absl::StatusOr<std::vector<TokenId>> tokens = TokenArray(*found);
  if (!tokens.ok()) {
    const absl::string_view problem = tokens.status().message();
    return Fail(name, {problem.data(), problem.size()});
  }
  *value = *std::move(tokens);
}

void JsonObject::ReadStrings(std::string_view name, std::vector<std::string>* value) const {
  const json* found = Find(name);
  if (found == nullptr) return;
  if (found->is_string()) {
    *value = {found->get<std::string>()};
    return;
  }
  if (!found->is_array()) {
    return Fail(name, absl::StrCat("must be a string or an array of strings, got ", Describe(*found)));
  }
  std::vector<std::string> strings;
  for (const json& item : *found) {
    if (!item.is_string()) return Fail(name, absl::StrCat("must have strings only, got ", Describe(item)));
    strings.push_back(item.get<std::string>());
  }
  *value = std::move(strings);
}

void JsonObject::Refuse(std::initializer_list<std::string_view> names) const {
  for (std::string_view name : names) {
    const json* found = Find(name);
    if (found == nullptr || (found->is_boolean() && !found->get<bool>())) continue;
    if ((found->is_array() || found->is_object()) && found->empty()) continue;
    if (*found == 0 || *found == "") continue;  // llama-server's own clients send these for "off"
    Fail(name, "is not supported by this server; leave it out");
  }
}

}  // namespace atp
