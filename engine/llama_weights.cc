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
#include "engine/gguf_config.h"
#include "engine/safetensors_header.h"
#include "engine/weight_source.h"
#include "kernels/host_memory.h"

namespace atp {
namespace {

// One tensor that the model needs, and where it goes.
struct Item {
  std::string name;
  std::vector<int64_t>
      shape;  // two dimensions: a matrix, given to the backend as it is; one: a vector, converted to F32
  Weight* destination;
  int rotary_head_dim = 0;   // rows are rotated in pairs within heads of this size; 0: not
  StoredTensor tensor = {};  // set once found and checked
};

// Every tensor of the model by its Hugging Face name, in the order of loading. `absent`: names that must not
// be there, because a bias that config.json does not announce would silently be left out.
struct Plan {
  std::vector<Item> items;
  std::vector<std::string> absent;

  void Matrix(std::string name, int64_t rows, int64_t cols, Weight* to) {
    items.push_back({std::move(name), {rows, cols}, to});
  }
  void Vector(std::string name, int64_t size, Weight* to) { items.push_back({std::move(name), {size}, to}); }
  // The last item's rows are those of queries or keys.
  void Rotary(int head_dim) { items.back().rotary_head_dim = head_dim; }
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
  plan->Rotary(config.head_dim);
  plan->Bias(attention + "q_proj.bias", config.qkv_bias, query, &layer->query_bias);
  if (config.qkv_bias) plan->Rotary(config.head_dim);
  plan->Matrix(attention + "k_proj.weight", kv, hidden, &layer->key);
  plan->Rotary(config.head_dim);
  plan->Bias(attention + "k_proj.bias", config.qkv_bias, kv, &layer->key_bias);
  if (config.qkv_bias) plan->Rotary(config.head_dim);
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
  // Among the first, because while a matrix is loaded its pages in the file count as ours too: the largest
  // must not come on top of all others.
  if (!config.tied_embeddings) {
    plan.Matrix("lm_head.weight", config.vocab_size, config.hidden_size, &weights->lm_head_memory);
  }
  weights->layers.resize(static_cast<size_t>(config.layers));
  for (int i = 0; i < config.layers; ++i)
    PlanLayer(config, i, &weights->layers[static_cast<size_t>(i)], &plan);
  plan.Vector("model.norm.weight", config.hidden_size, &weights->final_norm);
  return plan;
}

std::string WhereOf(const StoredTensor& tensor) {
  return absl::StrCat(tensor.file, ": tensor ", QuoteForError(tensor.name), ": ");
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::Status CheckItem(const WeightSource& source, Item* item) {
  const std::string shape = absl::StrCat(ShapeText(item->shape), " as ", source.described_by(), " says");
  std::optional<StoredTensor> found = source.Find(item->name);
  if (!found) {
    return absl::InvalidArgumentError(absl::StrCat(source.source(), ": tensor ",
                                                   QuoteForError(source.NameInFile(item->name)),
                                                   ": expected shape ", shape, ", found no such tensor"));
  }
  item->tensor = *std::move(found);
  const std::string where = WhereOf(item->tensor);
  if (item->tensor.shape != item->shape) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, "expected shape ", shape, ", found ", ShapeText(item->tensor.shape)));
  }
  const bool vector = item->shape.size() == 1;
  if (!item->tensor.dtype.has_value() || (vector && IsQuantized(*item->tensor.dtype))) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, "expected dtype F32, BF16 or F16, found ", item->tensor.type));
  }
  return absl::OkStatus();
}

TensorView ViewOf(const Item& item) {
  const bool matrix = item.shape.size() == 2;
  return {item.tensor.data.data(), *item.tensor.dtype, matrix ? item.shape[0] : 1, item.shape.back()};
}

// What a matrix is kept as. Rows that are no whole blocks of the wanted dtype stay as they are stored.
DType KeptDType(const Item& item, std::optional<DType> wanted) {
  const bool fits = wanted && item.shape.back() % BlockOf(*wanted).elements == 0;
  return fits ? *wanted : *item.tensor.dtype;
}

