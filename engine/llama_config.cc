#include "engine/llama_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/gguf.h"
#include "engine/gguf_config.h"
#include "engine/json_depth.h"
#include "engine/model_path.h"
#include "engine/sampler.h"

namespace atp {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxFileBytes = 1 << 20;
constexpr int kMaxDepth = 32;
constexpr size_t kMaxEosIds = 64;

constexpr std::string_view kLlama = "LlamaForCausalLM";
constexpr std::string_view kMistral = "MistralForCausalLM";
constexpr std::string_view kQwen2 = "Qwen2ForCausalLM";

std::string Quoted(std::string_view text) {
  const std::string_view cut = text.substr(0, 60);
  return absl::StrCat("\"", absl::CHexEscape({cut.data(), cut.size()}), text.size() > 60 ? "…" : "", "\"");
}

std::string Found(const Json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array";
  if (value.is_string()) return Quoted(value.get_ref<const std::string&>());
  return value.dump();  // a number, true, false or null
}

// Reads typed values out of one JSON object. The first problem sticks and later reads return their lowest
// legal value, so a list of reads needs one check at its end.
class Fields {
 public:
  Fields(const Json& object, std::string where, absl::Status* status)
      : object_(object), where_(std::move(where)), status_(status) {}

  // Null counts as absent, as in Hugging Face configs.
  const Json* Find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  int64_t Int(const char* key, int64_t min, int64_t max, std::optional<int64_t> fallback = std::nullopt) {
    const Json* value = Find(key);
    const std::string expected = absl::StrCat("an integer from ", min, " to ", max);
    if (value == nullptr) return fallback.has_value() ? *fallback : Missing(key, expected, min);
    if (!value->is_number_integer()) return Wrong(key, expected, Found(*value), min);
    const bool fits = !value->is_number_unsigned() || value->get<uint64_t>() <= static_cast<uint64_t>(max);
    if (!fits || value->get<int64_t>() < min || value->get<int64_t>() > max) {
      return Wrong(key, expected, Found(*value), min);
    }
    return value->get<int64_t>();
  }

  // min itself is excluded.
  double Number(const char* key, double min, double max, std::optional<double> fallback = std::nullopt) {
    const Json* value = Find(key);
    const std::string expected = absl::StrCat("a number above ", min, " and at most ", max);
    if (value == nullptr) return fallback.has_value() ? *fallback : Missing(key, expected, max);
    if (!value->is_number() || !(value->get<double>() > min && value->get<double>() <= max)) {
      return Wrong(key, expected, Found(*value), max);
    }
    return value->get<double>();
  }

  bool Bool(const char* key, bool fallback) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback;
    return value->is_boolean() ? value->get<bool>() : Wrong(key, "true or false", Found(*value), fallback);
  }

  std::string String(const char* key, const std::string& fallback) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback;
    return value->is_string() ? value->get<std::string>() : Wrong(key, "a string", Found(*value), fallback);
  }

  template <typename T>
  T Wrong(absl::string_view key, absl::string_view expected, absl::string_view found, T fallback) {
    Fail(absl::StrCat(key, ": expected ", expected, ", found ", found));
    return fallback;
  }

  void Fail(absl::string_view message) {
    if (status_->ok()) *status_ = absl::InvalidArgumentError(absl::StrCat(where_, ": ", message));
  }

 private:
  template <typename T>
  T Missing(const char* key, absl::string_view expected, T fallback) {
    return Wrong(key, expected, "no such key", fallback);
  }

  const Json& object_;
  std::string where_;
  absl::Status* status_;
};

absl::StatusOr<Json> ParseObject(std::string_view json, const std::string& source) {
  if (json.size() > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": expected at most ", kMaxFileBytes, " bytes, found ", json.size()));
  }
  if (JsonDeeperThan(json, kMaxDepth)) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": expected JSON nested at most ", kMaxDepth, " deep, found it deeper"));
  }
  try {
    Json document = Json::parse(json.begin(), json.end());
    if (document.is_object()) return document;
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": expected a JSON object, found ", Found(document)));
  } catch (const Json::parse_error& error) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": expected valid JSON, found a syntax error at byte ", error.byte));
  } catch (const Json::exception&) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": expected valid JSON, found a number that no double can hold"));
  }
}

