// The tensors of a Llama-family model, by the names of Hugging Face checkpoints whatever the file, checked
// for presence, shape and dtype, and handed to the backend.
#ifndef ATP_ENGINE_LLAMA_WEIGHTS_H_
#define ATP_ENGINE_LLAMA_WEIGHTS_H_

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/llama_config.h"
#include "engine/weight_source.h"
#include "kernels/backend.h"

namespace atp {

struct LlamaLayerWeights {
  Weight attention_norm;     // [1, hidden], F32
  Weight query, key, value;  // [heads * head_dim, hidden], [kv_heads * head_dim, hidden] twice
  Weight query_bias, key_bias, value_bias,
      output_bias;  // [1, …], F32; view.data null where the model has none
  Weight output;    // [hidden, heads * head_dim]
  Weight mlp_norm;  // [1, hidden], F32
  Weight gate, up;  // [intermediate, hidden]
  Weight down;      // [hidden, intermediate]
  Weight gate_bias, up_bias, down_bias;
};

struct LlamaWeights {
  LlamaWeights();
  LlamaWeights(LlamaWeights&&) noexcept;
  LlamaWeights& operator=(LlamaWeights&&) noexcept;
  ~LlamaWeights();

  Weight embedding;  // [vocab, hidden]
  std::vector<LlamaLayerWeights> layers;
  Weight final_norm;                           // [1, hidden], F32
  TensorView lm_head;                          // [vocab, hidden]; the embedding where tied
  Weight lm_head_memory;                       // unused where tied
  DType dtype = DType::kF32;                   // of most of the large matrices
  size_t bytes = 0;                            // of all tensors, as they are kept
  std::shared_ptr<const WeightSource> source;  // the mapping that views point into
};

// "f32", "bf16", "q8" or "q4", as settings name them; none for any other name ("auto": as stored).
std::optional<DType> WeightDTypeFromName(std::string_view name);

// done and total in bytes. Called often; throttling is the callee's business.
using LoadProgress = std::function<void(size_t done, size_t total)>;

// A tensor of the model, found and checked.
struct LlamaTensor {
  StoredTensor stored;
  int rotary_head_dim = 0;  // rows are those of queries or keys, in heads of this size; 0: of neither
};
// All of them, in the order of loading. Errors as below.
absl::StatusOr<std::vector<LlamaTensor>> FindLlamaTensors(const WeightSource& source,
                                                          const LlamaConfig& config);

// `model` is a directory or a GGUF file (model_path.h). `wanted`: what matrices are converted to; none: each
// stays as it is stored, and the CPU computes straight from the mapped file. A matrix whose rows are no whole
// blocks of `wanted` stays as it is stored, too. InvalidArgument is one line: file, tensor, expected, found.
absl::StatusOr<LlamaWeights> LoadLlamaWeights(const std::string& model, const LlamaConfig& config,
                                              std::optional<DType> wanted, Backend* backend,
                                              const LoadProgress& progress);

}  // namespace atp

#endif  // ATP_ENGINE_LLAMA_WEIGHTS_H_
