#include "engine/model_path.h"

#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"

namespace atp {
namespace {

namespace fs = std::filesystem;

}  // namespace

absl::StatusOr<std::string> FindGguf(const std::string& model) {
  std::error_code error;
  const fs::path path(model);
  if (fs::is_regular_file(path, error)) return model;
  if (!fs::is_directory(path, error)) {
    if (path.extension() != ".gguf") return std::string();
    return absl::NotFoundError(absl::StrCat(model, ": no such file"));
  }
  for (const char* name : {"model.safetensors", "model.safetensors.index.json"}) {
    if (fs::exists(path / name, error)) return std::string();
  }
  std::string found;
  for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() != ".gguf") continue;
    if (!found.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(model, ": expected one .gguf file, found ", found,
                                                     " and ", it->path().string(), "; name one of them"));
    }
    found = it->path().string();
  }
  return found;
}

std::string ModelDirectory(const std::string& model) {
  std::error_code error;
  const fs::path path(model);
  if (fs::is_directory(path, error)) return model;
  return path.has_parent_path() ? path.parent_path().string() : ".";
}

}  // namespace atp
