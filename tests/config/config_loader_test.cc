#include "config/config_loader.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "config/config.h"
#include "config/settings.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace atp {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kRoot = ATP_SOURCE_DIR;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file) << path;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string Load(std::string_view yaml, Config* config) {
  const absl::Status status = LoadConfigYaml(yaml, "f.yaml", config);
  return status.ok() ? "" : std::string(status.message());
}

std::string ErrorOf(std::string_view yaml) {
  Config config;
  return Load(yaml, &config);
}

std::string Set(std::string_view assignment, Config* config) {
  const absl::Status status = ApplySetting(assignment, config);
  return status.ok() ? "" : std::string(status.message());
}

// All settings as text, to compare two configurations.
std::string Dump(const Config& config) {
  std::string out;
  for (const Setting& s : SettingsTable()) out += std::string(s.key) + "=" + FormatSetting(s, config) + "\n";
  return out;
}

TEST(ConfigLoader, ReadsEveryKindOfValue) {
  Config config;
  EXPECT_EQ(Load("model:\n  path: /models/a b\n  name: 'x: y'\n"
                 "scheduler: {max_batch_tokens: 77, default_timeout_ms: 1.5m}\n"
                 "kv_cache:\n  memory_bytes: 4GiB\n  memory_fraction: 0.25\n  prefix_cache: false\n"
                 "server:\n  cors_allowed_origins: ['*']\n  api_keys:\n    - one\n    - 2\n"
                 "limits:\n",
                 &config),
            "");
  EXPECT_EQ(config.model.path, "/models/a b");
  EXPECT_EQ(config.model.name, "x: y");
  EXPECT_EQ(config.scheduler.max_batch_tokens, 77);
  EXPECT_EQ(config.scheduler.default_timeout_ms, 90000);
  EXPECT_EQ(config.kv_cache.memory_bytes, int64_t{4} << 30);
  EXPECT_EQ(config.kv_cache.memory_fraction, 0.25);
  EXPECT_FALSE(config.kv_cache.prefix_cache);
  EXPECT_THAT(config.server.cors_allowed_origins, ElementsAre("*"));
  EXPECT_THAT(config.server.api_keys, ElementsAre("one", "2"));
  EXPECT_EQ(config.limits.max_n, Config().limits.max_n);
}

TEST(ConfigLoader, AnEmptyFileChangesNothing) {
  for (const char* yaml : {"", "\n", "# only a comment\n", "---\n", "server:\n"}) {
    Config config;
    EXPECT_EQ(Load(yaml, &config), "") << yaml;
    EXPECT_EQ(Dump(config), Dump(Config()));
  }
}

TEST(ConfigLoader, SizesAndDurations) {
  Config config;
  const std::pair<const char*, int64_t> sizes[] = {{"0", 0},
                                                   {"4096", 4096},
                                                   {"1KiB", 1024},
                                                   {"1.5MiB", 3 << 19},
                                                   {"2Gi", int64_t{2} << 30},
                                                   {"3 MB", 3000000},
                                                   {"7kB", 7000},
                                                   {"1TiB", int64_t{1} << 40}};
  for (const auto& [text, bytes] : sizes) {
    EXPECT_EQ(Set(std::string("kv_cache.memory_bytes=") + text, &config), "") << text;
    EXPECT_EQ(config.kv_cache.memory_bytes, bytes) << text;
  }
  const std::pair<const char*, int64_t> times[] = {
      {"250", 250}, {"250ms", 250}, {"1.5s", 1500}, {"2m", 120000}, {"1h", 3600000}};
  for (const auto& [text, ms] : times) {
    EXPECT_EQ(Set(std::string("server.drain_timeout_ms=") + text, &config), "") << text;
    EXPECT_EQ(config.server.drain_timeout_ms, ms) << text;
  }
  for (const char* wrong :
       {"4 GiBs", "GiB", "0.3", "1e400", "nan", "-1", "30s", "9999TiB", "0x10", "1.2.3", ""}) {
    EXPECT_THAT(Set(std::string("kv_cache.memory_bytes=") + wrong, &config), HasSubstr("a size in [0, "))
        << wrong;
  }
  EXPECT_THAT(Set("scheduler.max_batch_tokens=4KiB", &config),
              HasSubstr("4KiB is not an integer in [1, 1048576]"));
}

