// Any bytes as a budgets file: refused in one line, or numbers from which any mean can be shared. Seed:
// models/default/atp_budgets.json, cut to its first three layers.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "engine/byte_budget.h"
#include "engine/compression_budgets.h"

namespace {

constexpr int kLayers = 3, kKvHeads = 2;
constexpr int kSegmentTokens = 256, kBlockEntries = 16;

void Require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const absl::StatusOr<atp::CompressionBudgets> budgets =
      atp::ParseCompressionBudgets(text, "f", kLayers, kKvHeads);
  if (!budgets.ok()) {
    const std::string message(budgets.status().message());
    Require(message.find('\n') == std::string::npos && message.rfind("f: ", 0) == 0 && message.size() < 2000);
    return 0;
  }
  Require(budgets->ratio.size() == kLayers * kKvHeads);
  Require(budgets->MeanRatio() > 0 && budgets->MeanRatio() <= 1);
  for (const double mean : {1.0 / 16, 0.25, 0.5, 1.0}) {
    const absl::StatusOr<std::vector<double>> ratios =
        atp::RatiosForMean(*budgets, mean, kSegmentTokens, kBlockEntries, "f");
    if (!ratios.ok()) continue;  // a file without sensitivities serves its own mean only
    Require(ratios->size() == kLayers * kKvHeads);
    for (const double ratio : *ratios) Require(ratio > 0 && ratio <= 1);
  }
  return 0;
}
