// The safetensors files of a Hugging Face model directory, memory-mapped: model.safetensors, or the shards of
// model.safetensors.index.json.
#ifndef ATP_ENGINE_SAFETENSORS_H_
#define ATP_ENGINE_SAFETENSORS_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/safetensors_header.h"

namespace atp {

class MappedFile;

class SafetensorsSet {
 public:
  // Every header is read and checked here; no tensor data is touched. Errors are one line naming file,
  // tensor, expected and found. A file that another process truncates later is out of scope (SIGBUS), as with
  // every mapped file.
  static absl::StatusOr<std::shared_ptr<SafetensorsSet>> Open(const std::string& model_dir);

  ~SafetensorsSet();
  SafetensorsSet(const SafetensorsSet&) = delete;
  SafetensorsSet& operator=(const SafetensorsSet&) = delete;

  // Null where there is none. The tensor's data lives as long as the set.
  const SafetensorsTensor* Find(std::string_view name) const;
  // The file that lists all tensors, for the error about one that is missing.
  const std::string& source() const { return source_; }

 private:
  SafetensorsSet();
  absl::Status OpenSingle(const std::string& path);
  absl::Status OpenShards(const std::string& model_dir, const std::string& index_path);

  std::string source_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  SafetensorsTensors tensors_;
};

}  // namespace atp

#endif  // ATP_ENGINE_SAFETENSORS_H_
