#include "engine/gguf_config.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/safetensors_header.h"
#include "engine/sampler.h"

namespace atp {
namespace {

// Reads typed values below one prefix ("llama."). The first problem sticks and later reads return their
// lowest legal value, so a list of reads needs one check at its end.
class Metadata {
 public:
  Metadata(const GgufFile& file, std::string prefix) : file_(file), prefix_(std::move(prefix)) {}

  int64_t Int(const std::string& key, int64_t min, int64_t max, std::optional<int64_t> fallback = {}) {
    const std::string name = prefix_ + key;
    if (!file_.Has(name) && fallback) return *fallback;
    const absl::StatusOr<int64_t> value = file_.Int(name);
    if (!value.ok()) return Keep(value.status()), min;
    if (*value >= min && *value <= max) return *value;
    Fail(name, absl::StrCat("expected an integer from ", min, " to ", max, ", found ", *value));
    return min;
  }

  // min itself is excluded.
  double Number(const std::string& key, double min, double max, std::optional<double> fallback = {}) {
    const std::string name = prefix_ + key;
    if (!file_.Has(name) && fallback) return *fallback;
    const absl::StatusOr<double> value = file_.Number(name);
    if (!value.ok()) return Keep(value.status()), max;
    if (*value > min && *value <= max) return *value;
    Fail(name, absl::StrCat("expected a number above ", min, " and at most ", max, ", found ", *value));
    return max;
  }

  std::string String(const std::string& key, const std::string& fallback) {
    const std::string name = prefix_ + key;
    if (!file_.Has(name)) return fallback;
    const absl::StatusOr<std::string_view> value = file_.String(name);
    if (!value.ok()) return Keep(value.status()), fallback;
    return std::string(*value);
  }

  void Fail(const std::string& name, absl::string_view message) {
    Keep(absl::InvalidArgumentError(
        absl::StrCat(file_.source(), ": key ", QuoteForError(name), ": ", message)));
  }
  void Keep(const absl::Status& status) {
    // A key that must be there is the file's fault, not a file that is not there.
    if (status_.ok()) status_ = absl::InvalidArgumentError(status.message());
  }
  const absl::Status& status() const { return status_; }

