// Any bytes as a safetensors file and as its index: refused in one line, or tensors that cover the data
// exactly.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>

#include "engine/safetensors_header.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

void RequireOneLine(const absl::Status& status) {
  const std::string message(status.message());
  Require(message.find('\n') == std::string::npos && message.rfind("f: ", 0) == 0 && message.size() < 2000);
}

void ParseAsFile(std::span<const std::byte> file) {
  const absl::StatusOr<atp::SafetensorsTensors> tensors = atp::ParseSafetensors(file, "f");
  if (!tensors.ok()) return RequireOneLine(tensors.status());
  size_t bytes = 0;
  for (const auto& [name, tensor] : *tensors) {
    Require(tensor.data.empty() || (tensor.data.data() >= file.data() &&
                                    tensor.data.data() + tensor.data.size() <= file.data() + file.size()));
    Require(tensor.shape.size() <= atp::kMaxSafetensorsRank);
    bytes += tensor.data.size();
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < 8; ++i) header_bytes |= std::to_integer<uint64_t>(file[i]) << (8 * i);
  Require(bytes == file.size() - 8 - header_bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const uint8_t> input(data, size);
  ParseAsFile(std::as_bytes(input));

  // Once more with a right length in front and 64 bytes of data behind, so that the fuzzer need not find
  // those.
  std::string file(8, '\0');
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(size >> (8 * i));
  file.append(reinterpret_cast<const char*>(data), size).append(64, '\x7f');
  ParseAsFile(std::as_bytes(std::span(file.data(), file.size())));

  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const absl::StatusOr<atp::SafetensorsIndex> index = atp::ParseSafetensorsIndex(text, "f");
  if (!index.ok()) {
    RequireOneLine(index.status());
    return 0;
  }
  for (const auto& [name, shard] : *index) Require(shard.find('/') == std::string::npos && shard[0] != '.');
  return 0;
}
