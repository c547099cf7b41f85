// Shape of a model from a GGUF file's metadata, and the names and order of its tensors.
#ifndef ATP_ENGINE_GGUF_CONFIG_H_
#define ATP_ENGINE_GGUF_CONFIG_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/gguf.h"
#include "engine/llama_config.h"

namespace atp {

inline constexpr char kGgufSampling[] = "general.sampling.";  // prefix of keys for LlamaConfig::sampling

// Architectures llama (Mistral is one) and qwen2. Biases and tied embeddings are what the tensors say.
// InvalidArgument is one line: file, key, expected, found.
absl::StatusOr<LlamaConfig> GgufLlamaConfig(const GgufFile& file);

// "blk.3.attn_q.weight" for "model.layers.3.self_attn.q_proj.weight"; "" for a name that has none.
std::string GgufTensorName(std::string_view hugging_face_name);

// Converters to GGUF interleave the rows of the query and key heads of llama models, so that a rotary pair is
// (2i, 2i + 1); here as in Hugging Face's layout it is (i, i + head_dim / 2). The file's row that is row
// `row` of ours.
inline int64_t InterleavedRow(int64_t row, int head_dim) {
  const int64_t in_head = row % head_dim, half = head_dim / 2;
  return row - in_head + in_head % half * 2 + in_head / half;
}
// Whether the rows of this architecture's queries and keys are interleaved.
inline bool HasInterleavedRows(const LlamaConfig& config) {
  return config.architecture != "Qwen2ForCausalLM";
}

}  // namespace atp

#endif  // ATP_ENGINE_GGUF_CONFIG_H_
