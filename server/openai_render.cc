#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/utf8.h"
#include "server/generate_service.h"
#include "server/openai_json.h"

namespace atp {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

// Model output and paths may be anything; what leaves is valid UTF-8.
std::string Dump(const ordered_json& value) {
  return value.dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace);
}

// A token's text as OpenAI's completions show it: part of a UTF-8 sequence becomes "bytes:\xe2\x82".
std::string LegacyTokenText(const std::string& bytes) {
  if (IsValidUtf8(bytes)) return bytes;
  std::string text = "bytes:";
  for (unsigned char byte : bytes) absl::StrAppendFormat(&text, "\\x%02x", byte);
  return text;
}

std::string Utf8(const std::string& bytes) {
  std::string text;
  AppendUtf8(bytes, /*at_end=*/true, &text);
  return text;
}

// JSON has no infinities; OpenAI writes -9999.0 for a token that has no probability at all.
ordered_json Number(float logprob) {
  if (std::isnan(logprob)) return nullptr;
  return std::isfinite(logprob) ? ordered_json(logprob) : ordered_json(-9999.0);
}

// Log probabilities are text at once, token by token: as JSON values they would take ten times the memory,
// and an answer may have a million of them.
class TextArray {
 public:
  void Add(const ordered_json& value) {
    text_ += text_.size() > 1 ? "," : "";
    text_ += Dump(value);
  }
  std::string Take() { return std::move(text_ += ']'); }

 private:
  std::string text_ = "[";
};

std::string LegacyLogprobs(const AnswerHeader& header, const ChoicePiece& piece, const Tokenizer& tokenizer,
                           TextPosition* position) {
  TextArray tokens, values, tops, offsets;
  for (const TokenLogprob& item : piece.logprobs) {
    const std::string text = LegacyTokenText(tokenizer.TokenBytes(item.token, /*keep_special=*/true));
    tokens.Add(text);
    values.Add(Number(item.logprob));
    offsets.Add(position->offset());
    position->Advance(item);
    if (std::isnan(item.logprob)) {  // the first token of an echoed prompt
      tops.Add(nullptr);
      continue;
    }
    ordered_json top = ordered_json::object();
    for (const auto& [token, logprob] : item.top) {
      if (static_cast<int>(top.size()) >= header.top_logprobs) break;
      // Two tokens can have one text: the likelier one stays.
      top.emplace(LegacyTokenText(tokenizer.TokenBytes(token, true)), Number(logprob));
    }
    top.emplace(text, Number(item.logprob));  // the chosen one is always there
    tops.Add(top);
  }
  return absl::StrCat(R"({"text_offset":)", offsets.Take(), R"(,"token_logprobs":)", values.Take(),
                      R"(,"tokens":)", tokens.Take(), R"(,"top_logprobs":)", tops.Take(), "}");
}

ordered_json ChatToken(const Tokenizer& tokenizer, TokenId token, float logprob) {
  const std::string bytes = tokenizer.TokenBytes(token, /*keep_special=*/true);
  ordered_json byte_values = ordered_json::array();
  for (unsigned char byte : bytes) byte_values.push_back(byte);
  return {{"token", Utf8(bytes)}, {"logprob", Number(logprob)}, {"bytes", std::move(byte_values)}};
}

std::string ChatLogprobs(const AnswerHeader& header, const ChoicePiece& piece, const Tokenizer& tokenizer) {
  TextArray content;
  for (const TokenLogprob& item : piece.logprobs) {
    ordered_json entry = ChatToken(tokenizer, item.token, item.logprob);
    ordered_json top = ordered_json::array();
    for (const auto& [token, logprob] : item.top) {
      if (static_cast<int>(top.size()) >= header.top_logprobs) break;
      top.push_back(ChatToken(tokenizer, token, logprob));
    }
    entry["top_logprobs"] = std::move(top);
    content.Add(entry);
  }
  return absl::StrCat(R"({"content":)", content.Take(), R"(,"refusal":null})");
}

std::string Logprobs(const AnswerHeader& header, const ChoicePiece& piece, const Tokenizer& tokenizer,
                     TextPosition* position) {
  if (!header.with_logprobs) return "null";
  return header.chat ? ChatLogprobs(header, piece, tokenizer)
                     : LegacyLogprobs(header, piece, tokenizer, position);
}

