// Any bytes as the JSON files of a model's directory: each is refused in one line that names it, or what it
// says keeps to its bounds. An input is tokenizer_config.json, generation_config.json and added_tokens.json,
// with a byte 0xff between.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "engine/llama_config.h"
#include "engine/tokenizer_config.h"

namespace {

constexpr const char* kConfig =
    R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
  "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "eos_token_id": 2})";

void Require(bool condition) {
  if (!condition) std::abort();
}

void Write(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

const std::string& Directory() {
  static const std::string directory = [] {
    std::string path = std::filesystem::temp_directory_path() / "fuzz_XXXXXX";
    Require(mkdtemp(path.data()) != nullptr);
    Write(path + "/config.json", kConfig);
    return path;
  }();
  return directory;
}

void CheckError(const absl::Status& status) {
  const std::string message(status.message());
  Require(absl::IsInvalidArgument(status) && message.rfind(Directory(), 0) == 0);
  Require(message.find('\n') == std::string::npos && message.size() < 2000);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  for (const char* name : {"/tokenizer_config.json", "/generation_config.json", "/added_tokens.json"}) {
    const std::string_view bytes = rest.substr(0, rest.find('\xff'));
    rest.remove_prefix(std::min(rest.size(), bytes.size() + 1));
    if (bytes.empty()) {
      std::filesystem::remove(Directory() + name);
    } else {
      Write(Directory() + name, bytes);
    }
  }
  if (const auto config = atp::ReadTokenizerConfig(Directory()); config.ok()) {
    for (const atp::TokenId id : config->eos_token_ids) Require(id >= 0);
    for (const atp::AddedToken& token : config->added_tokens) Require(token.id >= 0);
    for (const atp::AddedToken& token : config->old_added_tokens) Require(token.id >= 0);
    const auto id_of = [](std::string_view token) -> std::optional<atp::TokenId> {
      return token.empty() ? std::nullopt : std::optional<atp::TokenId>(token.size() % 512);
    };
    if (const auto specials = atp::ResolveSpecials(*config, {}, 512, id_of); specials.ok()) {
      for (const atp::TokenId id : specials->special.eos) Require(id >= 0 && id < 512);
    }
  } else {
    CheckError(config.status());
  }
  if (const auto chat = atp::ReadChatTemplate(Directory()); !chat.ok()) CheckError(chat.status());
  const auto config = atp::LoadLlamaConfig(Directory());
  if (!config.ok()) {
    CheckError(config.status());
  } else if (!config->sampling.ok()) {
    CheckError(config->sampling.status());
  } else {
    Require(config->sampling->temperature >= 0 && config->sampling->top_k >= 0);
    Require(config->sampling->top_p > 0 && config->sampling->top_p <= 1);
    Require(config->sampling->repetition_penalty > 0);
  }
  return 0;
}
