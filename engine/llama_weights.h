// The tensors of a Llama-family model, by the names of Hugging Face checkpoints, checked for presence, shape
// and dtype, and handed to the backend.
#ifndef ATP_ENGINE_LLAMA_WEIGHTS_H_
#define ATP_ENGINE_LLAMA_WEIGHTS_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/llama_config.h"
#include "kernels/backend.h"

namespace atp {

class SafetensorsSet;

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
  Weight final_norm;                      // [1, hidden], F32
  TensorView lm_head;                     // [vocab, hidden]; the embedding where tied
  Weight lm_head_memory;                  // unused where tied
  DType dtype = DType::kF32;              // of the large matrices
  size_t bytes = 0;                       // of all tensors used
  std::shared_ptr<SafetensorsSet> files;  // the mapping that views point into
};

// done and total in bytes. Called often; throttling is the callee's business.
using LoadProgress = std::function<void(size_t done, size_t total)>;

absl::StatusOr<LlamaWeights> LoadLlamaWeights(const std::string& model_dir, const LlamaConfig& config,
                                              Backend* backend, const LoadProgress& progress);

}  // namespace atp

#endif  // ATP_ENGINE_LLAMA_WEIGHTS_H_
