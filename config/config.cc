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

void CheckAtp(const Config& config, std::string* problems) {
  const AtpConfig& atp = config.atp;
  const int block = config.kv_cache.block_tokens;
  const struct {
    const char* key;
    int tokens;
  } lengths[] = {{"atp.segment_tokens", atp.segment_tokens}, {"atp.window_tokens", atp.window_tokens}};
  const bool compresses = atp.ratio > 0 || (atp.preset != "exact" && atp.preset != "auto");
  for (const auto& length : lengths) {
    if (!compresses || block <= 0 || length.tokens % 16 != 0 || length.tokens % block == 0)
      continue;  // or told already
    absl::StrAppend(problems, length.key, ": ", length.tokens, " is not a multiple of ", block,
                    " (kv_cache.block_tokens)\n");
  }
  if (atp.sink_tokens > atp.segment_tokens) {
    absl::StrAppend(problems, "atp.sink_tokens: ", atp.sink_tokens, " is more than ", atp.segment_tokens,
                    " (atp.segment_tokens)\n");
  }
  if (atp.max_principal_keys > 0 && atp.max_principal_keys < atp.sink_tokens) {
    absl::StrAppend(problems, "atp.max_principal_keys: ", atp.max_principal_keys, " is less than ",
                    atp.sink_tokens, " (atp.sink_tokens); 0 is no cap\n");
  }
  if (atp.bits != 0 && atp.bits != 16 && atp.bits != 8 && atp.bits != 4) {
    absl::StrAppend(problems, "atp.bits: ", atp.bits, " is not 0, 16, 8 or 4\n");
  }
  if (atp.preset != "exact") return;
  if (atp.ratio > 0 && atp.ratio < 1) {
    absl::StrAppend(problems, "atp.ratio: ", atp.ratio,
                    " contradicts atp.preset: exact; leave one of them out\n");
  }
  if (atp.bits == 8 || atp.bits == 4) {
    absl::StrAppend(problems, "atp.bits: ", atp.bits,
                    " contradicts atp.preset: exact; leave one of them out\n");
  }
  if (atp.max_principal_keys > 0) {
    absl::StrAppend(problems, "atp.max_principal_keys: ", atp.max_principal_keys,
                    " contradicts atp.preset: exact; leave one of them out\n");
  }
}

}  // namespace

absl::Status Validate(const Config& config) {
  std::string problems;
  for (const Setting& setting : SettingsTable()) {
    const std::string problem = CheckSetting(setting, config);
    if (problem.empty()) continue;
    absl::StrAppend(&problems, std::string(setting.key), ": ",
                    setting.secret ? "the value (not shown)" : FormatSetting(setting, config), " ", problem,
                    "\n");
  }
  CheckPorts(config.server, &problems);
  CheckAtp(config, &problems);
  if (problems.empty()) return absl::OkStatus();
  problems.pop_back();
  return absl::InvalidArgumentError(problems);
}

}  // namespace atp