ordered_json FinishName(const std::optional<FinishReason>& finish) {
  if (!finish) return nullptr;
  return *finish == FinishReason::kLength ? "length" : "stop";
}

ordered_json UsageObject(const Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens},
          {"completion_tokens", usage.completion_tokens},
          {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens}}}};
}

// Not a field of OpenAI's: beside `usage`, so that clients that know theirs pass over it.
void AddAtp(const CompressionUsage& atp, ordered_json* answer) {
  if (atp.preset.empty()) return;
  (*answer)["atp"] = {{"preset", atp.preset},
                      {"ratio", atp.ratio},
                      {"bits", atp.bits},
                      {"tokens", atp.tokens},
                      {"compressed_tokens", atp.compressed_tokens},
                      {"entries", atp.entries},
                      {"kv_bytes", atp.kv_bytes},
                      {"exact_kv_bytes", atp.exact_kv_bytes}};
}

ordered_json Envelope(const AnswerHeader& header, bool chunk) {
  const char* object = !header.chat ? "text_completion" : chunk ? "chat.completion.chunk" : "chat.completion";
  return {{"id", header.id},
          {"object", object},
          {"created", header.created_unix_seconds},
          {"model", header.model},
          {"system_fingerprint", absl::StrCat("atp-", std::string(AtpVersion()))}};
}

// An object of the members of `begin`, one that is text already, and the members of `end`.
std::string Join(const ordered_json& begin, const char* name, const std::string& member,
                 const ordered_json& end) {
  std::string text = Dump(begin);
  text.back() = ',';
  absl::StrAppend(&text, "\"", name, "\":", member, end.empty() ? "" : ",");
  return text.append(Dump(end), 1);
}

std::string ChoiceText(const AnswerHeader& header, const ordered_json& begin, const ChoicePiece& piece,
                       const Tokenizer& tokenizer, TextPosition* position) {
  return Join(begin, "logprobs", Logprobs(header, piece, tokenizer, position),
              {{"finish_reason", FinishName(piece.finish)}});
}

std::string Chunk(const AnswerHeader& header, const std::string& choice,
                  const CompressionUsage* last = nullptr) {
  ordered_json end = ordered_json::object();
  if (header.include_usage) end["usage"] = nullptr;
  if (last != nullptr) AddAtp(*last, &end);
  return Join(Envelope(header, true), "choices", absl::StrCat("[", choice, "]"), end);
}

// A field's name: what a client can find in its request.
bool IsFieldName(std::string_view text) {
  return !text.empty() && text.size() <= 64 && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '_' || c == '.' || c == '[' || c == ']' || c == '-';
  });
}

struct ErrorKind {
  const char* type;
  const char* code;  // null: none
};

ErrorKind KindOf(int http_status) {
  switch (http_status) {
    case 401:
      return {"authentication_error", "invalid_api_key"};
    case 404:
      return {"invalid_request_error", "not_found"};
    case 405:
      return {"invalid_request_error", "method_not_allowed"};
    case 408:
      return {"invalid_request_error", "request_timeout"};
    case 413:
      return {"invalid_request_error", "request_too_large"};
    case 429:
      return {"rate_limit_error", "rate_limit_exceeded"};
    case 431:
      return {"invalid_request_error", "headers_too_large"};
    case 503:
      return {"server_error", "unavailable"};
    case 504:
      return {"server_error", "deadline_exceeded"};
    case 505:
      return {"invalid_request_error", "http_version_not_supported"};
    default:
      return http_status < 500 ? ErrorKind{"invalid_request_error", nullptr}
                               : ErrorKind{"server_error", "internal_error"};
  }
}

ordered_json ModelObject(const ModelCard& model) {
  return {{"id", model.id},
          {"object", "model"},
          {"created", model.created_unix_seconds},
          {"owned_by", "atp"},
          {"max_model_len", model.max_context_tokens}};
}

}  // namespace

TextPosition::TextPosition(const Tokenizer* tokenizer, bool echo)
    : detokenizer_(tokenizer, /*continues_text=*/!echo) {}

