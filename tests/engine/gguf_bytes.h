// GGUF files put together piece by piece, so that a test states what is wrong with one.
#ifndef ATP_TESTS_ENGINE_GGUF_BYTES_H_
#define ATP_TESTS_ENGINE_GGUF_BYTES_H_

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/gguf.h"

namespace atp {

template <typename T>
std::string Raw(T value) {
  char bytes[sizeof(value)];
  std::memcpy(bytes, &value, sizeof(value));
  return std::string(bytes, sizeof(value));
}
inline std::string RawString(std::string_view text) { return Raw<uint64_t>(text.size()) + std::string(text); }

class GgufBytes {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;
  std::string data;  // of all tensors

  GgufBytes& Entry(std::string_view key, GgufType type, const std::string& value) {
    metadata_ += RawString(key) + Raw(static_cast<uint32_t>(type)) + value;
    ++entries;
    return *this;
  }
  GgufBytes& Int(std::string_view key, uint32_t value) { return Entry(key, GgufType::kU32, Raw(value)); }
  GgufBytes& Float(std::string_view key, float value) { return Entry(key, GgufType::kF32, Raw(value)); }
  GgufBytes& Text(std::string_view key, std::string_view value) {
    return Entry(key, GgufType::kString, RawString(value));
  }
  GgufBytes& Array(std::string_view key, GgufType type, uint64_t count, const std::string& elements) {
    return Entry(key, GgufType::kArray, Raw(static_cast<uint32_t>(type)) + Raw(count) + elements);
  }
  GgufBytes& Texts(std::string_view key, const std::vector<std::string>& values) {
    std::string elements;
    for (const std::string& value : values) elements += RawString(value);
    return Array(key, GgufType::kString, values.size(), elements);
  }
  template <typename T>
  GgufBytes& Numbers(std::string_view key, GgufType type, const std::vector<T>& values) {
    std::string elements;
    for (const T value : values) elements += Raw(value);
    return Array(key, type, values.size(), elements);
  }
  // dims as in the file: the row's length first.
  GgufBytes& Tensor(std::string_view name, const std::vector<uint64_t>& dims, uint32_t type,
                    uint64_t offset) {
    infos_ += RawString(name) + Raw(static_cast<uint32_t>(dims.size()));
    for (const uint64_t dim : dims) infos_ += Raw(dim);
    infos_ += Raw(type) + Raw(offset);
    ++tensors;
    return *this;
  }

  uint64_t entries = 0;
  uint64_t tensors = 0;

  std::string Bytes() const {
    std::string bytes = "GGUF" + Raw(version) + Raw(tensors) + Raw(entries) + metadata_ + infos_;
    bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
    return bytes + data;
  }

 private:
  std::string metadata_, infos_;
};

}  // namespace atp

#endif  // ATP_TESTS_ENGINE_GGUF_BYTES_H_
