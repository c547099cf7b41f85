#include "engine/llama_weights.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/safetensors.h"

namespace atp {
namespace {

std::optional<DType> ComputeDType(std::string_view safetensors_dtype) {
  if (safetensors_dtype == "F32") return DType::kF32;
  if (safetensors_dtype == "BF16") return DType::kBF16;
  if (safetensors_dtype == "F16") return DType::kF16;
  return std::nullopt;
}

// One tensor that the model needs, and where it goes.
struct Item {
  std::string name;
  std::vector<int64_t>
      shape;  // two dimensions: a matrix, given to the backend as it is; one: a vector, converted to F32
  Weight* destination;
  const SafetensorsTensor* tensor = nullptr;  // set once found and checked
};

// Every tensor of the model by its Hugging Face name, in the order of use. `absent`: names that must not be
// there, because a bias that config.json does not announce would silently be left out.
struct Plan {
  std::vector<Item> items;
  std::vector<std::string> absent;

  void Matrix(std::string name, int64_t rows, int64_t cols, Weight* to) {
    items.push_back({std::move(name), {rows, cols}, to});
  }
  void Vector(std::string name, int64_t size, Weight* to) { items.push_back({std::move(name), {size}, to}); }
  void Bias(std::string name, bool present, int64_t size, Weight* to) {
    if (present) {
      Vector(std::move(name), size, to);
    } else {
      absent.push_back(std::move(name));
    }
  }
};

void PlanLayer(const LlamaConfig& config, int index, LlamaLayerWeights* layer, Plan* plan) {
  const int64_t hidden = config.hidden_size;
  const int64_t inner = config.intermediate_size;
  const int64_t query = static_cast<int64_t>(config.heads) * config.head_dim;
  const int64_t kv = static_cast<int64_t>(config.kv_heads) * config.head_dim;
  const std::string prefix = absl::StrCat("model.layers.", index, ".");
  const std::string attention = absl::StrCat(prefix, "self_attn.");
  const std::string mlp = absl::StrCat(prefix, "mlp.");
  plan->Vector(prefix + "input_layernorm.weight", hidden, &layer->attention_norm);
  plan->Matrix(attention + "q_proj.weight", query, hidden, &layer->query);
  plan->Bias(attention + "q_proj.bias", config.qkv_bias, query, &layer->query_bias);
  plan->Matrix(attention + "k_proj.weight", kv, hidden, &layer->key);
  plan->Bias(attention + "k_proj.bias", config.qkv_bias, kv, &layer->key_bias);
  plan->Matrix(attention + "v_proj.weight", kv, hidden, &layer->value);
  plan->Bias(attention + "v_proj.bias", config.qkv_bias, kv, &layer->value_bias);
  plan->Matrix(attention + "o_proj.weight", hidden, query, &layer->output);
  plan->Bias(attention + "o_proj.bias", config.output_bias, hidden, &layer->output_bias);
  plan->Vector(prefix + "post_attention_layernorm.weight", hidden, &layer->mlp_norm);
  plan->Matrix(mlp + "gate_proj.weight", inner, hidden, &layer->gate);
  plan->Bias(mlp + "gate_proj.bias", config.mlp_bias, inner, &layer->gate_bias);
  plan->Matrix(mlp + "up_proj.weight", inner, hidden, &layer->up);
  plan->Bias(mlp + "up_proj.bias", config.mlp_bias, inner, &layer->up_bias);
  plan->Matrix(mlp + "down_proj.weight", hidden, inner, &layer->down);
  plan->Bias(mlp + "down_proj.bias", config.mlp_bias, hidden, &layer->down_bias);
}

Plan MakePlan(const LlamaConfig& config, LlamaWeights* weights) {
  Plan plan;
  plan.Matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size, &weights->embedding);
  weights->layers.resize(static_cast<size_t>(config.layers));
  for (int i = 0; i < config.layers; ++i)
    PlanLayer(config, i, &weights->layers[static_cast<size_t>(i)], &plan);
  plan.Vector("model.norm.weight", config.hidden_size, &weights->final_norm);
  if (!config.tied_embeddings) {
    plan.Matrix("lm_head.weight", config.vocab_size, config.hidden_size, &weights->lm_head_memory);
  }
  return plan;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::Status CheckItem(const SafetensorsSet& files, Item* item) {
  item->tensor = files.Find(item->name);
  const std::string quoted = QuoteForError(item->name);
  const std::string shape = ShapeText(item->shape);
  if (item->tensor == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(files.source(), ": tensor ", quoted, ": expected shape ",
                                                   shape, " as config.json says, found no such tensor"));
  }
  const SafetensorsTensor& tensor = *item->tensor;
  if (tensor.shape != item->shape) {
    return absl::InvalidArgumentError(absl::StrCat(tensor.file, ": tensor ", quoted, ": expected shape ",
                                                   shape, " as config.json says, found ",
                                                   ShapeText(tensor.shape)));
  }
  const std::optional<DType> dtype = ComputeDType(tensor.dtype);
  if (!dtype.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        tensor.file, ": tensor ", quoted, ": expected dtype F32, BF16 or F16, found ", tensor.dtype));
  }
  return absl::OkStatus();
}

TensorView ViewOf(const Item& item) {
  const bool matrix = item.shape.size() == 2;
  return {item.tensor->data.data(), *ComputeDType(item.tensor->dtype), matrix ? item.shape[0] : 1,
          item.shape.back()};
}

