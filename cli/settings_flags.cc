#include "cli/settings_flags.h"

#include <algorithm>

#include "CLI/CLI.hpp"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/command.h"
#include "config/config_loader.h"
#include "kernels/backend_factory.h"

namespace atp {
namespace {

SettingHelp HelpOf(const std::string& key) {
  for (SettingHelp& help : AllSettings()) {
    if (help.key == key) return help;
  }
  return {};
}

// A flag's value is text, not YAML: quoted, it means itself.
std::string Quoted(const std::string& value) {
  std::string out = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

// The factory knows what this machine can run; asking it here makes a wrong name a bad argument.
absl::Status CheckIsa(const std::string& isa) {
  const std::vector<std::string> names = CpuIsaNames();
  if (isa == "auto" || std::find(names.begin(), names.end(), isa) != names.end()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "backend.cpu_isa: ", isa, " is not auto or one that this machine has: ", absl::StrJoin(names, ", ")));
}

}  // namespace

SettingsFlags::SettingsFlags(CLI::App* app) : app_(app) {
  app->add_option("--config", config_file_, "YAML file with settings, as config/cpu.yaml (default: none)")
      ->option_text("FILE")
      ->check(NotEmpty);
  // One value per --set, so that it never swallows what follows it.
  app->add_option("--set", assignments_,
                  "any setting, as --set server.max_connections=64; repeatable (docs/configuration.md)")
      ->option_text("KEY=VALUE")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

void SettingsFlags::Add(const std::string& flag, const std::string& key) {
  const SettingHelp help = HelpOf(key);
  flags_.push_back({flag, key, "", false});
  Flag* const stored = &flags_.back();
  app_->add_option_function<std::string>(
          flag,
          [stored](const std::string& value) {
            stored->value = value;
            stored->given = true;
          },
          absl::StrCat(help.meaning, " (default: ", help.default_value, ")"))
      ->option_text("VALUE")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
}

void SettingsFlags::AddModelFlags() {
  Add("--model", "model.path");
  Add("--weight-dtype", "model.weight_dtype");
  Add("--device", "backend.device");
  Add("--threads", "backend.threads");
  Add("--cpu-isa", "backend.cpu_isa");
}

absl::StatusOr<Config> SettingsFlags::Resolve() const {
  Config config;
  if (!config_file_.empty()) {
    if (absl::Status s = LoadConfigFile(config_file_, &config); !s.ok()) return s;
  }
  for (const Flag& flag : flags_) {
    if (!flag.given) continue;
    const absl::Status s = ApplySetting(absl::StrCat(flag.key, "=", Quoted(flag.value)), &config);
    if (!s.ok()) {
      // The user wrote --http-port, not --set server.http_port.
      const std::string message(s.message());
      const std::string prefix = absl::StrCat("--set ", flag.key);
      return absl::InvalidArgumentError(absl::StartsWith(message, prefix)
                                            ? absl::StrCat(flag.name, message.substr(prefix.size()))
                                            : message);
    }
  }
  for (const std::string& assignment : assignments_) {
    if (absl::Status s = ApplySetting(assignment, &config); !s.ok()) return s;
  }
  if (absl::Status s = Validate(config); !s.ok()) return s;
  if (absl::Status s = CheckIsa(config.backend.cpu_isa); !s.ok()) return s;
  return config;
}

}  // namespace atp
