// The stored tensors of a model by their Hugging Face names, whatever file they are in.
#ifndef ATP_ENGINE_WEIGHT_SOURCE_H_
#define ATP_ENGINE_WEIGHT_SOURCE_H_

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace atp {

class GgufFile;
class SafetensorsSet;

struct StoredTensor {
  std::string file;            // for errors, with the next two
  std::string name;            // in the file
  std::string type;            // in the file's words: "BF16", "q8_0"
  std::optional<DType> dtype;  // none: a type that no weight may have
  std::vector<int64_t> shape;  // row-major
  std::span<const std::byte> data;
};

class WeightSource {
 public:
  // `model` as in model_path.h. Headers are read and checked, no tensor data is touched.
  static absl::StatusOr<std::shared_ptr<const WeightSource>> Open(const std::string& model);
  ~WeightSource();
  WeightSource(const WeightSource&) = delete;
  WeightSource& operator=(const WeightSource&) = delete;

  // None where there is no such tensor. Its data lives as long as this object.
  std::optional<StoredTensor> Find(std::string_view name) const;
  // The name that `name` has in this source's files, for the error about one that is missing.
  std::string NameInFile(std::string_view name) const;
  // The file that lists all tensors, and what says their shapes.
  const std::string& source() const { return source_; }
  const char* described_by() const { return gguf_ != nullptr ? "the metadata" : "config.json"; }
  bool is_gguf() const { return gguf_ != nullptr; }

 private:
  WeightSource() = default;

  std::string source_;
  std::shared_ptr<SafetensorsSet> safetensors_;  // one of the two
  std::shared_ptr<const GgufFile> gguf_;
};

}  // namespace atp

#endif  // ATP_ENGINE_WEIGHT_SOURCE_H_
