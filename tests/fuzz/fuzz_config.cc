// Configuration files and --set from anyone: whatever the bytes, an answer and no crash; what is accepted is
// valid.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "config/config_loader.h"
#include "config/settings.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  atp::Config config;
  (void)atp::LoadConfigYaml(text, "fuzz", &config);
  (void)atp::ApplySetting(text, &config);
  // Every value that got through is in its range: reading checks what validation checks.
  for (const atp::Setting& setting : atp::SettingsTable()) {
    if (!atp::CheckSetting(setting, config).empty()) std::abort();
  }
  return 0;
}