std::string FindArchitecture(const Json& document, Fields& fields) {
  const Json* list = fields.Find("architectures");
  std::string architecture;
  if (list != nullptr && list->is_array() && !list->empty() && (*list)[0].is_string()) {
    architecture = (*list)[0].get<std::string>();
  } else if (list != nullptr) {
    return fields.Wrong("architectures", "an array of names", Found(*list), std::string());
  } else {  // older exports name the family only
    const std::string family = fields.String("model_type", "");
    if (family == "llama") architecture = kLlama;
    if (family == "mistral") architecture = kMistral;
    if (family == "qwen2") architecture = kQwen2;
    if (architecture.empty())
      architecture = family.empty() ? "(none: the file has no key architectures)" : family;
  }
  const std::vector<std::string_view> views = SupportedArchitectures();
  const std::vector<std::string> supported(views.begin(), views.end());
  if (std::find(supported.begin(), supported.end(), architecture) == supported.end()) {
    fields.Fail(absl::StrCat("architecture ", Quoted(architecture), " is not supported; supported are ",
                             absl::StrJoin(supported, ", ")));
  }
  if (document.contains("quantization_config") && !document["quantization_config"].is_null()) {
    fields.Fail(
        "quantization_config: expected none, found one; only F32, BF16 and F16 weights are supported");
  }
  return architecture;
}

// Frequencies of the rotary embedding, inverse_frequency[i] = theta^(-2i/head_dim) (RoFormer, arXiv
// 2104.09864), slowed down for a longer context as rope_scaling says:
//   linear   all by `factor` (arXiv 2306.15595)
//   llama3   by `factor` where the wavelength exceeds the original context / low_freq_factor, not at all
//   where it is
//            below context / high_freq_factor, blended between (Llama 3.1's reference implementation)
std::vector<float> InverseFrequencies(Fields& fields, const Json* scaling, const std::string& source,
                                      LlamaConfig* config, absl::Status* status) {
  constexpr double kMaxTheta = 1e15;
  constexpr double kMaxFactor = 1e6;
  const Json nothing = Json::object();
  if (scaling != nullptr && !scaling->is_object()) {
    fields.Wrong("rope_scaling", "an object or null", Found(*scaling), 0);
    scaling = nullptr;
  }
  Fields scale(scaling == nullptr ? nothing : *scaling, absl::StrCat(source, ": rope_scaling"), status);
  const double theta =
      scale.Number("rope_theta", 0, kMaxTheta, fields.Number("rope_theta", 0, kMaxTheta, 10000.0));
  config->rope_theta = theta;
  const int head_dim = config->head_dim;
  const std::string type = scale.String("rope_type", scale.String("type", "default"));
  std::vector<float> frequencies;
  if (type != "default" && type != "linear" && type != "llama3") {
    scale.Fail(
        absl::StrCat("rope_type ", Quoted(type), " is not supported; supported are default, linear, llama3"));
  }
  const double factor = type == "default" ? 1.0 : scale.Number("factor", 0, kMaxFactor);
  double low = 1.0;
  double high = 4.0;
  double context = 1.0;
  if (type == "llama3") {
    low = scale.Number("low_freq_factor", 0, kMaxFactor);
    high = scale.Number("high_freq_factor", 0, kMaxFactor);
    context = static_cast<double>(scale.Int("original_max_position_embeddings", 1, kMaxPositions));
    if (high <= low) {
      scale.Wrong("high_freq_factor", absl::StrCat("more than low_freq_factor, ", low), absl::StrCat(high),
                  0);
    }
  }
  if (!status->ok()) return frequencies;
  for (int i = 0; i < head_dim / 2; ++i) {
    const double base = std::pow(theta, -2.0 * i / head_dim);
    double kept = type == "default" ? 1.0 : 0.0;  // share of the frequency that is not slowed down
    if (type == "llama3") {
      const double turns = context * base / (2.0 * std::numbers::pi);  // over the original context
      kept = std::clamp((turns - low) / (high - low), 0.0, 1.0);
    }
    // In fp32 as GGUF files hold it, so that both forms of a model have the same frequencies.
    const float divisor = static_cast<float>(1.0 / (kept + (1.0 - kept) / factor));
    frequencies.push_back(static_cast<float>(base / divisor));
  }
  return frequencies;
}

