// Shape of a Llama-family model, from a Hugging Face config.json or the metadata of a GGUF file.
#ifndef ATP_ENGINE_LLAMA_CONFIG_H_
#define ATP_ENGINE_LLAMA_CONFIG_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/request.h"

namespace atp {

// Far beyond every model of the family; their products fit into 63 bits.
inline constexpr int64_t kMaxHidden = 1 << 17;
inline constexpr int64_t kMaxIntermediate = 1 << 20;
inline constexpr int64_t kMaxLayers = 1024;
inline constexpr int64_t kMaxHeads = 1024;
inline constexpr int64_t kMaxHeadDim = 1024;
inline constexpr int64_t kMaxVocab = 1 << 24;
inline constexpr int64_t kMaxPositions = 1 << 27;

struct LlamaConfig {
  std::string architecture;  // "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int layers = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_positions = 0;
  int64_t sliding_window =
      0;  // 0 = none. A model whose window is smaller than its positions is served up to its window
  float rms_norm_eps = 1e-5f;
  bool tied_embeddings = false;
  bool qkv_bias = false;     // Qwen2, or attention_bias: q, k, v have a bias
  bool output_bias = false;  // attention_bias of LlamaForCausalLM: o_proj has one, too
  bool mlp_bias = false;
  double rope_theta = 10000.0;
  std::vector<float> inverse_frequency;  // [head_dim / 2], rope_scaling applied (llama3, linear)
  std::vector<int32_t> eos_token_ids;
  int32_t bos_token_id = -1;  // -1: none
  // What a request begins from: temperature, top_k, top_p, min_p and repetition_penalty as
  // generation_config.json has them, the rest as it is. Or what is wrong there, for who needs it.
  absl::StatusOr<SamplingParams> sampling = SamplingParams();
};

// Architectures served, for the error of one that is not and for the documentation.
std::vector<std::string_view> SupportedArchitectures();

// `source` names the file in errors. Every size is checked against sane limits before anything is computed
// from it.
absl::StatusOr<LlamaConfig> ParseLlamaConfig(std::string_view json, const std::string& source);
// `model` is a directory or a GGUF file (model_path.h).
absl::StatusOr<LlamaConfig> LoadLlamaConfig(const std::string& model);

}  // namespace atp

#endif  // ATP_ENGINE_LLAMA_CONFIG_H_
