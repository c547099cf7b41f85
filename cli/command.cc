#include "cli/command.h"

#include <cstdio>
#include <string>

namespace atp {

int Failure(const absl::Status& status) {
  std::fprintf(stderr, "atp: %s\n", std::string(status.message()).c_str());
  return 1;
}

int BadArguments(const absl::Status& status) {
  std::fprintf(stderr, "atp: %s\n", std::string(status.message()).c_str());
  return 2;
}

int Printed() {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return 0;
  return Failure(absl::UnavailableError("stdout: cannot be written"));
}

std::string NotEmpty(const std::string& value) { return value.empty() ? "is empty: expected a file" : ""; }

}  // namespace atp
