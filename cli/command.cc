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

}  // namespace atp
