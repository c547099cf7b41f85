// The table of settings: everything that YAML files, --set, help, documentation and validation know about a
// key. A new setting is a member in config.h and a row in settings.cc, nothing else.
#ifndef ATP_CONFIG_SETTINGS_H_
#define ATP_CONFIG_SETTINGS_H_

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "config/config.h"

namespace atp {

enum class SettingUnit : uint8_t { kNone, kBytes, kMilliseconds };

// How to reach a setting's member of a Config; the alternative is its type.
using SettingMember =
    std::variant<std::string* (*)(Config&), std::vector<std::string>* (*)(Config&), bool* (*)(Config&),
                 int* (*)(Config&), int64_t* (*)(Config&), double* (*)(Config&)>;

struct Setting {
  std::string_view key;  // "scheduler.max_batch_tokens"
  SettingMember member;
  std::string_view meaning;  // one line, without the range
  double min = 0;            // numbers: inclusive, and exact in a double
  double max = 0;
  bool min_excluded = false;
  int multiple_of = 1;                         // integers
  SettingUnit unit = SettingUnit::kNone;       // integers: which suffixes are read and written
  std::vector<std::string_view> choices = {};  // strings: empty means any
  bool may_be_empty = false;                   // strings, and the elements of lists
  bool secret = false;                         // no message shows the value
};

std::span<const Setting> SettingsTable();
const Setting* FindSetting(std::string_view key);
// The known key with the smallest edit distance to `key`.
std::string_view NearestKey(std::string_view key);

// A value as read: one scalar, or a list of them.
struct SettingValue {
  bool is_list = false;
  std::vector<std::string> scalars;
};

// Sets the member. Returns what is wrong ("is not an integer in [1, 65535]"), empty when nothing is.
std::string SetSetting(const Setting& setting, const SettingValue& value, Config* config);
// What is wrong with the value that `config` has; empty when nothing is.
std::string CheckSetting(const Setting& setting, const Config& config);
// The value as YAML, in the largest unit that states it exactly: "4MiB", "30s", "[]", "\"\"".
std::string FormatSetting(const Setting& setting, const Config& config);
// What is allowed: "an integer in [1, 65535]", "cpu | cuda | reference".
std::string AllowedValues(const Setting& setting);

}  // namespace atp

#endif  // ATP_CONFIG_SETTINGS_H_
