// Flags that are settings: --config, --set, and short forms such as --http-port for server.http_port. Their
// help, ranges and errors come from the table of settings.
#ifndef ATP_CLI_SETTINGS_FLAGS_H_
#define ATP_CLI_SETTINGS_FLAGS_H_

#include <deque>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "config/config.h"

namespace CLI {
class App;
}

namespace atp {

class SettingsFlags {
 public:
  // Adds --config and --set. Keep the object until the command runs: CLI11 writes into it.
  explicit SettingsFlags(CLI::App* app);
  SettingsFlags(const SettingsFlags&) = delete;

  // `flag` ("--http-port") sets `key` ("server.http_port").
  void Add(const std::string& flag, const std::string& key);
  // The flags that every command has which runs a model: --model, --weight-dtype, --device, --threads,
  // --cpu-isa.
  void AddModelFlags();

  // Defaults, then the file, then flags, then --set; checked. An error means bad arguments.
  absl::StatusOr<Config> Resolve() const;

 private:
  struct Flag {
    std::string name;
    std::string key;
    std::string value;
    bool given = false;
  };

  CLI::App* app_;
  std::string config_file_;
  std::vector<std::string> assignments_;
  std::deque<Flag> flags_;  // addresses stay
};

}  // namespace atp

#endif  // ATP_CLI_SETTINGS_FLAGS_H_
