// Any bytes as a NumPy file of token ids: refused in one line, or rows of ids of the vocabulary that are no
// more than the file has bytes for.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "cli/npy.h"

namespace {

constexpr int64_t kVocabulary = 1000;

void Require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto rows = atp::ParseTokenIds(bytes, "f", kVocabulary);
  if (!rows.ok()) {
    const std::string message(rows.status().message());
    Require(message.rfind("f: ", 0) == 0 && message.find('\n') == std::string::npos && message.size() < 2000);
    return 0;
  }
  size_t tokens = 0;
  for (const std::vector<atp::TokenId>& row : *rows) {
    Require(row.size() == rows->front().size());
    tokens += row.size();
    for (const atp::TokenId id : row) Require(id >= 0 && id < kVocabulary);
  }
  Require(tokens > 0 && tokens <= size / sizeof(uint16_t));
  return 0;
}