TEST(ConfigLoader, ErrorsNameFileLineKeyValueAndWhatIsAllowed) {
  EXPECT_EQ(ErrorOf("server:\n  host: ::1\n  http_port: 70000\n"),
            "f.yaml:3: server.http_port: 70000 is not an integer in [0, 65535]");
  EXPECT_EQ(ErrorOf("kv_cache:\n  dtype: fp16\n"),
            "f.yaml:2: kv_cache.dtype: fp16 is not auto | f32 | bf16 | fp8 | int8 | int4");
  EXPECT_EQ(ErrorOf("kv_cache:\n  block_tokens: 24\n"),
            "f.yaml:2: kv_cache.block_tokens: 24 is not a multiple of 16 in [16, 1024]");
  EXPECT_EQ(ErrorOf("kv_cache:\n  memory_fraction: 0\n"),
            "f.yaml:2: kv_cache.memory_fraction: 0 is not a number in (0, 0.95]");
  EXPECT_EQ(ErrorOf("server:\n  api_keys: abc\n"),
            "f.yaml:2: server.api_keys: the value (not shown) is not a list of texts that are not empty, as "
            "[a, b]");
  EXPECT_EQ(ErrorOf("server:\n  host: [a, b]\n"),
            "f.yaml:2: server.host: [a, b] is not one line of text, not empty");
  EXPECT_THAT(ErrorOf("server:\n  host:\n"), HasSubstr("server.host has no value"));
}

TEST(ConfigLoader, ReportsAllProblemsAtOnce) {
  const std::string error =
      ErrorOf("scheduler:\n  max_batch_tokens: -1\n  max_batch_token: 5\nlog:\n  level: loud\n");
  EXPECT_THAT(error, HasSubstr("f.yaml:2: scheduler.max_batch_tokens: -1"));
  EXPECT_THAT(error, HasSubstr("f.yaml:3: scheduler.max_batch_token: no such setting"));
  EXPECT_THAT(error, HasSubstr("f.yaml:5: log.level: loud"));
}

TEST(ConfigLoader, AnErrorLeavesTheConfigurationAlone) {
  Config config;
  EXPECT_NE(Load("server:\n  http_port: 9\n  grpc_port: x\n", &config), "");
  EXPECT_EQ(Dump(config), Dump(Config()));
  EXPECT_NE(Set("server.http_port=x", &config), "");
  EXPECT_EQ(Dump(config), Dump(Config()));
}

TEST(ConfigLoader, AnUnknownKeyNamesTheNearest) {
  EXPECT_EQ(ErrorOf("server:\n  htp_port: 1\n"),
            "f.yaml:2: server.htp_port: no such setting; the nearest is server.http_port");
  EXPECT_EQ(NearestKey("server.max_batch_tokens"), "scheduler.max_batch_tokens");
  EXPECT_EQ(NearestKey("kv_cache.memory"), "kv_cache.memory_bytes");
  EXPECT_EQ(NearestKey("backend.thread"), "backend.threads");
  EXPECT_THAT(ErrorOf("servr:\n  host: a\n"),
              HasSubstr("servr: no such section; there are atp, backend, kv_cache, limits"));
  Config config;
  EXPECT_EQ(Set("log.lvl=info", &config), "--set log.lvl: no such setting; the nearest is log.level");
  EXPECT_NE(Set(std::string(100000, 'x') + "=1", &config), "");
}

TEST(ConfigLoader, RejectsWrongShapes) {
  EXPECT_THAT(ErrorOf("[1, 2]"), HasSubstr("f.yaml:1: "));
  EXPECT_THAT(ErrorOf("hello"), HasSubstr("expected sections"));
  EXPECT_THAT(ErrorOf("server: 5"), HasSubstr("server is a section"));
  EXPECT_THAT(ErrorOf("server: [5]"), HasSubstr("list is not expected"));
  EXPECT_THAT(ErrorOf("server:\n  host: {a: b}\n"), HasSubstr("server.host is a value"));
  EXPECT_THAT(ErrorOf("server:\n  api_keys: [[a]]\n"), HasSubstr("f.yaml:2"));
  EXPECT_THAT(ErrorOf("server:\n  host: a\n  host: b\n"), HasSubstr("f.yaml:3: server.host is set twice"));
  EXPECT_THAT(ErrorOf("server:\n  host: a\n---\nserver:\n  host: b\n"),
              HasSubstr("more than one YAML document"));
  EXPECT_THAT(ErrorOf("server:\n  host: 'a\n"), HasSubstr("not YAML"));
  EXPECT_THAT(ErrorOf("server:\n  host: \"a\n  http_port: 3\n\n"), HasSubstr("not YAML"));
  EXPECT_THAT(ErrorOf("server: {host: a\n"), HasSubstr("not YAML"));
  EXPECT_THAT(ErrorOf("server:\n\thost: a\n"), HasSubstr("f.yaml:2"));
  EXPECT_THAT(ErrorOf("server:\n  host: \"a\\nb\"\n"), HasSubstr("one line of text"));
}

