#include "config/config_loader.h"

#include <fstream>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>

#include "absl/strings/str_cat.h"
#include "config/settings.h"
#include "yaml-cpp/eventhandler.h"
#include "yaml-cpp/exceptions.h"
#include "yaml-cpp/mark.h"
#include "yaml-cpp/parser.h"

namespace atp {
namespace {

constexpr size_t kMaxFileBytes = 256 << 10;
constexpr size_t kMaxShownBytes = 80;  // of a value, in an error
constexpr int kMaxProblems = 20;       // reported at once

// Strings of the standard library: absl::StrCat of this Abseil takes its own string_view type.
std::string Str(std::string_view text) { return std::string(text); }

std::string Shown(const Setting& setting, const SettingValue& value) {
  if (setting.secret) return "the value (not shown)";
  std::string out;
  for (const std::string& scalar : value.scalars) absl::StrAppend(&out, out.empty() ? "" : ", ", scalar);
  if (value.is_list) out = "[" + out + "]";
  if (out.size() > kMaxShownBytes) out = out.substr(0, kMaxShownBytes) + "...";
  return out.empty() ? "\"\"" : out;
}

std::string UnknownKey(std::string_view key) {
  return absl::StrCat(Str(key.substr(0, kMaxShownBytes)), ": no such setting; the nearest is ",
                      Str(NearestKey(key)));
}

// Ends the parse; caught in this file.
struct Rejected : std::runtime_error {
  Rejected(const YAML::Mark& mark, const std::string& what) : std::runtime_error(what), line(mark.line + 1) {}
  int line;
};

// The shape of a configuration: a map of sections, each a map of keys, each a scalar or a list of scalars.
// Everything deeper ends the parse, so neither depth nor aliases cost anything.
class Handler : public YAML::EventHandler {
 public:
  // `bare_value`: the document is one value, of a setting that the caller knows (--set).
  Handler(bool bare_value, std::string source, Config* config)
      : depth_(bare_value ? kValue : kTop),
        bare_value_(bare_value),
        source_(std::move(source)),
        config_(config) {}

  const std::string& problems() const { return problems_; }
  const std::optional<SettingValue>& bare_value() const { return value_; }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    throw Rejected(mark, "aliases (*name) are not supported; write the value out, or quote it");
  }

  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override {
    if (depth_ == kTop) return;  // an empty file
    if (depth_ == kSection) {    // a section whose keys are all commented out
      CheckSection(mark);
      depth_ = kSections;
      return;
    }
    if (depth_ == kValue && bare_value_) {
      value_ = SettingValue{false, {""}};
      return;
    }
    throw Rejected(mark, absl::StrCat(Path(), " has no value; an empty text is written \"\""));
  }