absl::Status CheckPlan(const SafetensorsSet& files, const Backend& backend, const LlamaConfig& config,
                       Plan* plan) {
  for (const std::string& name : plan->absent) {
    if (const SafetensorsTensor* tensor = files.Find(name)) {
      return absl::InvalidArgumentError(
          absl::StrCat(tensor->file, ": tensor ", QuoteForError(name),
                       ": expected no such bias as config.json says, found one"));
    }
  }
  for (Item& item : plan->items) {
    if (absl::Status checked = CheckItem(files, &item); !checked.ok()) return checked;
    OpDesc desc;
    desc.weight_dtype = ViewOf(item).dtype;
    desc.head_dim = config.head_dim;
    desc.block_entries = 16;
    if (!backend.Supports(desc)) {
      return absl::UnimplementedError(absl::StrCat(item.tensor->file, ": tensor ", QuoteForError(item.name),
                                                   ": dtype ", item.tensor->dtype, " with head_dim ",
                                                   config.head_dim, " is not supported by the backend (",
                                                   backend.Description(), ")"));
    }
  }
  return absl::OkStatus();
}

// Reads the tensor from disk now, so that the first request does not: tells the kernel what comes, then
// touches a byte of every page, a stretch at a time for the sake of progress.
template <typename Report>
void FaultIn(std::span<const std::byte> data, const Report& report) {
  constexpr size_t kStretchBytes = 16 << 20;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t into_page = reinterpret_cast<uintptr_t>(data.data()) % page;
  madvise(const_cast<std::byte*>(data.data()) - into_page, data.size() + into_page, MADV_WILLNEED);
  for (size_t begin = 0; begin < data.size(); begin += kStretchBytes) {
    const size_t end = std::min(begin + kStretchBytes, data.size());
    for (size_t i = begin; i < end; i += page) {
      [[maybe_unused]] const volatile std::byte touched = data[i];
    }
    report(end - begin);
  }
}

// The backend has made a form of its own of the tensor: its pages of the file need not stay in memory.
void Forget(std::span<const std::byte> data) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data.data()) + page - 1) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data.data() + data.size()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

absl::StatusOr<Weight> LoadVector(const TensorView& host, Backend* backend) {
  std::vector<float> values(static_cast<size_t>(host.cols));
  // memcpy, because data in a file need not be aligned; the backend sees to that for matrices.
  const std::byte* data = static_cast<const std::byte*>(host.data);
  for (size_t i = 0; i < values.size(); ++i) {
    if (host.dtype == DType::kF32) {
      std::memcpy(&values[i], data + i * sizeof(float), sizeof(float));
    } else {
      uint16_t half = 0;
      std::memcpy(&half, data + i * sizeof(half), sizeof(half));
      values[i] = host.dtype == DType::kBF16 ? BF16ToFloat(half) : F16ToFloat(half);
    }
  }
  const size_t bytes = values.size() * sizeof(float);
  absl::StatusOr<Buffer> memory = backend->Allocate(bytes);
  if (!memory.ok()) return memory.status();
  backend->CopyToDevice(memory->data(), values.data(), bytes);
  Weight weight;
  weight.view = {memory->data(), DType::kF32, 1, host.cols};
  weight.memory = *std::move(memory);
  return weight;
}

}  // namespace

LlamaWeights::LlamaWeights() = default;
LlamaWeights::LlamaWeights(LlamaWeights&&) noexcept = default;
LlamaWeights& LlamaWeights::operator=(LlamaWeights&&) noexcept = default;
LlamaWeights::~LlamaWeights() = default;

absl::StatusOr<LlamaWeights> LoadLlamaWeights(const std::string& model_dir, const LlamaConfig& config,
                                              Backend* backend, const LoadProgress& progress) {
  absl::StatusOr<std::shared_ptr<SafetensorsSet>> files = SafetensorsSet::Open(model_dir);
  if (!files.ok()) return files.status();
  LlamaWeights weights;
  weights.files = *std::move(files);
  // Everything is checked before anything is loaded: a bad file fails at once, not after minutes of reading.
  Plan plan = MakePlan(config, &weights);
  if (absl::Status checked = CheckPlan(*weights.files, *backend, config, &plan); !checked.ok())
    return checked;
  for (const Item& item : plan.items) weights.bytes += item.tensor->data.size();
  weights.dtype = ViewOf(plan.items.front()).dtype;

  size_t done = 0;
  const auto report = [&](size_t bytes) {
    done += bytes;
    if (progress) progress(done, weights.bytes);
  };
  for (const Item& item : plan.items) {
    const TensorView host = ViewOf(item);
    FaultIn(item.tensor->data, report);
    absl::StatusOr<Weight> weight =
        item.shape.size() == 2 ? backend->LoadWeight(host, host.dtype) : LoadVector(host, backend);
    if (!weight.ok()) {
      return absl::Status(weight.status().code(),
                          absl::StrCat(item.tensor->file, ": tensor ", QuoteForError(item.name), ": ",
                                       weight.status().message()));
    }
    if (weight->memory.data() != nullptr) Forget(item.tensor->data);
    *item.destination = *std::move(weight);
  }
  weights.lm_head = config.tied_embeddings ? weights.embedding.view : weights.lm_head_memory.view;
  return weights;
}

}  // namespace atp