void TextPosition::Advance(const TokenLogprob& token) {
  const std::string text = detokenizer_.Append(token.token);
  offset_ +=
      std::count_if(text.begin(), text.end(), [](unsigned char byte) { return (byte & 0xC0) != 0x80; });
}

int HttpStatusOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kFailedPrecondition:
      return 400;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kResourceExhausted:
      return 429;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kCancelled:
      return 503;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

std::string RenderError(int http_status, std::string_view message, const char* given_code) {
  const size_t colon = message.find(": ");
  ordered_json param = nullptr;
  if (http_status < 500 && colon != std::string_view::npos && IsFieldName(message.substr(0, colon))) {
    param = std::string(message.substr(0, colon));
  }
  const ErrorKind kind = KindOf(http_status);
  ordered_json code = kind.code == nullptr ? ordered_json(nullptr) : ordered_json(kind.code);
  if (http_status == 404 && param == "model") code = "model_not_found";
  if (given_code != nullptr) code = given_code;
  return Dump({{"error",
                {{"message", std::string(message)}, {"type", kind.type}, {"param", param}, {"code", code}}}});
}

std::string RenderRoleChunk(const AnswerHeader& header, int index) {
  return Chunk(header, Dump({{"index", index},
                             {"delta", {{"role", "assistant"}, {"content", ""}}},
                             {"logprobs", nullptr},
                             {"finish_reason", nullptr}}));
}

std::string RenderChunk(const AnswerHeader& header, const ChoicePiece& piece, const Tokenizer& tokenizer,
                        TextPosition* position, const CompressionUsage* last) {
  ordered_json choice = {{"index", piece.index}};
  if (header.chat) {
    choice["delta"] = ordered_json::object();
    if (!piece.text.empty() || !piece.logprobs.empty()) choice["delta"]["content"] = piece.text;
  } else {
    choice["text"] = piece.text;
  }
  if (!piece.logprobs.empty()) {
    return Chunk(header, ChoiceText(header, choice, piece, tokenizer, position), last);
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = FinishName(piece.finish);
  return Chunk(header, Dump(choice), last);
}

std::string RenderUsageChunk(const AnswerHeader& header, const Usage& usage) {
  ordered_json chunk = Envelope(header, true);
  chunk["choices"] = ordered_json::array();
  chunk["usage"] = UsageObject(usage);
  AddAtp(usage.atp, &chunk);
  return Dump(chunk);
}

std::string RenderAnswer(const AnswerHeader& header, const std::vector<ChoicePiece>& pieces,
                         const Usage& usage, const Tokenizer& tokenizer,
                         std::vector<TextPosition> positions) {
  std::string choices = "[";
  for (size_t i = 0; i < pieces.size(); ++i) {
    const ChoicePiece& piece = pieces[i];
    ordered_json choice = {{"index", piece.index}};
    if (header.chat) {
      choice["message"] = {{"role", "assistant"}, {"content", piece.text}, {"refusal", nullptr}};
    } else {
      choice["text"] = piece.text;
    }
    absl::StrAppend(&choices, i > 0 ? "," : "", ChoiceText(header, choice, piece, tokenizer, &positions[i]));
  }
  choices += ']';
  ordered_json end = {{"usage", UsageObject(usage)}};
  AddAtp(usage.atp, &end);
  return Join(Envelope(header, false), "choices", choices, end);
}

std::string RenderModel(const ModelCard& model) { return Dump(ModelObject(model)); }

std::string RenderModelList(const ModelCard& model) {
  return Dump({{"object", "list"}, {"data", ordered_json::array({ModelObject(model)})}});
}

std::string RenderTokens(const std::vector<TokenId>& tokens, int max_context_tokens) {
  return Dump({{"count", tokens.size()}, {"max_model_len", max_context_tokens}, {"tokens", tokens}});
}

std::string RenderText(std::string_view text) {
  return Dump({{"prompt", std::string(text)}, {"content", std::string(text)}});
}

std::string RenderVersion() { return Dump({{"version", std::string(AtpVersion())}}); }

std::string RenderHealth(std::string_view state) { return Dump({{"status", std::string(state)}}); }

}  // namespace atp
