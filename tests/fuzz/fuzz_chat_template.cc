// Messages from anyone in every format: tokens or InvalidArgument, and control tokens where the template puts
// them only, whatever a message spells.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "server/chat_template.h"
#include "tests/server/byte_tokenizer.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

// Messages end at 0xff; the first byte of each says whose it is.
std::vector<atp::ChatMessage> MessagesOf(std::string_view data, bool blank) {
  static constexpr const char* kRoles[] = {"user", "assistant", "system", "developer", "tool", ""};
  std::vector<atp::ChatMessage> messages;
  while (!data.empty()) {
    const std::string_view part = data.substr(0, data.find('\xff'));
    data.remove_prefix(std::min(data.size(), part.size() + 1));
    if (part.empty()) continue;
    messages.emplace_back();
    messages.back().role = kRoles[static_cast<unsigned char>(part[0]) % std::size(kRoles)];
    messages.back().content = blank ? "x" : std::string(part.substr(1));
  }
  return messages;
}

int64_t ControlTokens(const std::vector<atp::TokenId>& ids) {
  return std::count_if(ids.begin(), ids.end(), [](atp::TokenId id) { return id >= 256; });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const std::vector<atp::ChatMessage> messages = MessagesOf(bytes, false), blank = MessagesOf(bytes, true);
  for (const char* name : {"llama-2", "llama-3", "chatml", "mistral", "plain"}) {
    const absl::StatusOr<atp::ChatTemplate> chat = atp::ChatTemplate::Create(name);
    Require(chat.ok());
    for (const bool has_bos : {false, true}) {
      const atp::testing::ByteTokenizer tokenizer(has_bos);
      for (const bool answer : {false, true}) {
        const auto ids = chat->Render(messages, tokenizer, answer);
        const auto same = chat->Render(blank, tokenizer, answer);
        Require(ids.ok() == same.ok());
        if (!ids.ok()) {
          Require(absl::IsInvalidArgument(ids.status()) &&
                  ids.status().message().substr(0, 8) == "messages" && ids.status().message().size() < 500);
          continue;
        }
        Require(ControlTokens(*ids) == ControlTokens(*same));
      }
    }
  }
  return 0;
}
