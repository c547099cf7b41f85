// Any bytes as a GGUF file: refused in one line, or tensors inside the file that do not overlap; and then as
// a configuration and a tokenizer, each refused in one line or keeping its promises.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/gguf.h"
#include "engine/gguf_config.h"
#include "engine/gguf_tokenizer.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

void RequireOneLine(const absl::Status& status) {
  const std::string message(status.message());
  Require(message.find('\n') == std::string::npos && message.rfind("f: ", 0) == 0);
}

void CheckConfig(const atp::GgufFile& file) {
  const absl::StatusOr<atp::LlamaConfig> config = atp::GgufLlamaConfig(file);
  if (!config.ok()) return RequireOneLine(config.status());
  Require(config->hidden_size > 0 && config->intermediate_size > 0 && config->layers > 0);
  Require(config->heads > 0 && config->kv_heads > 0 && config->heads % config->kv_heads == 0);
  Require(config->head_dim > 0 && config->head_dim % 2 == 0 && config->max_positions > 0);
  Require(config->inverse_frequency.size() == static_cast<size_t>(config->head_dim) / 2);
  for (const float frequency : config->inverse_frequency) Require(std::isfinite(frequency) && frequency >= 0);
  for (const int32_t id : config->eos_token_ids) Require(id >= 0 && id < config->vocab_size);
}

void CheckTokenizer(const atp::GgufFile& file) {
  const auto tokenizer = atp::LoadGgufTokenizer(file);
  if (!tokenizer.ok()) return RequireOneLine(tokenizer.status());
  for (const atp::TokenId id : (*tokenizer)->Encode("A small text,\n 12 of it.", true, true)) {
    Require(id >= 0 && id < (*tokenizer)->vocab_size());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span<const uint8_t>(data, size));
  const auto file = atp::GgufFile::Parse(bytes, "f");
  if (!file.ok()) {
    RequireOneLine(file.status());
    return 0;
  }
  std::vector<std::pair<const std::byte*, const std::byte*>> ranges;
  for (const auto& [name, tensor] : (*file)->tensors()) {
    ranges.emplace_back(tensor.data.data(), tensor.data.data() + tensor.data.size());
    Require(ranges.back().first >= bytes.data() && ranges.back().second <= bytes.data() + bytes.size());
    Require(!tensor.shape.empty() && tensor.shape.size() <= atp::kMaxGgufRank);
    size_t expected = atp::RowBytes(tensor.dtype, tensor.shape.back());
    for (size_t i = 0; i + 1 < tensor.shape.size(); ++i) expected *= static_cast<size_t>(tensor.shape[i]);
    Require(expected == tensor.data.size());
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) Require(ranges[i - 1].second <= ranges[i].first);
  CheckConfig(**file);
  CheckTokenizer(**file);
  return 0;
}
