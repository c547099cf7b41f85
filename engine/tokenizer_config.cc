#include "engine/tokenizer_config.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/safetensors_header.h"

namespace atp {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxConfigBytes = size_t{64} << 20;

// Null when the file is absent.
absl::StatusOr<Json> ReadJsonObject(const std::string& path) {
  absl::StatusOr<std::string> text = ReadWholeFile(path, kMaxConfigBytes);
  if (absl::IsNotFound(text.status())) return Json();
  if (!text.ok()) return text.status();
  Json json;
  try {
    json = Json::parse(*text);
  } catch (const Json::parse_error& e) {  // its text quotes the file, at any length
    return absl::InvalidArgumentError(absl::StrCat(path, ": not JSON: a syntax error at byte ", e.byte));
  } catch (const Json::exception&) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not JSON: a number that no double can hold"));
  }
  if (!json.is_object()) return absl::InvalidArgumentError(absl::StrCat(path, ": expected a JSON object"));
  return json;
}

// A field that is there and not null, else nullptr.
const Json* Find(const Json& json, const char* field) {
  if (!json.is_object()) return nullptr;
  const auto it = json.find(field);
  return it == json.end() || it->is_null() ? nullptr : &*it;
}

// "<s>", or {"content": "<s>", …} as older files write it.
std::optional<std::string> TokenText(const Json& json, const char* field) {
  const Json* value = Find(json, field);
  if (value != nullptr && value->is_object()) value = Find(*value, "content");
  if (value == nullptr || !value->is_string()) return std::nullopt;
  return value->get<std::string>();
}

std::optional<bool> Flag(const Json& json, const char* field) {
  const Json* value = Find(json, field);
  if (value == nullptr || !value->is_boolean()) return std::nullopt;
  return value->get<bool>();
}

// One id or a list of them; -1 means none in some files.
absl::Status AppendIds(const Json& json, const char* field, const std::string& path,
                       std::vector<TokenId>* ids) {
  const Json* value = Find(json, field);
  if (value == nullptr) return absl::OkStatus();
  const auto append = [&](const Json& id) {
    if (!id.is_number_integer()) return false;
    const int64_t number = id.get<int64_t>();
    if (number < -1 || number > INT32_MAX) return false;
    if (number >= 0) ids->push_back(static_cast<TokenId>(number));
    return true;
  };
  const bool good = value->is_array() ? std::all_of(value->begin(), value->end(), append) : append(*value);
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(path, ": ", field, " must be a token id or a list of token ids"));
}

absl::Status ReadAddedTokens(const Json& config, const std::string& path, std::vector<AddedToken>* tokens) {
  const Json* decoder = Find(config, "added_tokens_decoder");
  if (decoder == nullptr) return absl::OkStatus();
  if (!decoder->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": added_tokens_decoder must be an object"));
  }
  for (const auto& [key, value] : decoder->items()) {
    const std::optional<std::string> content = TokenText(value, "content");
    const bool is_number =
        !key.empty() && key.size() <= 9 && key.find_first_not_of("0123456789") == std::string::npos;
    if (!content || !is_number) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": added_tokens_decoder must map token ids to objects with content, see ",
                       QuoteForError(key)));
    }
    AddedToken token;
    token.content = *content;
    token.id = std::stoi(key);
    token.special = Flag(value, "special").value_or(false);
    token.single_word = Flag(value, "single_word").value_or(false);
    token.lstrip = Flag(value, "lstrip").value_or(false);
    token.rstrip = Flag(value, "rstrip").value_or(false);
    token.normalized = Flag(value, "normalized").value_or(false);
    tokens->push_back(std::move(token));
  }
  return absl::OkStatus();
}

// Of older models: {"<|im_end|>": 32000}.
absl::Status ReadOldAddedTokens(const std::string& path, std::vector<AddedToken>* tokens) {
  absl::StatusOr<Json> json = ReadJsonObject(path);
  if (!json.ok()) return json.status();
  for (const auto& [content, id] : json->items()) {
    if (content.empty() || !id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": must map tokens to ids, see ", QuoteForError(content)));
    }
    tokens->emplace_back();
    tokens->back().content = content;
    tokens->back().id = id.get<TokenId>();
  }
  return absl::OkStatus();
}

std::string ChatTemplateOf(const Json& config) {
  const Json* value = Find(config, "chat_template");
  if (value == nullptr) return "";
  if (value->is_string()) return value->get<std::string>();
  if (!value->is_array()) return "";
  for (const Json& entry : *value) {
    if (TokenText(entry, "name") == "default") return TokenText(entry, "template").value_or("");
  }
  return "";
}

}  // namespace

absl::StatusOr<std::string> ReadWholeFile(const std::string& path, size_t max_bytes) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) return absl::NotFoundError(absl::StrCat(path, ": no such file"));
  if (!std::filesystem::is_regular_file(status)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  const uintmax_t size = std::filesystem::file_size(path, error);
  if (error || size > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", size, " bytes; at most ", max_bytes, " are read"));
  }
  std::string bytes(size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(size))) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  }
  return bytes;
}

