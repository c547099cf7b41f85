// Whether low-rank inputs of linear layers (atp.linear_rank) are worth their singular value decomposition: a
// model of costs, so that the same server always decides alike.
#ifndef ATP_ENGINE_LOW_RANK_H_
#define ATP_ENGINE_LOW_RANK_H_

#include <cstdint>
#include <string>

#include "engine/compression_plan.h"
#include "engine/llama_config.h"

namespace atp {

inline constexpr uint8_t kAllLinearLayers = kQueryKeyValue | kGateUp | kDown;

struct LinearLayersChoice {
  uint8_t layers = 0;   // LinearLayers that are faster
  std::string reasons;  // "taken for gate/up (0.71 of the time); not for q/k/v (1.08 of the time)"
};

// For whole segments with inputs of rank linear_rank · segment_tokens. `matmul_speed`: as
// Backend::LowRankMatMulSpeed() for the model's weights; 0: taken nowhere.
LinearLayersChoice ChooseLinearLayers(const LlamaConfig& model, double matmul_speed, double linear_rank,
                                      int segment_tokens);

}  // namespace atp

#endif  // ATP_ENGINE_LOW_RANK_H_
