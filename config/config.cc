#include "config/config.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "config/settings.h"

namespace atp {
namespace {

// Two services cannot listen on one port; 0 asks for any free one.
void CheckPorts(const ServerConfig& server, std::string* problems) {
  const struct {
    const char* key;
    int port;
  } ports[] = {{"server.http_port", server.http_port},
               {"server.grpc_port", server.grpc_port},
               {"server.metrics_port", server.metrics_port}};
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < i; ++j) {
      if (ports[i].port == 0 || ports[i].port != ports[j].port) continue;
      absl::StrAppend(problems, ports[i].key, ": ", ports[i].port, " is also ", ports[j].key,
                      "; give each its own port\n");
    }
  }
}

}  // namespace

absl::Status Validate(const Config& config) {
  std::string problems;
  for (const Setting& setting : SettingsTable()) {
    const std::string problem = CheckSetting(setting, config);
    if (problem.empty()) continue;
    absl::StrAppend(&problems, std::string(setting.key), ": ", FormatSetting(setting, config), " ", problem,
                    "\n");
  }
  CheckPorts(config.server, &problems);
  if (problems.empty()) return absl::OkStatus();
  problems.pop_back();
  return absl::InvalidArgumentError(problems);
}

}  // namespace atp