absl::StatusOr<TokenizerConfig> ReadTokenizerConfig(const std::string& model_dir) {
  TokenizerConfig config;
  const std::string path = model_dir + "/tokenizer_config.json";
  absl::StatusOr<Json> json = ReadJsonObject(path);
  if (!json.ok()) return json.status();
  config.add_bos_token = Flag(*json, "add_bos_token");
  config.add_eos_token = Flag(*json, "add_eos_token");
  config.bos_token = TokenText(*json, "bos_token");
  config.eos_token = TokenText(*json, "eos_token");
  config.chat_template = ChatTemplateOf(*json);
  if (absl::Status s = ReadAddedTokens(*json, path, &config.added_tokens); !s.ok()) return s;
  if (config.added_tokens.empty()) {
    const std::string old = model_dir + "/added_tokens.json";
    if (absl::Status s = ReadOldAddedTokens(old, &config.old_added_tokens); !s.ok()) return s;
  }
  // generation_config.json is what a model was released to stop at; config.json only counts where that is
  // silent.
  for (const char* name : {"/generation_config.json", "/config.json"}) {
    absl::StatusOr<Json> model = ReadJsonObject(model_dir + name);
    if (!model.ok()) return model.status();
    if (config.eos_token_ids.empty()) {
      if (absl::Status s = AppendIds(*model, "eos_token_id", model_dir + name, &config.eos_token_ids);
          !s.ok())
        return s;
    }
    std::vector<TokenId> bos;
    if (absl::Status s = AppendIds(*model, "bos_token_id", model_dir + name, &bos); !s.ok()) return s;
    if (!config.bos_token_id && !bos.empty()) config.bos_token_id = bos[0];
  }
  return config;
}

absl::StatusOr<std::string> ReadChatTemplate(const std::string& model_dir) {
  absl::StatusOr<std::string> jinja = ReadWholeFile(model_dir + "/chat_template.jinja", kMaxConfigBytes);
  if (!absl::IsNotFound(jinja.status())) return jinja;
  absl::StatusOr<Json> json = ReadJsonObject(model_dir + "/tokenizer_config.json");
  if (!json.ok()) return json.status();
  return ChatTemplateOf(*json);
}

absl::StatusOr<ResolvedSpecials> ResolveSpecials(
    const TokenizerConfig& config, const TokenizerDefaults& defaults, int vocab_size,
    const std::function<std::optional<TokenId>(std::string_view)>& id_of) {
  const auto check = [&](TokenId id, const char* field) -> absl::Status {
    if (id >= 0 && id < vocab_size) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(field, " of generation_config.json or config.json is ", id,
                                                   ", but the tokenizer's ids are 0 to ", vocab_size - 1));
  };
  const auto named = [&](const std::string& token, const char* field) -> absl::StatusOr<TokenId> {
    if (const auto id = id_of(token)) return *id;
    return absl::InvalidArgumentError(absl::StrCat(field, " of tokenizer_config.json is ",
                                                   QuoteForError(token), ", which is not in the vocabulary"));
  };
  ResolvedSpecials result;
  result.special.bos = defaults.bos;
  if (config.bos_token) {
    absl::StatusOr<TokenId> id = named(*config.bos_token, "bos_token");
    if (!id.ok()) return id.status();
    result.special.bos = *id;
  } else if (!defaults.bos && config.bos_token_id) {
    if (absl::Status s = check(*config.bos_token_id, "bos_token_id"); !s.ok()) return s;
    result.special.bos = config.bos_token_id;
  }
  std::vector<TokenId> eos = config.eos_token_ids;
  for (TokenId id : eos) {
    if (absl::Status s = check(id, "eos_token_id"); !s.ok()) return s;
  }
  if (config.eos_token) {
    absl::StatusOr<TokenId> id = named(*config.eos_token, "eos_token");
    if (!id.ok()) return id.status();
    eos.push_back(*id);
  }
  eos.insert(eos.end(), defaults.eos.begin(), defaults.eos.end());
  for (TokenId id : eos) {
    std::vector<TokenId>& seen = result.special.eos;
    if (std::find(seen.begin(), seen.end(), id) == seen.end()) seen.push_back(id);
  }
  for (const std::vector<TokenId>* ids : {&defaults.prefix, &defaults.suffix}) {
    for (TokenId id : *ids) {
      if (id >= 0 && id < vocab_size) continue;
      return absl::InvalidArgumentError(absl::StrCat("post_processor: adds token ", id,
                                                     ", but the tokenizer's ids are 0 to ", vocab_size - 1));
    }
  }
  result.prefix = defaults.prefix;
  result.suffix = defaults.suffix;
  if (config.add_bos_token && result.special.bos) {
    result.prefix.clear();
    if (*config.add_bos_token) result.prefix.push_back(*result.special.bos);
  }
  if (config.add_eos_token && !eos.empty()) {
    result.suffix.clear();
    // The text's own end, which is the token of that name and not each id a generation may stop at.
    if (*config.add_eos_token) result.suffix.push_back(config.eos_token ? *id_of(*config.eos_token) : eos[0]);
  }
  return result;
}

}  // namespace atp