absl::Status CheckAbsent(const WeightSource& source, const Plan& plan) {
  for (const std::string& name : plan.absent) {
    if (const std::optional<StoredTensor> tensor = source.Find(name)) {
      return absl::InvalidArgumentError(absl::StrCat(WhereOf(*tensor), "expected no such bias as ",
                                                     source.described_by(), " says, found one"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPlan(const WeightSource& source, const Backend& backend, const LlamaConfig& config,
                       std::optional<DType> wanted, Plan* plan) {
  if (absl::Status absent = CheckAbsent(source, *plan); !absent.ok()) return absent;
  for (Item& item : plan->items) {
    if (absl::Status checked = CheckItem(source, &item); !checked.ok()) return checked;
    OpDesc desc;
    desc.weight_dtype = item.shape.size() == 2 ? KeptDType(item, wanted) : *item.tensor.dtype;
    desc.head_dim = config.head_dim;
    desc.block_entries = 16;
    if (!backend.Supports(desc)) {
      return absl::UnimplementedError(
          absl::StrCat(WhereOf(item.tensor), "dtype ", item.tensor.type, " with head_dim ", config.head_dim,
                       " is not supported by the backend (", backend.Description(), ")"));
    }
  }
  return absl::OkStatus();
}

// Tells the kernel that the tensor is read next, so that the disk works while the one before is converted.
void ReadAhead(std::span<const std::byte> data) {
  const size_t into_page =
      reinterpret_cast<uintptr_t>(data.data()) % static_cast<size_t>(sysconf(_SC_PAGESIZE));
  madvise(const_cast<std::byte*>(data.data()) - into_page, data.size() + into_page, MADV_WILLNEED);
}

// Reads a tensor that stays in the mapping now, so that the first request does not: touches a byte of every
// page.
void FaultIn(std::span<const std::byte> data) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (size_t i = 0; i < data.size(); i += page) {
    [[maybe_unused]] const volatile std::byte touched = data[i];
  }
}

// Gives back the pages of a mapping that were copied from, so that they do not count as ours.
void DropPages(std::span<const std::byte> data) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t begin = (reinterpret_cast<uintptr_t>(data.data()) + page - 1) / page * page;
  const size_t end = (reinterpret_cast<uintptr_t>(data.data()) + data.size()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

// The rows of queries or keys in our order, from where a converter has interleaved the pairs of each head
// (gguf_config.h). Whole rows move, so quantised ones stay what they are. A vector is rows of one element.
absl::StatusOr<Buffer> InOurOrder(const Item& item) {
  const int64_t rows = item.shape.front();
  const size_t row_bytes = item.tensor.data.size() / static_cast<size_t>(rows);
  absl::StatusOr<Buffer> memory = AllocateHostMemory(item.tensor.data.size());
  if (!memory.ok()) return memory;
  for (int64_t row = 0; row < rows; ++row) {
    const auto from = static_cast<size_t>(InterleavedRow(row, item.rotary_head_dim));
    std::memcpy(memory->data() + static_cast<size_t>(row) * row_bytes,
                item.tensor.data.data() + from * row_bytes, row_bytes);
  }
  return memory;
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

absl::StatusOr<Weight> LoadItem(const Item& item, bool interleaved, std::optional<DType> wanted,
                                Backend* backend) {
  TensorView host = ViewOf(item);
  Buffer reordered;
  if (interleaved && item.rotary_head_dim > 0) {
    absl::StatusOr<Buffer> memory = InOurOrder(item);
    if (!memory.ok()) return memory.status();
    reordered = *std::move(memory);
    host.data = reordered.data();
  }
  absl::StatusOr<Weight> weight =
      item.shape.size() == 2 ? backend->LoadWeight(host, KeptDType(item, wanted)) : LoadVector(host, backend);
  if (!weight.ok()) return weight;
  const bool uses_mapping = weight->memory.data() == nullptr && reordered.data() == nullptr;
  if (weight->memory.data() == nullptr) weight->memory = std::move(reordered);  // what the view points into
  if (uses_mapping) {
    FaultIn(item.tensor.data);
  } else {
    DropPages(item.tensor.data);
  }
  return weight;
}

}  // namespace

LlamaWeights::LlamaWeights() = default;
LlamaWeights::LlamaWeights(LlamaWeights&&) noexcept = default;
LlamaWeights& LlamaWeights::operator=(LlamaWeights&&) noexcept = default;
LlamaWeights::~LlamaWeights() = default;

std::optional<DType> WeightDTypeFromName(std::string_view name) {
  if (name == "f32") return DType::kF32;
  if (name == "bf16") return DType::kBF16;
  if (name == "q8") return DType::kQ8_0;
  if (name == "q4") return DType::kQ4;
  return std::nullopt;
}

absl::StatusOr<std::vector<LlamaTensor>> FindLlamaTensors(const WeightSource& source,
                                                          const LlamaConfig& config) {
  LlamaWeights nowhere;
  Plan plan = MakePlan(config, &nowhere);
  std::vector<LlamaTensor> found;
  if (absl::Status absent = CheckAbsent(source, plan); !absent.ok()) return absent;
  for (Item& item : plan.items) {
    if (absl::Status checked = CheckItem(source, &item); !checked.ok()) return checked;
    found.push_back({std::move(item.tensor), item.rotary_head_dim});
  }
  return found;
}

absl::StatusOr<LlamaWeights> LoadLlamaWeights(const std::string& model, const LlamaConfig& config,
                                              std::optional<DType> wanted, Backend* backend,
                                              const LoadProgress& progress) {
  absl::StatusOr<std::shared_ptr<const WeightSource>> source = WeightSource::Open(model);
  if (!source.ok()) return source.status();
  LlamaWeights weights;
  weights.source = *std::move(source);
  // Everything is checked before anything is loaded: a bad file fails at once, not after minutes of reading.
  Plan plan = MakePlan(config, &weights);
  if (absl::Status checked = CheckPlan(*weights.source, *backend, config, wanted, &plan); !checked.ok())
    return checked;
  // The largest first: a matrix is there twice while it is copied, and once nearly all is loaded, it is
  // small.
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [](const Item& a, const Item& b) { return a.tensor.data.size() > b.tensor.data.size(); });
  size_t total = 0, done = 0;
  for (const Item& item : plan.items) total += item.tensor.data.size();

  const bool interleaved = weights.source->is_gguf() && HasInterleavedRows(config);
  for (size_t i = 0; i < plan.items.size(); ++i) {
    const Item& item = plan.items[i];
    if (i + 1 < plan.items.size()) ReadAhead(plan.items[i + 1].tensor.data);
    absl::StatusOr<Weight> weight = LoadItem(item, interleaved, wanted, backend);
    if (!weight.ok()) {
      return absl::Status(weight.status().code(),
                          absl::StrCat(WhereOf(item.tensor), weight.status().message()));
    }
    const TensorView& view = weight->view;
    weights.bytes += static_cast<size_t>(view.rows) * RowBytes(view.dtype, view.cols);
    *item.destination = *std::move(weight);
    done += item.tensor.data.size();
    if (progress) progress(done, total);
  }
  weights.dtype = weights.layers.front().gate.view.dtype;
  weights.lm_head = config.tied_embeddings ? weights.embedding.view : weights.lm_head_memory.view;
  return weights;
}

}  // namespace atp