 private:
  const GgufFile& file_;
  std::string prefix_;
  absl::Status status_;
};

std::string TensorError(const GgufFile& file, std::string_view tensor, absl::string_view message) {
  return absl::StrCat(file.source(), ": tensor ", QuoteForError(tensor), ": ", message);
}

void ReadHeads(Metadata& metadata, LlamaConfig& config) {
  config.heads = static_cast<int>(metadata.Int("attention.head_count", 1, kMaxHeads));
  config.kv_heads = static_cast<int>(metadata.Int("attention.head_count_kv", 1, kMaxHeads, config.heads));
  if (config.heads % config.kv_heads != 0) {
    metadata.Fail("attention.head_count_kv", absl::StrCat("expected a divisor of attention.head_count, ",
                                                          config.heads, ", found ", config.kv_heads));
  }
  const int64_t derived = config.hidden_size / config.heads;
  config.head_dim = static_cast<int>(metadata.Int("attention.key_length", 2, kMaxHeadDim, derived));
  if (config.head_dim < 2 || config.head_dim > kMaxHeadDim || config.head_dim % 2 != 0) {
    metadata.Fail("attention.key_length", absl::StrCat("expected an even number from 2 to ", kMaxHeadDim,
                                                       ", found ", config.head_dim));
  }
  for (const char* same : {"attention.value_length", "rope.dimension_count"}) {
    const int64_t size = metadata.Int(same, 1, kMaxHeadDim, config.head_dim);
    if (size != config.head_dim) {
      metadata.Fail(same, absl::StrCat("expected the head's size, ", config.head_dim, ", found ", size));
    }
  }
}

// theta^(-2i/head_dim), all divided by rope.scaling.factor (linear), each by its own factor where the file
// has the tensor rope_freqs.weight (Llama 3.1).
std::vector<float> InverseFrequencies(const GgufFile& file, Metadata& metadata, LlamaConfig* config) {
  const double theta = metadata.Number("rope.freq_base", 0, 1e15, 10000.0);
  const int head_dim = config->head_dim;
  config->rope_theta = theta;
  const std::string type = metadata.String("rope.scaling.type", "none");
  double factor = 1.0;
  if (type == "linear") {
    factor = metadata.Number("rope.scaling.factor", 0, 1e6);
  } else if (type == "none") {
    factor = metadata.Number("rope.scale_linear", 0, 1e6, 1.0);  // files before rope.scaling
  } else {
    metadata.Fail("rope.scaling.type", absl::StrCat("expected none or linear, found ", QuoteForError(type)));
  }
  const size_t pairs = static_cast<size_t>(head_dim) / 2;
  std::vector<float> divisors(pairs, 1.0f);
  constexpr std::string_view kName = "rope_freqs.weight";
  if (const GgufTensor* tensor = file.FindTensor(kName)) {
    if (tensor->dtype != DType::kF32 || tensor->shape != std::vector<int64_t>{static_cast<int64_t>(pairs)}) {
      metadata.Keep(absl::InvalidArgumentError(TensorError(
          file, kName, absl::StrCat("expected ", pairs, " values of F32, found another shape or type"))));
      return {};
    }
    std::memcpy(divisors.data(), tensor->data.data(), pairs * sizeof(float));
    for (const float divisor : divisors) {
      if (divisor >= 1e-6f && divisor <= 1e6f) continue;
      metadata.Keep(absl::InvalidArgumentError(
          TensorError(file, kName, absl::StrCat("expected factors from 1e-6 to 1e6, found ", divisor))));
      return {};
    }
  }
  std::vector<float> frequencies;
  for (size_t i = 0; i < pairs; ++i) {
    const double base = std::pow(theta, -2.0 * static_cast<double>(i) / head_dim);
    frequencies.push_back(static_cast<float>(base * (1.0 / factor) / divisors[i]));
  }
  return frequencies;
}

// What llama.cpp would compute otherwise and we do not: refused, and not left out in silence.
void RefuseOthers(const GgufFile& file, Metadata& metadata) {
  if (metadata.Int("expert_count", 0, 1 << 20, 0) > 0) {
    metadata.Fail("expert_count", "expected none, found a mixture of experts, which is not supported");
  }
  for (const double scale :
       {metadata.Number("attention.scale", 0, 1e6, 0.0), metadata.Number("logit_scale", 0, 1e6, 0.0),
        metadata.Number("residual_scale", 0, 1e6, 0.0), metadata.Number("embedding_scale", 0, 1e6, 0.0)}) {
    if (scale != 0.0) metadata.Fail("*_scale", absl::StrCat("expected none, found ", scale));
  }
  if (file.Has("split.count") && file.Int("split.count").value_or(2) > 1) {
    metadata.Keep(absl::InvalidArgumentError(absl::StrCat(
        file.source(), ": key \"split.count\": expected a model in one file, found ",
        file.Int("split.count").value_or(0), " parts; merge them with llama-gguf-split --merge")));
  }
}

void ReadVocabulary(const GgufFile& file, Metadata& metadata, LlamaConfig& config) {
  constexpr std::string_view kName = "token_embd.weight";
  const GgufTensor* embedding = file.FindTensor(kName);
  if (embedding == nullptr || embedding->shape.size() != 2 || embedding->shape[0] > kMaxVocab) {
    metadata.Keep(absl::InvalidArgumentError(
        TensorError(file, kName,
                    absl::StrCat("expected a matrix of at most ", kMaxVocab, " rows, found ",
                                 embedding == nullptr ? "no such tensor" : "another shape"))));
    return;
  }
  config.vocab_size = embedding->shape[0];
  Metadata tokenizer(file, "tokenizer.ggml.");
  config.bos_token_id = static_cast<int32_t>(tokenizer.Int("bos_token_id", 0, config.vocab_size - 1, -1));
  for (const char* key : {"eos_token_id", "eot_token_id", "eom_token_id"}) {
    const auto id = static_cast<int32_t>(tokenizer.Int(key, 0, config.vocab_size - 1, -1));
    auto& ids = config.eos_token_ids;
    if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  if (!tokenizer.status().ok()) metadata.Keep(tokenizer.status());
}

// llama.cpp's names for what generation_config.json has.
absl::StatusOr<SamplingParams> ReadSampling(const GgufFile& file, int64_t vocab_size) {
  constexpr double kMax = std::numeric_limits<float>::max();
  Metadata keys(file, kGgufSampling);
  SamplingParams sampling;
  sampling.temperature = static_cast<float>(keys.Number("temp", -kMax, kMax, sampling.temperature));
  sampling.top_p = static_cast<float>(keys.Number("top_p", -kMax, kMax, sampling.top_p));
  sampling.min_p = static_cast<float>(keys.Number("min_p", -kMax, kMax, sampling.min_p));
  sampling.repetition_penalty =
      static_cast<float>(keys.Number("penalty_repeat", -kMax, kMax, sampling.repetition_penalty));
  const int64_t top_k = keys.Int("top_k", -1, std::numeric_limits<int>::max(), sampling.top_k);
  sampling.top_k = static_cast<int>(std::max<int64_t>(0, top_k));
  const absl::Status valid = ValidateSampling(sampling, static_cast<int>(vocab_size));
  if (!valid.ok()) keys.Keep(absl::InvalidArgumentError(absl::StrCat(file.source(), ": ", valid.message())));
  if (!keys.status().ok()) return keys.status();
  return sampling;
}

}  // namespace

absl::StatusOr<LlamaConfig> GgufLlamaConfig(const GgufFile& file) {
  const absl::StatusOr<std::string_view> name = file.String("general.architecture");
  if (!name.ok()) return absl::InvalidArgumentError(name.status().message());
  LlamaConfig config;
  if (*name == "llama") config.architecture = "LlamaForCausalLM";
  if (*name == "qwen2") config.architecture = "Qwen2ForCausalLM";
  if (config.architecture.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.source(), ": key \"general.architecture\": expected llama or qwen2, found ",
                     QuoteForError(*name)));
  }
  Metadata metadata(file, absl::StrCat(std::string(*name), "."));
  config.hidden_size = metadata.Int("embedding_length", 1, kMaxHidden);
  config.intermediate_size = metadata.Int("feed_forward_length", 1, kMaxIntermediate);
  config.layers = static_cast<int>(metadata.Int("block_count", 1, kMaxLayers));
  config.max_positions = metadata.Int("context_length", 1, kMaxPositions);
  config.rms_norm_eps = static_cast<float>(metadata.Number("attention.layer_norm_rms_epsilon", 0, 1));
  config.sliding_window = metadata.Int("attention.sliding_window", 0, kMaxPositions, 0);
  if (config.sliding_window > 0) config.max_positions = std::min(config.max_positions, config.sliding_window);
  ReadHeads(metadata, config);
  RefuseOthers(file, metadata);
  ReadVocabulary(file, metadata, config);
  config.sampling = ReadSampling(file, config.vocab_size);
  config.tied_embeddings = file.FindTensor("output.weight") == nullptr;
  config.qkv_bias = file.FindTensor("blk.0.attn_q.bias") != nullptr;
  config.output_bias = file.FindTensor("blk.0.attn_output.bias") != nullptr;
  config.mlp_bias = file.FindTensor("blk.0.ffn_gate.bias") != nullptr;
  if (!metadata.status().ok()) return metadata.status();
  config.inverse_frequency = InverseFrequencies(file, metadata, &config);
  if (!metadata.status().ok()) return metadata.status();
  return config;
}

