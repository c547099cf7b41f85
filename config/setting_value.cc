// Values of settings: text to member, member to text, and what is allowed.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <optional>

#include "config/settings.h"

namespace atp {
namespace {

struct Suffix {
  std::string_view name;
  double factor;
};

// Binary first: these are also the units that values are written in, largest first.
constexpr Suffix kByteUnits[] = {{"TiB", 0x1p40}, {"GiB", 0x1p30}, {"MiB", 0x1p20}, {"KiB", 0x1p10}};
constexpr Suffix kMoreByteSuffixes[] = {{"Ti", 0x1p40}, {"Gi", 0x1p30}, {"Mi", 0x1p20}, {"Ki", 0x1p10},
                                        {"TB", 1e12},   {"GB", 1e9},    {"MB", 1e6},    {"kB", 1e3},
                                        {"KB", 1e3},    {"B", 1}};
constexpr Suffix kTimeUnits[] = {{"h", 3600e3}, {"m", 60e3}, {"s", 1e3}, {"ms", 1}};

std::string_view Trim(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

std::optional<double> SuffixFactor(std::string_view suffix, SettingUnit unit) {
  if (suffix.empty()) return 1.0;
  const auto find = [&](std::span<const Suffix> units) -> std::optional<double> {
    for (const Suffix& u : units) {
      if (u.name == suffix) return u.factor;
    }
    return std::nullopt;
  };
  if (unit == SettingUnit::kMilliseconds) return find(kTimeUnits);
  if (unit != SettingUnit::kBytes) return std::nullopt;
  if (const auto factor = find(kByteUnits)) return factor;
  return find(kMoreByteSuffixes);
}

std::optional<double> ParseNumber(std::string_view text) {
  double value = 0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), value, std::chars_format::general);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
  return value;
}

// Integers up to 2^53, with the unit's suffixes; "1.5GiB" is an integer number of bytes, "1.5" is not an
// integer.
std::optional<double> ParseInteger(std::string_view text, SettingUnit unit) {
  text = Trim(text);
  const size_t digits = text.find_last_of("0123456789.");
  if (digits == std::string_view::npos) return std::nullopt;
  const auto number = ParseNumber(Trim(text.substr(0, digits + 1)));
  const auto factor = SuffixFactor(Trim(text.substr(digits + 1)), unit);
  if (!number || !factor) return std::nullopt;
  const double value = *number * *factor;
  if (value != std::floor(value) || std::abs(value) > 0x1p53) return std::nullopt;
  return value;
}

std::optional<bool> ParseBool(std::string_view text) {
  if (text == "true" || text == "True" || text == "yes" || text == "on") return true;
  if (text == "false" || text == "False" || text == "no" || text == "off") return false;
  return std::nullopt;
}

bool IsControlFree(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
}

bool AllowedString(const Setting& setting, std::string_view text) {
  if (!IsControlFree(text)) return false;
  if (setting.choices.empty()) return setting.may_be_empty || !text.empty();
  return std::find(setting.choices.begin(), setting.choices.end(), text) != setting.choices.end();
}

bool AllowedNumber(const Setting& setting, double value) {
  if (!(value >= setting.min && value <= setting.max)) return false;
  if (setting.min_excluded && value == setting.min) return false;
  return setting.multiple_of == 1 || std::fmod(value, setting.multiple_of) == 0;
}

std::string FormatInteger(int64_t value, SettingUnit unit) {
  std::span<const Suffix> units;
  if (unit == SettingUnit::kBytes) units = kByteUnits;
  if (unit == SettingUnit::kMilliseconds) units = kTimeUnits;
  for (const Suffix& u : units) {
    const auto factor = static_cast<int64_t>(u.factor);
    if (value != 0 && value % factor == 0) return std::to_string(value / factor) + std::string(u.name);
  }
  return std::to_string(value);
}

std::string FormatDouble(double value) {
  char text[32];
  const auto result = std::to_chars(text, text + sizeof(text), value);
  return std::string(text, result.ptr);
}

// Plain where YAML reads it back as the same string, else double-quoted.
std::string FormatString(std::string_view text) {
  constexpr std::string_view kPlain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-";
  const bool is_null = text.empty() || text == "null" || text == "Null" || text == "NULL";
  const bool plain = !is_null && text[0] != '-' && text.find_first_not_of(kPlain) == std::string_view::npos;
  if (plain) return std::string(text);
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

std::string Range(const Setting& setting) {
  const auto bound = [&](double value) {
    if (value != std::floor(value)) return FormatDouble(value);
    return FormatInteger(static_cast<int64_t>(value), setting.unit);
  };
  std::string out = setting.min_excluded ? "(" : "[";
  out += bound(setting.min);
  out += ", ";
  out += bound(setting.max);
  return out + "]";
}

std::string NotAllowed(const Setting& setting) { return "is not " + AllowedValues(setting); }

// One overload per type of member: reads `value` into it. The result says whether it is allowed.
bool Read(const Setting& setting, const SettingValue& value, std::string* member) {
  if (value.is_list || !AllowedString(setting, value.scalars[0])) return false;
  *member = value.scalars[0];
  return true;
}

bool Read(const Setting& setting, const SettingValue& value, std::vector<std::string>* member) {
  if (!value.is_list) return false;
  for (const std::string& element : value.scalars) {
    if (!AllowedString(setting, element)) return false;
  }
  *member = value.scalars;
  return true;
}

bool Read(const Setting&, const SettingValue& value, bool* member) {
  const auto parsed = value.is_list ? std::nullopt : ParseBool(value.scalars[0]);
  if (parsed) *member = *parsed;
  return parsed.has_value();
}

bool Read(const Setting& setting, const SettingValue& value, double* member) {
  const auto parsed = value.is_list ? std::nullopt : ParseNumber(value.scalars[0]);
  if (!parsed || !AllowedNumber(setting, *parsed)) return false;
  *member = *parsed;
  return true;
}

template <typename Integer>
bool Read(const Setting& setting, const SettingValue& value, Integer* member) {
  const auto parsed = value.is_list ? std::nullopt : ParseInteger(value.scalars[0], setting.unit);
  if (!parsed || !AllowedNumber(setting, *parsed)) return false;
  *member = static_cast<Integer>(*parsed);
  return true;
}

bool IsAllowed(const Setting& setting, const std::string& value) { return AllowedString(setting, value); }
bool IsAllowed(const Setting& setting, const std::vector<std::string>& value) {
  return std::all_of(value.begin(), value.end(),
                     [&](const std::string& v) { return AllowedString(setting, v); });
}
bool IsAllowed(const Setting&, bool) { return true; }
template <typename Number>
bool IsAllowed(const Setting& setting, Number value) {
  return AllowedNumber(setting, static_cast<double>(value));
}

std::string Format(const Setting&, const std::string& value) { return FormatString(value); }
std::string Format(const Setting&, const std::vector<std::string>& value) {
  std::string out = "[";
  for (const std::string& element : value) out += (out.size() > 1 ? ", " : "") + FormatString(element);
  return out + "]";
}
std::string Format(const Setting&, bool value) { return value ? "true" : "false"; }
std::string Format(const Setting&, double value) { return FormatDouble(value); }
std::string Format(const Setting& setting, int64_t value) { return FormatInteger(value, setting.unit); }
std::string Format(const Setting& setting, int value) { return FormatInteger(value, setting.unit); }

std::string Allowed(const Setting& setting, const std::string*) {
  std::string out;
  for (const std::string_view choice : setting.choices) {
    out += out.empty() ? "" : " | ";
    out += choice;
  }
  if (!out.empty()) return out;
  return setting.may_be_empty ? "one line of text" : "one line of text, not empty";
}
std::string Allowed(const Setting&, const std::vector<std::string>*) {
  return "a list of texts that are not empty, as [a, b]";
}
std::string Allowed(const Setting&, const bool*) { return "true | false"; }
std::string Allowed(const Setting& setting, const double*) { return "a number in " + Range(setting); }
template <typename Integer>
std::string Allowed(const Setting& setting, const Integer*) {
  switch (setting.unit) {
    case SettingUnit::kBytes:
      return "a size in " + Range(setting) + ", as 4GiB or in bytes";
    case SettingUnit::kMilliseconds:
      return "a duration in " + Range(setting) + ", as 30s or in milliseconds";
    case SettingUnit::kNone:
      break;
  }
  return setting.multiple_of == 1
             ? "an integer in " + Range(setting)
             : "a multiple of " + std::to_string(setting.multiple_of) + " in " + Range(setting);
}

}  // namespace

std::string SetSetting(const Setting& setting, const SettingValue& value, Config* config) {
  const bool allowed =
      std::visit([&](auto member) { return Read(setting, value, member(*config)); }, setting.member);
  return allowed ? "" : NotAllowed(setting);
}

std::string CheckSetting(const Setting& setting, const Config& config) {
  Config copy = config;  // members are reached through a mutable Config
  const bool allowed =
      std::visit([&](auto member) { return IsAllowed(setting, *member(copy)); }, setting.member);
  return allowed ? "" : NotAllowed(setting);
}

std::string FormatSetting(const Setting& setting, const Config& config) {
  Config copy = config;
  return std::visit([&](auto member) { return Format(setting, *member(copy)); }, setting.member);
}

std::string AllowedValues(const Setting& setting) {
  Config any;
  return std::visit([&](auto member) { return Allowed(setting, member(any)); }, setting.member);
}

}  // namespace atp
