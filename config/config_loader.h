// A YAML file and flags become a Config. An unknown key is an error that names the nearest known one.
#ifndef ATP_CONFIG_CONFIG_LOADER_H_
#define ATP_CONFIG_CONFIG_LOADER_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "config/config.h"

namespace atp {

// Starts from `config` and overwrites what the file has. Errors name file, line, key, value and what is
// allowed.
absl::Status LoadConfigFile(const std::string& path, Config* config);
absl::Status LoadConfigYaml(std::string_view yaml, const std::string& source, Config* config);

// "section.key=value", as given to --set; the value is YAML ("true", "[a, b]", 4GiB for *_bytes, 30s for
// *_ms).
absl::Status ApplySetting(std::string_view assignment, Config* config);

struct SettingHelp {
  std::string key;            // "scheduler.max_batch_tokens"
  std::string default_value;  // as YAML
  std::string meaning;        // one line, with unit and range
};
std::vector<SettingHelp> AllSettings();  // in the order of config.h

}  // namespace atp

#endif  // ATP_CONFIG_CONFIG_LOADER_H_
