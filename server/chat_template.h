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
  // control tokens it writes; plain when it is none of them or empty. Also what it says by itself: the system
  // message of conversations without one (Qwen, SmolLM2), the dates of Llama 3.1 and later, and where Mistral
  // has the system message.
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
  class Prompt;
  enum class Format { kLlama2, kLlama3, kChatml, kMistral, kPlain };
  explicit ChatTemplate(Format format) : format_(format) {}

  void RenderLlama2(const std::vector<ChatMessage>& messages, Prompt* prompt) const;
  void RenderLlama3(const std::vector<ChatMessage>& messages, bool add_generation_prompt,
                    Prompt* prompt) const;
  void RenderChatml(const std::vector<ChatMessage>& messages, bool add_generation_prompt, bool bos,
                    Prompt* prompt) const;
  void RenderMistral(const std::vector<ChatMessage>& messages, Prompt* prompt) const;
  void RenderPlain(const std::vector<ChatMessage>& messages, bool add_generation_prompt, bool bos,
                   Prompt* prompt) const;

  Format format_;
  std::string default_system_;      // chatml
  bool dates_ = false;              // llama-3: the system message begins with the date of knowledge and
  std::string date_;                // of this day; empty: the day of the request
  bool system_comes_last_ = false;  // mistral: before the last user message, not the first
};

}  // namespace atp

#endif  // ATP_SERVER_CHAT_TEMPLATE_H_
