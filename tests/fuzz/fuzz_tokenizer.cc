// Tokenizer files from anyone (tokenizer.json, tiktoken ranks, SentencePiece models), and texts through what
// loads: whatever the bytes, an answer and no crash. Seeds: tests/engine/tokenizer_vectors and
// models/default/tokenizer.model.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "engine/tokenizer.h"
#include "engine/tokenizer_config.h"
#include "engine/utf8.h"

namespace {

void Check(const atp::Tokenizer& tokenizer, std::string_view text) {
  for (bool parse_special : {false, true}) {
    const std::vector<atp::TokenId> ids = tokenizer.Encode(text, true, parse_special);
    for (atp::TokenId id : ids) {
      if (id < 0 || id >= tokenizer.vocab_size()) std::abort();
    }
    if (!atp::IsValidUtf8(tokenizer.Decode(ids, parse_special))) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const std::string_view text = bytes.substr(size - std::min<size_t>(size, 96));
  auto tokenizer = !bytes.empty() && bytes[0] == '{'    ? atp::ParseTokenizerJson(bytes, "fuzz", {})
                   : atp::LooksLikeTiktokenRanks(bytes) ? atp::ParseTiktokenRanks(bytes, "fuzz", {})
                                                        : atp::ParseSentencePiece(bytes, "fuzz", {});
  if (tokenizer.ok()) Check(**tokenizer, text);
  return 0;
}
