// Any bytes as config.json: refused in one line, or a shape that keeps every promise of LlamaConfig.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "engine/llama_config.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const absl::StatusOr<atp::LlamaConfig> config = atp::ParseLlamaConfig(text, "f");
  if (!config.ok()) {
    const std::string message(config.status().message());
    Require(message.find('\n') == std::string::npos && message.rfind("f: ", 0) == 0 && message.size() < 2000);
    return 0;
  }
  Require(config->hidden_size > 0 && config->intermediate_size > 0 && config->layers > 0 &&
          config->vocab_size > 0);
  Require(config->heads > 0 && config->kv_heads > 0 && config->heads % config->kv_heads == 0);
  Require(config->head_dim > 0 && config->head_dim % 2 == 0 && config->max_positions > 0);
  Require(config->inverse_frequency.size() == static_cast<size_t>(config->head_dim) / 2);
  for (const float frequency : config->inverse_frequency) Require(std::isfinite(frequency) && frequency >= 0);
  Require(config->rms_norm_eps >= 0);
  for (const int32_t id : config->eos_token_ids) Require(id >= 0 && id < config->vocab_size);
  Require(config->bos_token_id >= -1 && config->bos_token_id < config->vocab_size);
  return 0;
}