TEST(ConfigLoader, BombsAreHarmless) {
  EXPECT_THAT(ErrorOf("server:\n  host: &a x\n  api_keys: [*a]\n"), HasSubstr("f.yaml:3: aliases"));
  std::string laughs = "a: &a [x, x]\n";
  for (char c = 'b'; c < 'z'; ++c) {
    laughs += std::string(1, c) + ": &" + c + " [*" + char(c - 1) + ", *" + char(c - 1) + "]\n";
  }
  EXPECT_NE(ErrorOf(laughs), "");
  EXPECT_NE(ErrorOf(std::string(200000, '[')), "");
  EXPECT_NE(ErrorOf(std::string(200000, '{')), "");
  EXPECT_NE(ErrorOf("server:\n  host: " + std::string(100000, '[')), "");
  std::string deep;
  for (int i = 0; i < 600; ++i) deep += std::string(i, ' ') + "a:\n";
  EXPECT_NE(ErrorOf(deep), "");
  std::string dashes;
  for (int i = 0; i < 50000; ++i) dashes += "- ";
  EXPECT_NE(ErrorOf(dashes), "");
  EXPECT_THAT(ErrorOf(std::string(1 << 20, '#')), HasSubstr("larger than"));
  std::string many = "server:\n";
  for (int i = 0; i < 10000; ++i) many += "  k" + std::to_string(i) + ": 1\n";
  EXPECT_THAT(ErrorOf(many), HasSubstr("too many errors"));
}

