// Turns chat messages into a prompt's tokens, in the built-in formats of the supported model families.
#ifndef ATP_SERVER_CHAT_TEMPLATE_H_
#define ATP_SERVER_CHAT_TEMPLATE_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tokenizer.h"

namespace atp {

struct ChatMessage {
  std::string role;  // "system" (or "developer", the same), "user", "assistant"
  std::string content;
  std::string name;  // of the participant; plain prints it instead of the role, the other formats have no
                     // place for it
};

class ChatTemplate {
 public:
  // "llama-2", "llama-3", "chatml", "mistral" or "plain"; InvalidArgument, listing them, for any other name.
  static absl::StatusOr<ChatTemplate> Create(std::string_view name);

  // The format that a Jinja template (ReadChatTemplate() in engine/tokenizer_config.h) belongs to, by the
  // control tokens it writes; plain when it is none of them or empty.
  static ChatTemplate Detect(std::string_view jinja);

  const char* name() const;

  // The prompt, BOS included where the format has one. Text of messages never becomes a control token,
  // whatever it spells. `add_generation_prompt` opens the assistant's answer. InvalidArgument naming
  // messages[i] for an unknown role or an order that the format cannot express; the order rules of llama-2
  // and mistral: system first, then user and assistant in turn, the user's message last when an answer is
  // asked for.
  absl::StatusOr<std::vector<TokenId>> Render(const std::vector<ChatMessage>& messages,
                                              const Tokenizer& tokenizer, bool add_generation_prompt) const;

  // Strings that end an answer and are not part of it (plain: the next speaker's line). The control tokens
  // that end an answer, by name: where Tokenizer::IdOf() knows them, they belong to the stop token ids; where
  // not, their text belongs to the stop strings.
  std::vector<std::string> StopStrings() const;
  std::vector<std::string> StopTokens() const;

 private:
  enum class Format { kLlama2, kLlama3, kChatml, kMistral, kPlain };
  explicit ChatTemplate(Format format) : format_(format) {}

  Format format_;
};

}  // namespace atp

#endif  // ATP_SERVER_CHAT_TEMPLATE_H_
