#include "server/chat_template.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace atp {

// Collects a prompt: control tokens by name, and text between them. Neighbouring text is encoded as one, so
// that tokens form across the seam of template and message as they did in training; and never with control
// tokens parsed.
class ChatTemplate::Prompt {
 public:
  explicit Prompt(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void Bos() {
    if (tokenizer_.special().bos) AddId(*tokenizer_.special().bos);
  }
  // The end of an answer in formats that use the tokenizer's own end-of-sequence token.
  void Eos(const char* otherwise) {
    if (const auto id = tokenizer_.IdOf(otherwise)) {
      AddId(*id);
    } else if (!tokenizer_.special().eos.empty()) {
      AddId(tokenizer_.special().eos[0]);
    }
  }
  bool Has(const char* token) const { return tokenizer_.IdOf(token).has_value(); }
  // A vocabulary without the token gets its text.
  void Control(const char* token) {
    if (const auto id = tokenizer_.IdOf(token)) {
      AddId(*id);
    } else {
      text_ += token;
    }
  }
  void Text(std::string_view text) { text_ += text; }

  std::vector<TokenId> Take() {
    FlushText();
    return tokenizer_.EncodeParts(parts_);
  }

 private:
  void AddId(TokenId id) {
    FlushText();
    parts_.push_back({id, ""});
  }
  void FlushText() {
    if (!text_.empty()) parts_.push_back({std::nullopt, std::exchange(text_, "")});
  }

  const Tokenizer& tokenizer_;
  std::string text_;
  std::vector<PromptPart> parts_;
};

namespace {

std::string Trim(const std::string& text) {
  const char* space = " \t\r\n\f\v";
  const size_t begin = text.find_first_not_of(space);
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(space) - begin + 1);
}

bool IsSystem(const ChatMessage& message) { return message.role == "system" || message.role == "developer"; }
const char* Role(const ChatMessage& message) { return IsSystem(message) ? "system" : message.role.c_str(); }

absl::Status CheckRoles(const std::vector<ChatMessage>& messages) {
  if (messages.empty())
    return absl::InvalidArgumentError("messages: is empty; at least one message is needed");
  for (size_t i = 0; i < messages.size(); ++i) {
    if (IsSystem(messages[i]) || messages[i].role == "user" || messages[i].role == "assistant") continue;
    return absl::InvalidArgumentError(absl::StrCat("messages[", i, "].role: is '",
                                                   messages[i].role.substr(0, 64),
                                                   "'; it must be system, developer, user or assistant"));
  }
  return absl::OkStatus();
}

// llama-2 and mistral: an optional system message, then user and assistant in turn.
absl::Status CheckTurns(const std::vector<ChatMessage>& messages, const char* format,
                        bool add_generation_prompt) {
  const size_t first = IsSystem(messages[0]) ? 1 : 0;
  for (size_t i = first; i < messages.size(); ++i) {
    const char* expected = (i - first) % 2 == 0 ? "user" : "assistant";
    if (messages[i].role == expected) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "messages[", i, "].role: is '", messages[i].role, "', but the ", format, " chat template needs '",
        expected, "' there: an optional system message, then user and assistant in turn"));
  }
  if (first == messages.size()) {
    return absl::InvalidArgumentError(absl::StrCat("messages[0].role: is a system message's, alone; the ",
                                                   format, " chat template needs a user message after it"));
  }
  if (add_generation_prompt && messages.back().role != "user") {
    return absl::InvalidArgumentError(
        absl::StrCat("messages[", messages.size() - 1, "].role: is 'assistant'; the ", format,
                     " chat template answers a user message, which must come last"));
  }
  return absl::OkStatus();
}

// What a Jinja template writes as the system message where there is none: one literal from the opening of the
// turn to its end.
std::string DefaultSystem(std::string_view jinja) {
  constexpr std::string_view kOpening = "<|im_start|>system", kEnd = "<|im_end|>", kNewline = "\\n";
  for (size_t at = jinja.find(kOpening); at != std::string_view::npos; at = jinja.find(kOpening, at + 1)) {
    std::string_view rest = jinja.substr(at + kOpening.size());
    if (rest.substr(0, kNewline.size()) != kNewline) continue;
    rest.remove_prefix(kNewline.size());
    const std::string_view text = rest.substr(0, rest.find(kEnd));
    if (text.empty() || text.size() == rest.size() || text.find_first_of("'\"{}\\") != std::string_view::npos)
      continue;  // put together of several parts
    return std::string(text);
  }
  return "";
}

