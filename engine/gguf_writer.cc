#include "engine/gguf_writer.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"

namespace atp {
namespace {

constexpr uint64_t kAlignment = 32;  // the default, so that no key need say it

template <typename T>
void AppendNumber(T value, std::string* out) {
  char bytes[sizeof(value)];
  std::memcpy(bytes, &value, sizeof(value));
  out->append(bytes, sizeof(value));
}

void AppendString(std::string_view text, std::string* out) {
  AppendNumber<uint64_t>(text.size(), out);
  out->append(text);
}

uint64_t Padded(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

absl::Status CannotWrite(const std::string& path) {
  return absl::FailedPreconditionError(absl::StrCat(path, ": cannot be written: ", strerror(errno)));
}

}  // namespace

void GgufWriter::AddKey(std::string_view key, GgufType type) {
  AppendString(key, &metadata_);
  AppendNumber(static_cast<uint32_t>(type), &metadata_);
  ++entries_;
}

void GgufWriter::AddString(std::string_view key, std::string_view value) {
  AddKey(key, GgufType::kString);
  AppendString(value, &metadata_);
}

void GgufWriter::AddInt(std::string_view key, int64_t value) {
  AddKey(key, GgufType::kU32);
  AppendNumber(static_cast<uint32_t>(value), &metadata_);
}

void GgufWriter::AddNumber(std::string_view key, double value) {
  AddKey(key, GgufType::kF32);
  AppendNumber(static_cast<float>(value), &metadata_);
}

void GgufWriter::AddValue(std::string_view key, const GgufValue& value) {
  AddKey(key, value.is_array ? GgufType::kArray : value.type);
  if (value.is_array) {
    AppendNumber(static_cast<uint32_t>(value.type), &metadata_);
    AppendNumber(value.count, &metadata_);
  }
  metadata_.append(reinterpret_cast<const char*>(value.bytes.data()), value.bytes.size());
}

void GgufWriter::AddTensor(std::string name, DType dtype, std::vector<int64_t> shape, Produce produce) {
  uint64_t bytes = RowBytes(dtype, shape.back());
  for (size_t i = 0; i + 1 < shape.size(); ++i) bytes *= static_cast<uint64_t>(shape[i]);
  tensors_.push_back({std::move(name), dtype, std::move(shape), bytes, std::move(produce)});
}

absl::Status GgufWriter::Write(const std::string& path) const {
  std::string head = "GGUF";
  AppendNumber<uint32_t>(3, &head);
  AppendNumber<uint64_t>(tensors_.size(), &head);
  AppendNumber<uint64_t>(entries_, &head);
  head += metadata_;
  uint64_t offset = 0;
  for (const Tensor& tensor : tensors_) {
    AppendString(tensor.name, &head);
    AppendNumber(static_cast<uint32_t>(tensor.shape.size()), &head);
    for (auto it = tensor.shape.rbegin(); it != tensor.shape.rend(); ++it) AppendNumber<uint64_t>(*it, &head);
    AppendNumber(GgufTypeOf(tensor.dtype), &head);
    AppendNumber(offset, &head);
    offset += Padded(tensor.bytes);
  }
  head.resize(Padded(head.size()));

  const std::string partial = path + ".partial";
  std::ofstream file(partial, std::ios::binary | std::ios::trunc);
  file.write(head.data(), static_cast<std::streamsize>(head.size()));
  absl::Status status;
  for (const Tensor& tensor : tensors_) {
    if (!file || !status.ok()) break;
    uint64_t written = 0;
    status = tensor.produce([&](const void* data, size_t bytes) {
      file.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
      written += bytes;
    });
    const std::string padding(Padded(written) - written, '\0');
    file.write(padding.data(), static_cast<std::streamsize>(padding.size()));
  }
  file.close();
  if (status.ok() && !file) status = CannotWrite(partial);
  if (status.ok() && std::rename(partial.c_str(), path.c_str()) != 0) status = CannotWrite(path);
  if (!status.ok()) std::remove(partial.c_str());
  return status;
}

}  // namespace atp
