#include "engine/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace atp {

// A whole file, mapped for reading.
class MappedFile {
 public:
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path) {
    // O_NONBLOCK: opening a pipe that somebody put there must not wait for its writer.
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return Failure(path, "cannot open");
    struct stat info = {};
    const bool known = fstat(fd, &info) == 0;
    if (!known || !S_ISREG(info.st_mode) || info.st_size == 0) {
      close(fd);
      if (!known) return Failure(path, "cannot stat");
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": expected a regular file, found ",
                       S_ISREG(info.st_mode) ? "an empty one" : "something else"));
    }
    const size_t bytes = static_cast<size_t>(info.st_size);
    void* data = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
    absl::Status mapped = data == MAP_FAILED ? Failure(path, "cannot map") : absl::OkStatus();
    close(fd);
    if (!mapped.ok()) return mapped;
    return std::unique_ptr<MappedFile>(new MappedFile(data, bytes));
  }

  ~MappedFile() { munmap(data_, bytes_); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), bytes_}; }
  std::string_view text() const { return {static_cast<const char*>(data_), bytes_}; }

 private:
  MappedFile(void* data, size_t bytes) : data_(data), bytes_(bytes) {}

  static absl::Status Failure(const std::string& path, absl::string_view what) {
    const int error = errno;
    const absl::StatusCode code =
        error == ENOENT ? absl::StatusCode::kNotFound : absl::StatusCode::kFailedPrecondition;
    return absl::Status(code, absl::StrCat(path, ": ", what, ": ", strerror(error)));
  }

  void* data_;
  size_t bytes_;
};

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
    opened = absl::NotFoundError(absl::StrCat(
        model_dir,
        ": expected model.safetensors or model.safetensors.index.json, found neither; weights in another "
        "format (pytorch_model.bin, gguf) must be converted to safetensors first"));
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