// `{%- set date_string = "26 Jul 2024" %}`; "" where the template asks for today.
std::string DateOf(std::string_view jinja) {
  constexpr std::string_view kSet = "date_string = \"";
  const size_t at = jinja.find(kSet);
  if (at == std::string_view::npos || jinja.find("strftime_now") != std::string_view::npos) return "";
  const std::string_view rest = jinja.substr(at + kSet.size());
  return std::string(rest.substr(0, rest.find('"')));
}

}  // namespace

const char* ChatTemplate::name() const {
  switch (format_) {
    case Format::kLlama2:
      return "llama-2";
    case Format::kLlama3:
      return "llama-3";
    case Format::kChatml:
      return "chatml";
    case Format::kMistral:
      return "mistral";
    case Format::kPlain:
      break;
  }
  return "plain";
}

absl::StatusOr<ChatTemplate> ChatTemplate::Create(std::string_view name) {
  for (Format format :
       {Format::kLlama2, Format::kLlama3, Format::kChatml, Format::kMistral, Format::kPlain}) {
    if (ChatTemplate(format).name() == name) return ChatTemplate(format);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("chat template '", std::string(name),
                   "' is unknown; there are llama-2, llama-3, chatml, mistral and plain"));
}

ChatTemplate ChatTemplate::Detect(std::string_view jinja) {
  const auto has = [&](std::string_view marker) { return jinja.find(marker) != std::string_view::npos; };
  if (has("<|start_header_id|>")) {
    ChatTemplate chat(Format::kLlama3);
    chat.dates_ = has("Cutting Knowledge Date: December 2023");
    if (chat.dates_) chat.date_ = DateOf(jinja);
    return chat;
  }
  // Phi-4 closes a role with a token of its own, Mistral of 2024-11 has tokens for the system message.
  if (has("<|im_sep|>") || has("[SYSTEM_PROMPT]")) return ChatTemplate(Format::kPlain);
  if (has("<|im_start|>")) {
    ChatTemplate chat(Format::kChatml);
    chat.default_system_ = DefaultSystem(jinja);
    return chat;
  }
  if (has("[INST]")) {
    ChatTemplate chat(has("<<SYS>>") ? Format::kLlama2 : Format::kMistral);
    chat.system_comes_last_ = has("loop.last and system_message");
    return chat;
  }
  return ChatTemplate(Format::kPlain);
}

// Touvron et al., "Llama 2" (arXiv 2307.09288), as in Meta's reference chat_completion().
void ChatTemplate::RenderLlama2(const std::vector<ChatMessage>& messages, Prompt* prompt) const {
  const size_t first = IsSystem(messages[0]) ? 1 : 0;
  for (size_t i = first; i < messages.size(); ++i) {
    if (messages[i].role == "user") {
      std::string content = messages[i].content;
      if (i == 1 && first == 1)
        content = absl::StrCat("<<SYS>>\n", messages[0].content, "\n<</SYS>>\n\n", content);
      prompt->Bos();
      prompt->Text(absl::StrCat("[INST] ", Trim(content), " [/INST]"));
    } else {
      prompt->Text(absl::StrCat(" ", Trim(messages[i].content), " "));
      prompt->Eos("</s>");
    }
  }
}

// BOS once, then [INST] user [/INST] answer EOS. Vocabularies from v2 on have [INST] as a control token and
// then no spaces around it. The system message stands before the first user message, or from v3 on before
// the one that ends the conversation.
void ChatTemplate::RenderMistral(const std::vector<ChatMessage>& messages, Prompt* prompt) const {
  const size_t first = IsSystem(messages[0]) ? 1 : 0;
  const size_t with_system = system_comes_last_ ? messages.size() - 1 : 1;
  const char* space = prompt->Has("[INST]") ? "" : " ";
  prompt->Bos();
  for (size_t i = first; i < messages.size(); ++i) {
    if (messages[i].role == "user") {
      prompt->Control("[INST]");
      prompt->Text(space);
      if (i == with_system && first == 1) prompt->Text(absl::StrCat(messages[0].content, "\n\n"));
      prompt->Text(absl::StrCat(messages[i].content, space));
      prompt->Control("[/INST]");
    } else {
      prompt->Text(absl::StrCat(space, messages[i].content));
      prompt->Eos("</s>");
    }
  }
}