std::string GgufTensorName(std::string_view hugging_face_name) {
  constexpr std::pair<std::string_view, std::string_view> whole[] = {
      {"model.embed_tokens.weight", "token_embd.weight"},
      {"model.norm.weight", "output_norm.weight"},
      {"lm_head.weight", "output.weight"}};
  constexpr std::pair<std::string_view, std::string_view> parts[] = {
      {"input_layernorm", "attn_norm"},    {"self_attn.q_proj", "attn_q"},
      {"self_attn.k_proj", "attn_k"},      {"self_attn.v_proj", "attn_v"},
      {"self_attn.o_proj", "attn_output"}, {"post_attention_layernorm", "ffn_norm"},
      {"mlp.gate_proj", "ffn_gate"},       {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"}};
  for (const auto& [theirs, ours] : whole) {
    if (theirs == hugging_face_name) return std::string(ours);
  }
  constexpr std::string_view kLayers = "model.layers.";
  if (hugging_face_name.substr(0, kLayers.size()) != kLayers) return "";
  const std::string_view rest = hugging_face_name.substr(kLayers.size());
  const size_t dot = rest.find('.'), last = rest.rfind('.');
  if (dot == std::string_view::npos || last <= dot) return "";
  for (const auto& [theirs, ours] : parts) {
    if (theirs == rest.substr(dot + 1, last - dot - 1)) {
      return std::string("blk.").append(rest.substr(0, dot + 1)).append(ours).append(rest.substr(last));
    }
  }
  return "";
}

}  // namespace atp
