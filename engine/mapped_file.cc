#include "engine/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace atp {
namespace {

absl::Status Failure(const std::string& path, absl::string_view what) {
  const int error = errno;
  const absl::StatusCode code =
      error == ENOENT ? absl::StatusCode::kNotFound : absl::StatusCode::kFailedPrecondition;
  return absl::Status(code, absl::StrCat(path, ": ", what, ": ", strerror(error)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<MappedFile>> MappedFile::Open(const std::string& path) {
  // O_NONBLOCK: opening a pipe that somebody put there must not wait for its writer.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return Failure(path, "cannot open");
  struct stat info = {};
  const bool known = fstat(fd, &info) == 0;
  if (!known || !S_ISREG(info.st_mode) || info.st_size == 0) {
    const absl::Status failure = known ? absl::InvalidArgumentError(absl::StrCat(
                                             path, ": expected a regular file, found ",
                                             S_ISREG(info.st_mode) ? "an empty one" : "something else"))
                                       : Failure(path, "cannot stat");
    close(fd);
    return failure;
  }
  const size_t bytes = static_cast<size_t>(info.st_size);
  void* data = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  absl::Status mapped = data == MAP_FAILED ? Failure(path, "cannot map") : absl::OkStatus();
  close(fd);
  if (!mapped.ok()) return mapped;
  return std::unique_ptr<MappedFile>(new MappedFile(data, bytes));
}

MappedFile::~MappedFile() { munmap(data_, bytes_); }

}  // namespace atp