void ChatTemplate::RenderLlama3(const std::vector<ChatMessage>& messages, bool add_generation_prompt,
                                Prompt* prompt) const {
  const auto header = [&](const char* role) {
    prompt->Control("<|start_header_id|>");
    prompt->Text(role);
    prompt->Control("<|end_header_id|>");
    prompt->Text("\n\n");
  };
  prompt->Bos();
  size_t first = 0;
  if (dates_) {
    const std::string today = absl::FormatTime("%d %b %Y", absl::Now(), absl::UTCTimeZone());
    header("system");
    prompt->Text(absl::StrCat(
        "Cutting Knowledge Date: December 2023\nToday Date: ", date_.empty() ? today : date_, "\n\n"));
    if (IsSystem(messages[0])) prompt->Text(Trim(messages[first++].content));
    prompt->Control("<|eot_id|>");
  }
  for (size_t i = first; i < messages.size(); ++i) {
    header(Role(messages[i]));
    prompt->Text(Trim(messages[i].content));
    prompt->Control("<|eot_id|>");
  }
  if (add_generation_prompt) header("assistant");
}

void ChatTemplate::RenderChatml(const std::vector<ChatMessage>& messages, bool add_generation_prompt,
                                bool bos, Prompt* prompt) const {
  const auto turn = [&](const char* role, const std::string& content) {
    prompt->Control("<|im_start|>");
    prompt->Text(absl::StrCat(role, "\n", content));
    prompt->Control("<|im_end|>");
    prompt->Text("\n");
  };
  if (bos) prompt->Bos();
  if (!default_system_.empty() && !IsSystem(messages[0])) turn("system", default_system_);
  for (const ChatMessage& message : messages) turn(Role(message), message.content);
  if (add_generation_prompt) {
    prompt->Control("<|im_start|>");
    prompt->Text("assistant\n");
  }
}

// For base models: a dialogue as a page of text has it.
void ChatTemplate::RenderPlain(const std::vector<ChatMessage>& messages, bool add_generation_prompt, bool bos,
                               Prompt* prompt) const {
  if (bos) prompt->Bos();
  for (const ChatMessage& message : messages) {
    std::string speaker = message.name;
    if (speaker.empty())
      speaker = IsSystem(message) ? "System" : message.role == "user" ? "User" : "Assistant";
    prompt->Text(absl::StrCat(speaker, ": ", message.content, "\n"));
  }
  if (add_generation_prompt) prompt->Text("Assistant:");
}

absl::StatusOr<std::vector<TokenId>> ChatTemplate::Render(const std::vector<ChatMessage>& messages,
                                                          const Tokenizer& tokenizer,
                                                          bool add_generation_prompt) const {
  if (absl::Status s = CheckRoles(messages); !s.ok()) return s;
  if (format_ == Format::kLlama2 || format_ == Format::kMistral) {
    if (absl::Status s = CheckTurns(messages, name(), add_generation_prompt); !s.ok()) return s;
  }
  Prompt prompt(tokenizer);
  switch (format_) {
    case Format::kLlama2:
      RenderLlama2(messages, &prompt);
      break;
    case Format::kLlama3:
      RenderLlama3(messages, add_generation_prompt, &prompt);
      break;
    case Format::kChatml:
      RenderChatml(messages, add_generation_prompt, tokenizer.adds_bos(), &prompt);
      break;
    case Format::kMistral:
      RenderMistral(messages, &prompt);
      break;
    case Format::kPlain:
      RenderPlain(messages, add_generation_prompt, tokenizer.adds_bos(), &prompt);
      break;
  }
  return prompt.Take();
}

std::vector<std::string> ChatTemplate::StopStrings() const {
  if (format_ == Format::kPlain) return {"\nUser:", "\nSystem:"};
  return {};
}

std::vector<std::string> ChatTemplate::StopTokens() const {
  switch (format_) {
    case Format::kLlama3:
      return {"<|eot_id|>", "<|end_of_text|>"};
    case Format::kChatml:
      return {"<|im_end|>"};
    case Format::kLlama2:
    case Format::kMistral:
      return {"</s>"};
    case Format::kPlain:
      break;
  }
  return {};
}

}  // namespace atp
