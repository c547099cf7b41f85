// From the settings of section atp to what is compressed and how far.
#ifndef ATP_CLI_COMPRESSION_CHOICE_H_
#define ATP_CLI_COMPRESSION_CHOICE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "config/config.h"
#include "engine/compression_budgets.h"
#include "engine/compression_plan.h"
#include "engine/compression_plans.h"
#include "engine/llama_config.h"
#include "kernels/kv_page.h"

namespace atp {

struct CompressionChoice {
  std::string preset;  // "exact", "balanced" …; "ratio" when it was set by hand
  double ratio = 1;    // mean over kv heads
  int bits = 16;       // per element; 16: as exact entries; of the preset where settings.head_bits differ
  std::string budgets_file;  // empty: uniform, or exact
  CompressionSettings settings;
  std::string linear_layers;  // which linear layers take low-rank inputs, and which not; empty: not asked for
  // The most blocks that a sequence of the model's full length holds at once; 0: nothing is compressed. Set
  // with the engine.
  int64_t peak_blocks = 0;

  bool exact() const { return ratio == 1 && bits == 16 && settings.max_principal_keys == 0; }
};

// What a preset ("quality" …) keeps: entries per token, and bits per element (16: as exact ones). Together
// about 1/4, 1/8 or 1/16 of the bytes of an exact bf16 cache; of all pairs with those bytes the best one that
// was measured.
struct PresetBudget {
  double ratio = 1;
  int bits = 16;
  double share = 1;  // of bf16 bytes, which a budgets file with curves spends head by head instead
};
PresetBudget BudgetOf(const std::string& preset);

// Reads the budgets file where there is one. `format`: of exact entries. `block_bytes`: of the blocks that
// are there, 0 where they will be made for this choice. Errors name the setting or the file.
absl::StatusOr<CompressionChoice> ChooseCompression(const AtpConfig& config, const std::string& model_dir,
                                                    const LlamaConfig& model, int block_tokens,
                                                    KvFormat format, size_t block_bytes);

// What requests that bring an override get on a server whose own choice is `own`: its segments, window,
// sinks, cap and budgets. A ratio without bits has the server's, 8 where it is exact; a ratio of 1 is then
// exact. Null where atp.allow_override is off.
CompressionPlans::SettingsOf OverrideSettings(const Config& config, const LlamaConfig& model, KvFormat format,
                                              const CompressionChoice& own);

// Where `atp calibrate` writes and the server looks: atp_budgets.json in `model_dir`,
// MODEL.gguf.atp_budgets.json beside a GGUF file.
std::string BudgetsFileOf(const std::string& model_dir);

// What plans for this model are made for. `max_positions`: the most tokens a sequence can have.
CompressionShape CompressionShapeOf(const LlamaConfig& model, int block_tokens, KvFormat format,
                                    int max_positions);

}  // namespace atp

#endif  // ATP_CLI_COMPRESSION_CHOICE_H_
