#include "engine/quantize_model.h"

#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/compression_budgets.h"
#include "engine/gguf.h"
#include "engine/gguf_config.h"
#include "engine/gguf_writer.h"
#include "engine/llama_config.h"
#include "engine/llama_weights.h"
#include "engine/model_path.h"
#include "engine/weight_source.h"
#include "kernels/host_memory.h"
#include "kernels/quantized.h"

namespace atp {
namespace {

namespace fs = std::filesystem;

struct Writing {
  DType wanted;
  const std::function<void(size_t, size_t)>& progress;
  size_t done = 0, total = 0;
};

// What a tensor of a file becomes: vectors are F32.
DType KeptAs(DType stored, const std::vector<int64_t>& shape, DType wanted) {
  if (shape.size() != 2) return DType::kF32;
  return shape.back() % BlockOf(wanted).elements == 0 ? wanted : stored;
}

// Rows in the order of the new file: those of `data` one after the other, or with the pairs of each head
// interleaved (head_dim > 0), as readers of GGUF files expect them of queries and keys.
absl::Status Produce(const TensorView& host, DType dtype, int head_dim, const GgufWriter::Append& append) {
  const absl::StatusOr<Weight> weight = LoadHostWeight(host, dtype);
  if (!weight.ok()) return weight.status();
  const auto* data = static_cast<const std::byte*>(weight->view.data);
  const size_t row_bytes = RowBytes(dtype, host.cols);
  const int64_t half = head_dim / 2;
  for (int64_t row = 0; row < host.rows; ++row) {
    int64_t from = row;
    if (head_dim > 0) {
      const int64_t in_head = row % head_dim;
      from = row - in_head + in_head / 2 + in_head % 2 * half;  // the inverse of InterleavedRow()
    }
    append(data + static_cast<size_t>(from) * row_bytes, row_bytes);
  }
  return absl::OkStatus();
}

void AddTensor(std::string name, DType stored, const std::vector<int64_t>& shape,
               std::span<const std::byte> data, int head_dim, Writing* writing, GgufWriter* writer) {
  TensorView host{data.data(), stored, 1, shape.back()};
  for (size_t i = 0; i + 1 < shape.size(); ++i) host.rows *= shape[i];
  // The rows of a vector are its elements.
  if (shape.size() == 1 && head_dim > 0) std::swap(host.rows, host.cols);
  const DType dtype = KeptAs(stored, shape, writing->wanted);
  writing->total += data.size();
  writer->AddTensor(std::move(name), dtype, shape, [=](const GgufWriter::Append& append) {
    writing->done += data.size();
    if (writing->progress) writing->progress(writing->done, writing->total);
    return Produce(host, dtype, head_dim, append);
  });
}

// What GgufLlamaConfig() divides the plain frequency by to get exactly `wanted`: the quotient, or its
// neighbour.
float DivisorFor(double base, float wanted) {
  const auto quotient = static_cast<float>(base / wanted);
  for (const float d : {quotient, std::nextafter(quotient, 0.0f), std::nextafter(quotient, 2 * quotient)}) {
    if (static_cast<float>(base / d) == wanted) return d;
  }
  return quotient;
}

// rope.freq_base, and where positions are scaled, in whatever way, a factor for each frequency.
void AddFrequencies(const LlamaConfig& config, const std::string& architecture, GgufWriter* writer) {
  writer->AddNumber(absl::StrCat(architecture, ".rope.freq_base"), config.rope_theta);
  const double theta = static_cast<float>(config.rope_theta);
  std::vector<float> divisors;
  bool plain = true;
  for (size_t i = 0; i < config.inverse_frequency.size(); ++i) {
    const double base = std::pow(theta, -2.0 * static_cast<double>(i) / config.head_dim);
    divisors.push_back(DivisorFor(base, config.inverse_frequency[i]));
    plain = plain && divisors.back() == 1.0f;
  }
  if (plain) return;
  writer->AddTensor("rope_freqs.weight", DType::kF32, {static_cast<int64_t>(divisors.size())},
                    [divisors](const GgufWriter::Append& append) {
                      append(divisors.data(), divisors.size() * sizeof(float));
                      return absl::OkStatus();
                    });
}

void AddConfig(const LlamaConfig& config, GgufWriter* writer) {
  const std::string architecture = config.architecture == "Qwen2ForCausalLM" ? "qwen2" : "llama";
  const auto key = [&](absl::string_view name) { return absl::StrCat(architecture, ".", name); };
  writer->AddString("general.architecture", architecture);
  writer->AddInt(key("vocab_size"), config.vocab_size);
  writer->AddInt(key("context_length"), config.max_positions);
  writer->AddInt(key("embedding_length"), config.hidden_size);
  writer->AddInt(key("block_count"), config.layers);
  writer->AddInt(key("feed_forward_length"), config.intermediate_size);
  writer->AddInt(key("attention.head_count"), config.heads);
  writer->AddInt(key("attention.head_count_kv"), config.kv_heads);
  writer->AddInt(key("attention.key_length"), config.head_dim);
  writer->AddInt(key("attention.value_length"), config.head_dim);
  writer->AddInt(key("rope.dimension_count"), config.head_dim);
  writer->AddNumber(key("attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
  if (config.sliding_window > 0) writer->AddInt(key("attention.sliding_window"), config.sliding_window);
  if (config.bos_token_id >= 0) writer->AddInt("tokenizer.ggml.bos_token_id", config.bos_token_id);
  const char* ends[] = {"eos_token_id", "eot_token_id", "eom_token_id"};
  for (size_t i = 0; i < config.eos_token_ids.size() && i < std::size(ends); ++i) {
    writer->AddInt(absl::StrCat("tokenizer.ggml.", ends[i]), config.eos_token_ids[i]);
  }
  const SamplingParams usual, sampling = config.sampling.value_or(usual);
  const auto add_sampling = [&](absl::string_view name, float value, float unless) {
    if (value != unless) writer->AddNumber(absl::StrCat(kGgufSampling, name), value);
  };
  add_sampling("temp", sampling.temperature, usual.temperature);
  add_sampling("top_p", sampling.top_p, usual.top_p);
  add_sampling("min_p", sampling.min_p, usual.min_p);
  add_sampling("penalty_repeat", sampling.repetition_penalty, usual.repetition_penalty);
  if (sampling.top_k != usual.top_k) writer->AddInt(absl::StrCat(kGgufSampling, "top_k"), sampling.top_k);
  AddFrequencies(config, architecture, writer);
}

absl::Status CopyBeside(const std::string& in, const std::string& out) {
  for (const char* name :
       {"config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "atp_budgets.json"}) {
    std::error_code error;
    const fs::path from = fs::path(in) / name;
    if (!fs::exists(from, error)) continue;
    if (!fs::copy_file(from, fs::path(out) / name, error)) {
      return absl::FailedPreconditionError(
          absl::StrCat(out, "/", name, ": cannot be written: ", error.message()));
    }
  }
  return absl::OkStatus();
}

absl::Status MakeDirectoryOf(const std::string& in, const std::string& out) {
  std::error_code error;
  if (!fs::create_directory(out, error)) {
    return absl::FailedPreconditionError(absl::StrCat(out, ": cannot be made: ", error.message()));
  }
  return CopyBeside(in, out);
}

// `in` is the file at `path`, or the directory that has it: then what lies beside it goes along.
absl::Status QuantizeGguf(const std::string& path, const std::string& in, const std::string& out,
                          Writing* writing) {
  const absl::StatusOr<std::shared_ptr<const GgufFile>> file = GgufFile::Open(path);
  if (!file.ok()) return file.status();
  if (const auto config = GgufLlamaConfig(**file); !config.ok()) return config.status();
  GgufWriter writer;
  for (const auto& [key, value] : (*file)->metadata()) {
    // What is no longer true.
    if (key == "general.alignment" || key == "general.file_type" || key == "general.quantization_version")
      continue;
    writer.AddValue(key, value);
  }
  for (const auto& [name, tensor] : (*file)->tensors()) {
    AddTensor(name, tensor.dtype, tensor.shape, tensor.data, /*head_dim=*/0, writing, &writer);
  }
  std::error_code error;
  if (fs::is_directory(in, error)) {
    if (absl::Status made = MakeDirectoryOf(in, out); !made.ok()) return made;
    return writer.Write(out + "/model.gguf");
  }
  const std::string budgets = absl::StrCat(".", std::string(kBudgetsFileName));
  if (fs::exists(in + budgets, error) && !fs::copy_file(in + budgets, out + budgets, error)) {
    return absl::FailedPreconditionError(
        absl::StrCat(out, budgets, ": cannot be written: ", error.message()));
  }
  return writer.Write(out);
}

absl::Status QuantizeDirectory(const std::string& in, const std::string& out, Writing* writing) {
  const absl::StatusOr<LlamaConfig> config = LoadLlamaConfig(in);
  if (!config.ok()) return config.status();
  const absl::StatusOr<std::shared_ptr<const WeightSource>> source = WeightSource::Open(in);
  if (!source.ok()) return source.status();
  const absl::StatusOr<std::vector<LlamaTensor>> tensors = FindLlamaTensors(**source, *config);
  if (!tensors.ok()) return tensors.status();
  GgufWriter writer;
  AddConfig(*config, &writer);
  for (const LlamaTensor& tensor : *tensors) {
    const StoredTensor& stored = tensor.stored;
    AddTensor(GgufTensorName(stored.name), *stored.dtype, stored.shape, stored.data,
              HasInterleavedRows(*config) ? tensor.rotary_head_dim : 0, writing, &writer);
  }
  if (absl::Status made = MakeDirectoryOf(in, out); !made.ok()) return made;
  return writer.Write(out + "/model.gguf");
}

}  // namespace

absl::Status QuantizeModel(const std::string& in, const std::string& out, DType dtype,
                           const std::function<void(size_t, size_t)>& progress) {
  std::error_code ignored;
  if (fs::exists(out, ignored)) {
    return absl::FailedPreconditionError(absl::StrCat(out, ": is there already, and nothing is overwritten"));
  }
  const absl::StatusOr<std::string> gguf = FindGguf(in);
  if (!gguf.ok()) return gguf.status();
  Writing writing{dtype, progress};
  return gguf->empty() ? QuantizeDirectory(in, out, &writing) : QuantizeGguf(*gguf, in, out, &writing);
}

}  // namespace atp