void ReadHeads(Fields& fields, LlamaConfig& config) {
  config.heads = static_cast<int>(fields.Int("num_attention_heads", 1, kMaxHeads));
  // Llama before GQA leaves the key out.
  const bool multi_head = config.architecture == kLlama && fields.Find("num_key_value_heads") == nullptr;
  config.kv_heads =
      multi_head ? config.heads : static_cast<int>(fields.Int("num_key_value_heads", 1, kMaxHeads));
  if (config.heads % config.kv_heads != 0) {
    fields.Wrong("num_key_value_heads", absl::StrCat("a divisor of num_attention_heads, ", config.heads),
                 absl::StrCat(config.kv_heads), 0);
  }
  if (fields.Find("head_dim") != nullptr) {
    config.head_dim = static_cast<int>(fields.Int("head_dim", 2, kMaxHeadDim));
  } else if (config.hidden_size % config.heads != 0) {
    fields.Wrong("num_attention_heads", absl::StrCat("a divisor of hidden_size, ", config.hidden_size),
                 absl::StrCat(config.heads), 0);
  } else {
    config.head_dim = static_cast<int>(config.hidden_size / config.heads);
  }
  if (config.head_dim % 2 != 0 || config.head_dim > kMaxHeadDim || config.head_dim == 0) {
    fields.Wrong("head_dim", absl::StrCat("an even number from 2 to ", kMaxHeadDim),
                 absl::StrCat(config.head_dim), 0);
  }
  if (fields.Number("partial_rotary_factor", 0, 1, 1.0) != 1.0) {
    fields.Fail("partial_rotary_factor: expected 1, the only one supported, found less");
  }
}

// A window of w tokens changes nothing until position w, and attention here sees all of the context: so the
// model is served up to its window.
void ReadSlidingWindow(Fields& fields, const Json& document, LlamaConfig& config) {
  constexpr int64_t kMistralDefault = 4096;  // of a file without the key; null means no window
  if (config.architecture == kMistral) {
    const bool given = document.contains("sliding_window");
    config.sliding_window = fields.Int("sliding_window", 1, kMaxPositions, given ? 0 : kMistralDefault);
  } else if (config.architecture == kQwen2 && fields.Bool("use_sliding_window", false)) {
    config.sliding_window = fields.Int("sliding_window", 1, kMaxPositions, 0);
  }
  if (config.sliding_window > 0) config.max_positions = std::min(config.max_positions, config.sliding_window);
}

void AddEosIds(Fields& fields, int64_t vocab_size, std::vector<int32_t>& ids) {
  const Json* value = fields.Find("eos_token_id");
  if (value == nullptr || (value->is_number_integer() && *value == -1)) return;  // -1: none, in some files
  const std::string expected = absl::StrCat("a token id below vocab_size, ", vocab_size,
                                            ", or a list of at most ", kMaxEosIds, " of them");
  const Json list = value->is_array() ? *value : Json::array({*value});
  if (list.size() > kMaxEosIds) {
    fields.Wrong("eos_token_id", expected, absl::StrCat(list.size(), " of them"), 0);
    return;
  }
  for (const Json& id : list) {
    const bool in_range = id.is_number_unsigned() && id.get<uint64_t>() < static_cast<uint64_t>(vocab_size);
    if (!in_range) {
      fields.Wrong("eos_token_id", expected, Found(id), 0);
      return;
    }
    const int32_t token = id.get<int32_t>();
    if (std::find(ids.begin(), ids.end(), token) == ids.end()) ids.push_back(token);
  }
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    return absl::NotFoundError(absl::StrCat(path, ": cannot open; expected a Hugging Face model directory"));
  std::string text(kMaxFileBytes + 1, '\0');  // one more than is legal, so that the parser sees the excess
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad()) return absl::FailedPreconditionError(absl::StrCat(path, ": cannot read"));
  text.resize(static_cast<size_t>(file.gcount()));
  return text;
}

}  // namespace

std::vector<std::string_view> SupportedArchitectures() { return {kLlama, kMistral, kQwen2}; }

