// The tokenizer and the chat template that a GGUF file carries (its keys tokenizer.*).
#ifndef ATP_ENGINE_GGUF_TOKENIZER_H_
#define ATP_ENGINE_GGUF_TOKENIZER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/gguf.h"
#include "engine/tokenizer.h"

namespace atp {

// Whether the file has one; one without (as `atp quantize` writes it into a directory) has the directory's.
bool HasGgufTokenizer(const GgufFile& file);

// tokenizer.ggml.model "llama" (SentencePiece) or "gpt2" (byte-level BPE, split into words as
// tokenizer.ggml.pre says). InvalidArgument is one line: file, key, expected, found.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadGgufTokenizer(const GgufFile& file);

// tokenizer.chat_template (Jinja), "" if none.
absl::StatusOr<std::string> GgufChatTemplate(const GgufFile& file);

}  // namespace atp

#endif  // ATP_ENGINE_GGUF_TOKENIZER_H_
