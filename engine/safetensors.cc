#include "engine/safetensors.h"

#include <unistd.h>

#include <map>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/mapped_file.h"

namespace atp {

SafetensorsSet::SafetensorsSet() = default;
SafetensorsSet::~SafetensorsSet() = default;

absl::StatusOr<std::shared_ptr<SafetensorsSet>> SafetensorsSet::Open(const std::string& model_dir) {
  const std::string single = absl::StrCat(model_dir, "/model.safetensors");
  const std::string index = absl::StrCat(single, ".index.json");
  std::shared_ptr<SafetensorsSet> set(new SafetensorsSet());
  absl::Status opened;
  if (access(single.c_str(), F_OK) == 0) {
    opened = set->OpenSingle(single);
  } else if (access(index.c_str(), F_OK) == 0) {
    opened = set->OpenShards(model_dir, index);
  } else {
    opened = absl::NotFoundError(
        absl::StrCat(model_dir,
                     ": expected model.safetensors or model.safetensors.index.json, found neither, and no "
                     ".gguf file; weights "
                     "in another format (pytorch_model.bin) must be converted to safetensors first"));
  }
  if (!opened.ok()) return opened;
  return set;
}

absl::Status SafetensorsSet::OpenSingle(const std::string& path) {
  source_ = path;
  absl::StatusOr<std::unique_ptr<MappedFile>> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  absl::StatusOr<SafetensorsTensors> tensors = ParseSafetensors((*file)->bytes(), path);
  if (!tensors.ok()) return tensors.status();
  files_.push_back(*std::move(file));
  tensors_ = *std::move(tensors);
  return absl::OkStatus();
}

absl::Status SafetensorsSet::OpenShards(const std::string& model_dir, const std::string& index_path) {
  source_ = index_path;
  absl::StatusOr<std::unique_ptr<MappedFile>> index_file = MappedFile::Open(index_path);
  if (!index_file.ok()) return index_file.status();
  absl::StatusOr<SafetensorsIndex> index = ParseSafetensorsIndex((*index_file)->text(), index_path);
  if (!index.ok()) return index.status();

  std::map<std::string, SafetensorsTensors> shards;
  for (const auto& [name, shard] : *index) {
    const auto [it, first] = shards.try_emplace(shard);
    const std::string path = absl::StrCat(model_dir, "/", shard);
    if (first) {
      absl::StatusOr<std::unique_ptr<MappedFile>> file = MappedFile::Open(path);
      if (absl::IsNotFound(file.status())) {
        return absl::NotFoundError(absl::StrCat(index_path, ": tensor ", QuoteForError(name),
                                                ": expected shard ", path, ", found no such file"));
      }
      if (!file.ok()) return file.status();
      absl::StatusOr<SafetensorsTensors> tensors = ParseSafetensors((*file)->bytes(), path);
      if (!tensors.ok()) return tensors.status();
      files_.push_back(*std::move(file));
      it->second = *std::move(tensors);
    }
    // The index decides what is read from where: a tensor that a shard holds and the index does not name is
    // not there.
    auto node = it->second.extract(name);
    if (node.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor ", QuoteForError(name),
                       ": expected here by model.safetensors.index.json, found no such "
                       "tensor"));
    }
    tensors_.insert(std::move(node));
  }
  return absl::OkStatus();
}

const SafetensorsTensor* SafetensorsSet::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

}  // namespace atp