absl::StatusOr<LlamaConfig> ParseLlamaConfig(std::string_view json, const std::string& source) {
  absl::StatusOr<Json> document = ParseObject(json, source);
  if (!document.ok()) return document.status();
  absl::Status status;
  Fields fields(*document, source, &status);
  LlamaConfig config;
  config.architecture = FindArchitecture(*document, fields);
  if (!status.ok()) return status;

  config.hidden_size = fields.Int("hidden_size", 1, kMaxHidden);
  config.intermediate_size = fields.Int("intermediate_size", 1, kMaxIntermediate);
  config.layers = static_cast<int>(fields.Int("num_hidden_layers", 1, kMaxLayers));
  ReadHeads(fields, config);
  config.vocab_size = fields.Int("vocab_size", 1, kMaxVocab);
  config.max_positions = fields.Int("max_position_embeddings", 1, kMaxPositions);
  config.rms_norm_eps = static_cast<float>(fields.Number("rms_norm_eps", 0, 1, 1e-6));
  config.tied_embeddings = fields.Bool("tie_word_embeddings", false);
  ReadSlidingWindow(fields, *document, config);

  const bool attention_bias = config.architecture == kLlama && fields.Bool("attention_bias", false);
  config.qkv_bias = config.architecture == kQwen2 || attention_bias;
  config.output_bias = attention_bias;
  config.mlp_bias = config.architecture == kLlama && fields.Bool("mlp_bias", false);
  if (const std::string act = fields.String("hidden_act", "silu"); act != "silu") {
    fields.Wrong("hidden_act", "\"silu\"", Quoted(act), 0);
  }
  config.bos_token_id = static_cast<int32_t>(fields.Int("bos_token_id", -1, config.vocab_size - 1, -1));
  AddEosIds(fields, config.vocab_size, config.eos_token_ids);
  // Newer exports call it rope_parameters, and keep rope_theta in it.
  const Json* scaling = fields.Find("rope_scaling");
  if (scaling == nullptr) scaling = fields.Find("rope_parameters");
  config.inverse_frequency = InverseFrequencies(fields, scaling, source, &config, &status);
  if (!status.ok()) return status;
  return config;
}

namespace {

// What vLLM takes from there, too. do_sample is not among it: that a model's authors had it greedy does not
// turn off the temperature that a client asks for.
absl::StatusOr<SamplingParams> ReadSampling(const Json& document, const std::string& path,
                                            int64_t vocab_size) {
  absl::Status status;
  Fields fields(document, path, &status);
  SamplingParams sampling;
  constexpr double kMax = std::numeric_limits<float>::max();
  const auto read = [&](const char* key, float* value) {
    *value = static_cast<float>(fields.Number(key, -kMax, kMax, *value));
  };
  read("temperature", &sampling.temperature);
  read("top_p", &sampling.top_p);
  read("min_p", &sampling.min_p);
  read("repetition_penalty", &sampling.repetition_penalty);
  const int64_t top_k = fields.Int("top_k", -1, std::numeric_limits<int>::max(), sampling.top_k);
  sampling.top_k = static_cast<int>(std::max<int64_t>(0, top_k));  // -1 is vLLM's way to say off
  const absl::Status valid = ValidateSampling(sampling, static_cast<int>(vocab_size));
  if (!valid.ok()) fields.Fail(valid.message());
  if (!status.ok()) return status;
  return sampling;
}

}  // namespace

absl::StatusOr<LlamaConfig> LoadLlamaConfig(const std::string& model) {
  absl::StatusOr<std::string> gguf = FindGguf(model);
  if (!gguf.ok()) return gguf.status();
  if (!gguf->empty()) {
    absl::StatusOr<std::shared_ptr<const GgufFile>> file = GgufFile::Open(*gguf);
    if (!file.ok()) return file.status();
    return GgufLlamaConfig(**file);
  }
  const std::string path = absl::StrCat(model, "/config.json");
  absl::StatusOr<std::string> text = ReadSmallFile(path);
  if (!text.ok()) return text.status();
  absl::StatusOr<LlamaConfig> config = ParseLlamaConfig(*text, path);
  if (!config.ok()) return config;

  // Chat models end their turn with a token that often only generation_config.json knows.
  const std::string generation_path = absl::StrCat(model, "/generation_config.json");
  absl::StatusOr<std::string> generation = ReadSmallFile(generation_path);
  if (absl::IsNotFound(generation.status())) return config;
  if (!generation.ok()) return generation.status();
  absl::StatusOr<Json> document = ParseObject(*generation, generation_path);
  if (!document.ok()) return document.status();
  absl::Status status;
  Fields fields(*document, generation_path, &status);
  AddEosIds(fields, config->vocab_size, config->eos_token_ids);
  if (!status.ok()) return status;
  config->sampling = ReadSampling(*document, generation_path, config->vocab_size);
  return config;
}

}  // namespace atp
