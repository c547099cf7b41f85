// Writes GGUF files, version 3 (gguf.h), one tensor at a time.
#ifndef ATP_ENGINE_GGUF_WRITER_H_
#define ATP_ENGINE_GGUF_WRITER_H_

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "engine/gguf.h"

namespace atp {

class GgufWriter {
 public:
  // Appends bytes to the tensor being written.
  using Append = std::function<void(const void* data, size_t bytes)>;
  // Writes a whole tensor; what it appends is as many bytes as its dtype and shape say.
  using Produce = std::function<absl::Status(const Append& append)>;

  void AddString(std::string_view key, std::string_view value);
  void AddInt(std::string_view key, int64_t value);             // u32, as llama.cpp expects sizes and ids
  void AddNumber(std::string_view key, double value);           // f32
  void AddValue(std::string_view key, const GgufValue& value);  // as it lies in another file
  void AddTensor(std::string name, DType dtype, std::vector<int64_t> shape, Produce produce);

  // To a file beside `path` first, which then takes its place: whoever has `path` mapped keeps the old bytes.
  // FailedPrecondition with the system's reason.
  absl::Status Write(const std::string& path) const;

 private:
  struct Tensor {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;  // row-major
    uint64_t bytes;
    Produce produce;
  };

  void AddKey(std::string_view key, GgufType type);

  std::string metadata_;
  uint64_t entries_ = 0;
  std::vector<Tensor> tensors_;
};

}  // namespace atp

#endif  // ATP_ENGINE_GGUF_WRITER_H_