  void OnScalar(const YAML::Mark& mark, const std::string&, YAML::anchor_t,
                const std::string& text) override {
    switch (depth_) {
      case kTop:
        throw Rejected(mark, "expected sections, as 'server:', with their settings below");
      case kSections:
        section_ = text;
        depth_ = kSection;
        return;
      case kSection:
        throw Rejected(mark, absl::StrCat(section_, " is a section: its settings go below it, indented"));
      case kKeys:
        key_ = text;
        depth_ = kValue;
        return;
      case kValue:
        Accept(mark, SettingValue{false, {text}});
        return;
      case kList:
        value_->scalars.push_back(text);
        return;
    }
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {
    if (depth_ != kValue) throw Rejected(mark, "a list is not expected here");
    depth_ = kList;
    list_mark_ = mark;
    value_ = SettingValue{true, {}};
  }
  void OnSequenceEnd() override { Accept(list_mark_, *value_); }

  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {
    if (depth_ == kTop) {
      depth_ = kSections;
    } else if (depth_ == kSection) {
      CheckSection(mark);
      depth_ = kKeys;
    } else {
      throw Rejected(mark, absl::StrCat(depth_ == kValue ? Path() : "this",
                                        " is a value, not a section; quote a text that has a colon"));
    }
  }
  void OnMapEnd() override { depth_ = depth_ == kKeys ? kSections : kTop; }

 private:
  enum Depth { kTop, kSections, kSection, kKeys, kValue, kList };

  std::string Path() const { return bare_value_ ? "it" : absl::StrCat(section_, ".", key_); }

  void Problem(const YAML::Mark& mark, const std::string& what) {
    if (++count_ > kMaxProblems) throw Rejected(mark, "too many errors");
    absl::StrAppend(&problems_, source_, ":", mark.line + 1, ": ", what, "\n");
  }

  void CheckSection(const YAML::Mark& mark) {
    const std::string prefix = section_ + ".";
    for (const Setting& setting : SettingsTable()) {
      if (setting.key.substr(0, prefix.size()) == prefix) return;
    }
    std::set<std::string> names;
    for (const Setting& setting : SettingsTable())
      names.insert(Str(setting.key.substr(0, setting.key.find('.'))));
    std::string known;
    for (const std::string& name : names) absl::StrAppend(&known, known.empty() ? "" : ", ", name);
    throw Rejected(mark,
                   absl::StrCat(section_.substr(0, kMaxShownBytes), ": no such section; there are ", known));
  }

  void Accept(const YAML::Mark& mark, const SettingValue& value) {
    if (bare_value_) {
      value_ = value;
      return;
    }
    depth_ = kKeys;
    const std::string path = Path();
    const Setting* setting = FindSetting(path);
    if (setting == nullptr) return Problem(mark, UnknownKey(path));
    if (!seen_.insert(path).second) return Problem(mark, absl::StrCat(path, " is set twice"));
    const std::string wrong = SetSetting(*setting, value, config_);
    if (!wrong.empty()) Problem(mark, absl::StrCat(path, ": ", Shown(*setting, value), " ", wrong));
  }

  Depth depth_;
  const bool bare_value_;
  const std::string source_;
  Config* config_;
  std::string section_, key_;
  std::set<std::string> seen_;
  std::optional<SettingValue> value_;
  YAML::Mark list_mark_;
  std::string problems_;
  int count_ = 0;
};

// Feeds the one document of `yaml` to `handler`. Problems that end the parse are returned, the others are the
// handler's.
std::string Parse(std::string_view yaml, const std::string& source, Handler* handler) {
  // yaml-cpp notices a quote that is never closed only when the text does not end in a line break.
  const size_t end = yaml.find_last_not_of(" \t\r\n");
  yaml = yaml.substr(0, end == std::string_view::npos ? 0 : end + 1);
  try {
    std::istringstream stream{std::string(yaml)};
    YAML::Parser parser(stream);
    if (parser.HandleNextDocument(*handler) && parser) {
      Config ignored;
      Handler rest(false, source, &ignored);
      if (parser.HandleNextDocument(rest)) return absl::StrCat(source, ": more than one YAML document\n");
    }
    return "";
  } catch (const Rejected& e) {
    return absl::StrCat(source, ":", e.line, ": ", e.what(), "\n");
  } catch (const YAML::Exception& e) {
    return absl::StrCat(source, ":", e.mark.line + 1, ": not YAML: ", e.msg, "\n");
  } catch (const std::exception& e) {
    return absl::StrCat(source, ": not YAML: ", e.what(), "\n");
  }
}

absl::Status ToStatus(std::string problems) {
  if (problems.empty()) return absl::OkStatus();
  problems.pop_back();  // the last newline
  return absl::InvalidArgumentError(problems);
}

}  // namespace

absl::Status LoadConfigFile(const std::string& path, Config* config) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened; --config names a YAML file"));
  std::string text(kMaxFileBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad() || (file.gcount() == 0 && !file.eof())) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read; --config names a YAML file"));
  }
  text.resize(static_cast<size_t>(file.gcount()));
  return LoadConfigYaml(text, path, config);
}

absl::Status LoadConfigYaml(std::string_view yaml, const std::string& source, Config* config) {
  if (yaml.size() > kMaxFileBytes) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": larger than ", kMaxFileBytes, " bytes"));
  }
  Config updated = *config;  // errors leave `config` as it was
  Handler handler(false, source, &updated);
  const std::string fatal = Parse(yaml, source, &handler);
  const absl::Status status = ToStatus(handler.problems() + fatal);
  if (status.ok()) *config = std::move(updated);
  return status;
}

absl::Status ApplySetting(std::string_view assignment, Config* config) {
  const size_t equals = assignment.find('=');
  if (equals == std::string_view::npos || equals == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--set ", Str(assignment.substr(0, kMaxShownBytes)), ": expected section.key=value"));
  }
  const std::string_view key = assignment.substr(0, equals);
  const Setting* setting = FindSetting(key);
  if (setting == nullptr) return absl::InvalidArgumentError(absl::StrCat("--set ", UnknownKey(key)));
  const std::string_view text = assignment.substr(equals + 1);
  if (text.size() > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("--set ", Str(key), ": larger than ", kMaxFileBytes, " bytes"));
  }

  const std::string source = absl::StrCat("--set ", Str(key));
  Handler handler(true, source, nullptr);
  std::string problem = Parse(text, source, &handler);
  if (!problem.empty()) return ToStatus(std::move(problem));
  const SettingValue value = handler.bare_value().value_or(SettingValue{false, {""}});
  const std::string wrong = SetSetting(*setting, value, config);
  if (wrong.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(source, ": ", Shown(*setting, value), " ", wrong));
}

std::vector<SettingHelp> AllSettings() {
  std::vector<SettingHelp> help;
  const Config defaults;
  for (const Setting& setting : SettingsTable()) {
    help.push_back({Str(setting.key), FormatSetting(setting, defaults),
                    absl::StrCat(Str(setting.meaning), "; ", AllowedValues(setting))});
  }
  return help;
}

}  // namespace atp