TEST(ConfigLoader, FilesThatCannotBeRead) {
  Config config;
  EXPECT_EQ(LoadConfigFile("/nonexistent/atp.yaml", &config).code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(LoadConfigFile(std::filesystem::temp_directory_path().string(), &config).ok());
}

TEST(ApplySetting, TakesYamlValues) {
  Config config;
  EXPECT_EQ(Set("server.api_keys=[a, 'b c']", &config), "");
  EXPECT_THAT(config.server.api_keys, ElementsAre("a", "b c"));
  EXPECT_EQ(Set("server.api_keys=[]", &config), "");
  EXPECT_TRUE(config.server.api_keys.empty());
  EXPECT_EQ(Set("kv_cache.prefix_cache=off", &config), "");
  EXPECT_FALSE(config.kv_cache.prefix_cache);
  EXPECT_EQ(Set("model.path=a=b", &config), "");
  EXPECT_EQ(config.model.path, "a=b");
  EXPECT_EQ(Set("model.name=", &config), "");
  EXPECT_EQ(config.model.name, "");
  EXPECT_THAT(Set("model.path=", &config),
              HasSubstr("--set model.path: \"\" is not one line of text, not empty"));
  EXPECT_THAT(Set("model.path", &config), HasSubstr("expected section.key=value"));
  EXPECT_THAT(Set("=1", &config), HasSubstr("expected section.key=value"));
  EXPECT_THAT(Set("model.name=a: b", &config), HasSubstr("quote a text that has a colon"));
}

TEST(Validate, DefaultsAreValid) { EXPECT_TRUE(Validate(Config()).ok()) << Validate(Config()); }

TEST(Validate, NamesEveryProblem) {
  Config config;
  config.server.grpc_port = 8000;
  config.kv_cache.memory_fraction = 0.96;
  config.backend.device = "tpu";
  config.kv_cache.block_tokens = 0;
  const std::string message(Validate(config).message());
  EXPECT_THAT(message, HasSubstr("server.grpc_port: 8000 is also server.http_port"));
  EXPECT_THAT(message, HasSubstr("kv_cache.memory_fraction: 0.96 is not a number in (0, 0.95]"));
  EXPECT_THAT(message, HasSubstr("backend.device: tpu is not cpu | cuda | reference"));
  EXPECT_THAT(message, HasSubstr("kv_cache.block_tokens: 0 is not a multiple of 16"));
  EXPECT_THAT(message, Not(HasSubstr("scheduler")));
}

TEST(Validate, CompressionMustMakeSense) {
  Config config;
  config.kv_cache.block_tokens = 512;
  EXPECT_TRUE(Validate(config).ok()) << Validate(config);  // exact unless somebody says otherwise
  config.atp.preset = "balanced";
  EXPECT_THAT(std::string(Validate(config).message()),
              HasSubstr("atp.segment_tokens: 256 is not a multiple of 512 (kv_cache.block_tokens)"));
  config = Config();
  config.atp.preset = "exact";
  config.atp.ratio = 0.25;
  config.atp.max_principal_keys = 2;
  const std::string message(Validate(config).message());
  EXPECT_THAT(message, HasSubstr("atp.ratio: 0.25 contradicts atp.preset: exact"));
  EXPECT_THAT(message, HasSubstr("atp.max_principal_keys: 2 is less than 4 (atp.sink_tokens)"));
  EXPECT_THAT(message, HasSubstr("atp.max_principal_keys: 2 contradicts atp.preset: exact"));
  config = Config();
  config.atp.sink_tokens = 257;
  config.atp.ratio = 1.5;
  config.atp.preset = "tiny";
  const std::string more(Validate(config).message());
  EXPECT_THAT(more, HasSubstr("atp.sink_tokens: 257 is more than 256 (atp.segment_tokens)"));
  EXPECT_THAT(more, HasSubstr("atp.ratio: 1.5 is not a number in [0, 1]"));
  EXPECT_THAT(more, HasSubstr("atp.preset: tiny is not auto | exact | quality | balanced | compact"));
}

TEST(Settings, EveryDefaultReadsBackAsItself) {
  const Config defaults;
  for (const SettingHelp& help : AllSettings()) {
    Config config;
    EXPECT_EQ(Set(help.key + "=" + help.default_value, &config), "");
    EXPECT_EQ(Dump(config), Dump(defaults)) << help.key;
    EXPECT_FALSE(help.meaning.empty());
  }
}

// The file with exactly one line "  name: value" for each setting.
std::string LineOf(const SettingHelp& help) {
  return "\n  " + help.key.substr(help.key.find('.') + 1) + ": ";
}

TEST(Examples, CpuYamlListsEveryKeyWithItsDefault) {
  const std::string text = ReadFile(kRoot + "/config/cpu.yaml");
  for (const SettingHelp& help : AllSettings()) {
    EXPECT_THAT(text, HasSubstr(LineOf(help) + help.default_value + "\n")) << help.key;
  }
  Config config;
  EXPECT_EQ(Load(text, &config), "");
  EXPECT_EQ(Dump(config), Dump(Config()));
}

TEST(Examples, CudaYamlListsEveryKeyAndIsValid) {
  const std::string text = ReadFile(kRoot + "/config/cuda.yaml");
  for (const SettingHelp& help : AllSettings()) EXPECT_THAT(text, HasSubstr(LineOf(help))) << help.key;
  Config config;
  EXPECT_EQ(Load(text, &config), "");
  EXPECT_TRUE(Validate(config).ok()) << Validate(config);
  EXPECT_EQ(config.backend.device, "cuda");
}

std::string MarkdownTable() {
  std::string table = "| setting | default | meaning |\n|---|---|---|\n";
  for (const SettingHelp& help : AllSettings()) {
    std::string meaning;
    for (const char c : help.meaning) meaning += c == '|' ? std::string("\\|") : std::string(1, c);
    table += "| `" + help.key + "` | `" + help.default_value + "` | " + meaning + " |\n";
  }
  return table;
}

// ATP_UPDATE_DOCS=1 writes the table instead of comparing it.
TEST(Documentation, TableIsCurrent) {
  const std::string path = kRoot + "/docs/configuration.md";
  const std::string begin = "<!-- settings: written by config_loader_test with ATP_UPDATE_DOCS=1 -->\n";
  const std::string end = "<!-- end of settings -->";
  std::string text = ReadFile(path);
  const size_t first = text.find(begin);
  const size_t last = text.find(end);
  ASSERT_TRUE(first != std::string::npos && last != std::string::npos && first < last) << path;
  const size_t from = first + begin.size();
  if (std::getenv("ATP_UPDATE_DOCS") != nullptr) {
    std::ofstream(path) << text.replace(from, last - from, MarkdownTable());
  }
  EXPECT_EQ(text.substr(from, text.find(end) - from), MarkdownTable())
      << "run config_loader_test with ATP_UPDATE_DOCS=1";
}

}  // namespace
}  // namespace atp
