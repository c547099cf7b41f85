// A whole file, memory-mapped for reading.
#ifndef ATP_ENGINE_MAPPED_FILE_H_
#define ATP_ENGINE_MAPPED_FILE_H_

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace atp {

// A file that another process truncates later is out of scope (SIGBUS), as with every mapped file.
class MappedFile {
 public:
  // NotFound, FailedPrecondition with the system's reason, InvalidArgument for what is no regular file or
  // empty.
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), bytes_}; }
  std::string_view text() const { return {static_cast<const char*>(data_), bytes_}; }

 private:
  MappedFile(void* data, size_t bytes) : data_(data), bytes_(bytes) {}

  void* data_;
  size_t bytes_;
};

}  // namespace atp

#endif  // ATP_ENGINE_MAPPED_FILE_H_
