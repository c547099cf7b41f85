#include "engine/weight_source.h"

#include <utility>

#include "engine/gguf.h"
#include "engine/gguf_config.h"
#include "engine/model_path.h"
#include "engine/safetensors.h"

namespace atp {
namespace {

std::optional<DType> DTypeOfSafetensors(std::string_view dtype) {
  if (dtype == "F32") return DType::kF32;
  if (dtype == "BF16") return DType::kBF16;
  if (dtype == "F16") return DType::kF16;
  return std::nullopt;
}

}  // namespace

WeightSource::~WeightSource() = default;

absl::StatusOr<std::shared_ptr<const WeightSource>> WeightSource::Open(const std::string& model) {
  absl::StatusOr<std::string> path = FindGguf(model);
  if (!path.ok()) return path.status();
  std::shared_ptr<WeightSource> source(new WeightSource());
  if (!path->empty()) {
    absl::StatusOr<std::shared_ptr<const GgufFile>> file = GgufFile::Open(*path);
    if (!file.ok()) return file.status();
    source->gguf_ = *std::move(file);
    source->source_ = *path;
  } else {
    absl::StatusOr<std::shared_ptr<SafetensorsSet>> files = SafetensorsSet::Open(model);
    if (!files.ok()) return files.status();
    source->safetensors_ = *std::move(files);
    source->source_ = source->safetensors_->source();
  }
  return source;
}

std::string WeightSource::NameInFile(std::string_view name) const {
  return gguf_ != nullptr ? GgufTensorName(name) : std::string(name);
}

std::optional<StoredTensor> WeightSource::Find(std::string_view name) const {
  if (gguf_ != nullptr) {
    const std::string in_file = GgufTensorName(name);
    const GgufTensor* tensor = gguf_->FindTensor(in_file);
    if (tensor == nullptr) return std::nullopt;
    return StoredTensor{source_,       in_file,       std::string(Name(tensor->dtype)),
                        tensor->dtype, tensor->shape, tensor->data};
  }
  const SafetensorsTensor* tensor = safetensors_->Find(name);
  if (tensor == nullptr) return std::nullopt;
  return StoredTensor{tensor->file,  std::string(name), tensor->dtype, DTypeOfSafetensors(tensor->dtype),
                      tensor->shape, tensor->data};
}

}  // namespace atp
