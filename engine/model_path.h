// What model.path points to: a Hugging Face directory, a GGUF file, or a directory with one GGUF file.
#ifndef ATP_ENGINE_MODEL_PATH_H_
#define ATP_ENGINE_MODEL_PATH_H_

#include <string>

#include "absl/status/statusor.h"

namespace atp {

// The GGUF file that `model` is or holds; "" where it is a Hugging Face directory (which it also is when it
// has safetensors beside a GGUF file) or nothing at all. InvalidArgument, naming two of them, for a directory
// with several.
absl::StatusOr<std::string> FindGguf(const std::string& model);

// The directory in which files about the model lie: `model` itself, or where the file is.
std::string ModelDirectory(const std::string& model);

}  // namespace atp

#endif  // ATP_ENGINE_MODEL_PATH_H_
