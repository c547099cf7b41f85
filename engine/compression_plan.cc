#include "engine/compression_plan.h"

#include <cmath>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace atp {
namespace {

// One round of splitmix64 (Steele, Lea, Flood 2014): a bijection that mixes all bits.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Changes with everything that changes what a fit makes of the same tokens and settings.
constexpr uint64_t kFormatVersion = 1;

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

bool HasIntegers(const CompressionSettings& settings) {
  if (settings.head_bits.empty()) return settings.bits < 16;
  return std::any_of(settings.head_bits.begin(), settings.head_bits.end(),
                     [](int bits) { return bits < 16; });
}

std::optional<KvPage> PageOf(const CompressionShape& shape, int bits) {
  if (shape.block_bytes == 0) return PrincipalPage(shape.format, shape.block_tokens, shape.head_dim, bits);
  return PrincipalPageWithin(shape.block_bytes, shape.format, shape.block_tokens, shape.head_dim, bits);
}

}  // namespace

KvPage PrincipalPage(KvFormat exact, int block_tokens, int head_dim, int bits) {
  const KvFormat format = bits == 8 ? KvFormat::kInt8 : bits == 4 ? KvFormat::kInt4 : exact;
  return KvPage(format, block_tokens * (BitsOf(exact) / BitsOf(format)), head_dim, /*with_log_mass=*/true);
}

std::optional<KvPage> PrincipalPageWithin(size_t block_bytes, KvFormat exact, int block_tokens, int head_dim,
                                          int bits) {
  const KvPage whole = PrincipalPage(exact, block_tokens, head_dim, bits);
  if (whole.bytes() <= block_bytes) return whole;
  for (int entries = (whole.entries() - 1) / 16 * 16; entries > 0; entries -= 16) {
    const KvPage page(whole.format(), entries, head_dim, /*with_log_mass=*/true);
    if (page.bytes() <= block_bytes) return page;
  }
  return std::nullopt;
}

size_t CompressedBlockBytes(const CompressionSettings& settings, KvFormat exact, int block_tokens,
                            int head_dim) {
  size_t bytes = PrincipalPage(exact, block_tokens, head_dim, 16).bytes();
  for (const int bits : settings.head_bits.empty() ? std::vector<int>{settings.bits} : settings.head_bits)
    bytes = std::max(bytes, PrincipalPage(exact, block_tokens, head_dim, bits).bytes());
  return bytes;
}

bool Compresses(const CompressionSettings& settings) {
  const std::vector<double>& heads = settings.head_ratio;
  return settings.max_principal_keys != 0 || HasIntegers(settings) ||
         (heads.empty() ? settings.ratio != 1
                        : std::any_of(heads.begin(), heads.end(), [](double ratio) { return ratio != 1; }));
}

CompressionPlan::CompressionPlan(const CompressionSettings& settings, const CompressionShape& shape,
                                 std::vector<int32_t> counts, const std::vector<int>& bits)
    : settings_(settings),
      shape_(shape),
      counts_(std::move(counts)),
      samples_(std::min(kPrincipalSamples, settings.segment_tokens)),
      first_replacing_(std::numeric_limits<int>::max()) {
  std::vector<int> page_bits;
  for (const int b : bits) {
    const auto known = std::find(page_bits.begin(), page_bits.end(), b);
    head_page_.push_back(static_cast<int>(known - page_bits.begin()));
    if (known != page_bits.end()) continue;
    page_bits.push_back(b);
    pages_.push_back(*PageOf(shape, b));
  }
  // The first segment k with (k + 1) · count > cap in some head.
  const int largest = *std::max_element(counts_.begin(), counts_.end());
  if (settings.max_principal_keys > 0) first_replacing_ = settings.max_principal_keys / largest;
  AddLevel(0);
  if (settings.max_principal_keys > 0) {
    const int segments = shape.max_positions / settings.segment_tokens + 1;
    const int least = *std::min_element(counts_.begin(), counts_.end());
    const int saturated = CeilDiv(settings.max_principal_keys, least);
    for (int k = first_replacing_; k <= std::max(first_replacing_, std::min(saturated, segments)); ++k)
      AddLevel(k);
  }
  id_ = Hash();
}

void CompressionPlan::AddLevel(int segment) {
  const bool replaces = segment >= first_replacing_ && total_group_blocks_.size() > 0;
  int blocks = 0;
  int64_t entries = 0;
  for (size_t head = 0; head < counts_.size(); ++head) {
    const int32_t count = counts_[head];
    const int32_t group =
        replaces ? std::min<int32_t>(settings_.max_principal_keys, (segment + 1) * count) : count;
    group_entries_.push_back(group);
    group_blocks_.push_back(CeilDiv(group, Page(static_cast<int>(head))->entries()));
    entries += group;
    blocks += group_blocks_.back();
  }
  total_group_blocks_.push_back(blocks);
  total_group_entries_.push_back(entries);
}

uint64_t CompressionPlan::Hash() const {
  uint64_t hash = kFormatVersion;
  const auto add = [&hash](int64_t value) { hash = Mix(hash ^ static_cast<uint64_t>(value)); };
  add(settings_.segment_tokens);
  add(settings_.window_tokens);
  add(settings_.sink_tokens);
  add(settings_.max_principal_keys);
  add(samples_);
  for (const int32_t count : counts_) add(count);
  for (const int page : head_page_) add(static_cast<int64_t>(pages_[page].format()));
  return hash != 0 ? hash : 1;
}

int CompressionPlan::ReferencePosition(int layer, int head, int segment, int sample) const {
  const int64_t token = static_cast<int64_t>(segment) * settings_.segment_tokens + SampleOffset(sample);
  const uint64_t hash = Mix(Mix(Mix(static_cast<uint64_t>(layer)) ^ static_cast<uint64_t>(head)) ^
                            static_cast<uint64_t>(token));
  return (segment + 1) * settings_.segment_tokens + static_cast<int>(hash % kPrincipalHorizon);
}

int64_t CompressionPlan::PeakBlocks(int from, int to, int fitted) const {
  const int s = settings_.segment_tokens;
  const int64_t exact_group = static_cast<int64_t>(counts_.size());
  // Principal groups [begin, end) are held; their blocks are counted as the window over them moves.
  int begin = 0, end = 0;
  int64_t principal = 0, peak = 0;
  for (int segment = std::max(0, from) / s; segment * s < to; ++segment) {
    const int visible = std::min(VisibleSegments(segment * s), fitted);
    const int first = visible > 0 ? StateBegin(visible - 1) : 0;
    if (end < first) begin = end = first, principal = 0;
    for (; begin < first; ++begin) principal -= TotalGroupBlocks(begin);
    for (; end < std::min(segment + 1, fitted); ++end) principal += TotalGroupBlocks(end);
    const int tokens = std::min(to, (segment + 1) * s) - visible * s;
    int64_t held = principal + CeilDiv(tokens, shape_.block_tokens) * exact_group;
    if (segment < fitted) held += query_blocks();
    peak = std::max(peak, held);
  }
  return peak;
}

absl::StatusOr<std::shared_ptr<const CompressionPlan>> MakeCompressionPlan(
    const CompressionSettings& settings, const CompressionShape& shape) {
  if (!Compresses(settings)) return std::shared_ptr<const CompressionPlan>();
  const auto whole_blocks = [&](int tokens) { return tokens >= 0 && tokens % shape.block_tokens == 0; };
  if (settings.segment_tokens <= 0 || !whole_blocks(settings.segment_tokens)) {
    return absl::InvalidArgumentError(absl::StrCat("atp.segment_tokens: expected a positive multiple of ",
                                                   shape.block_tokens, " (kv_cache.block_tokens), found ",
                                                   settings.segment_tokens));
  }
  if (!whole_blocks(settings.window_tokens)) {
    return absl::InvalidArgumentError(absl::StrCat("atp.window_tokens: expected 0 or a positive multiple of ",
                                                   shape.block_tokens, " (kv_cache.block_tokens), found ",
                                                   settings.window_tokens));
  }
  if (settings.sink_tokens < 0 || settings.sink_tokens > settings.segment_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("atp.sink_tokens: expected 0 to ", settings.segment_tokens,
                                                   " (atp.segment_tokens), found ", settings.sink_tokens));
  }
  const int least = std::max(1, settings.sink_tokens);
  if (settings.max_principal_keys != 0 && settings.max_principal_keys < least) {
    return absl::InvalidArgumentError(absl::StrCat("atp.max_principal_keys: expected 0 (no cap) or at least ",
                                                   least, " (atp.sink_tokens), found ",
                                                   settings.max_principal_keys));
  }
  const size_t heads = static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads);
  std::vector<double> ratios = settings.head_ratio;
  if (ratios.empty()) ratios.assign(heads, settings.ratio);
  if (ratios.size() != heads) {
    return absl::InvalidArgumentError(absl::StrCat("atp.budgets: expected a ratio for each of ", heads,
                                                   " kv heads of ", shape.layers, " layers, found ",
                                                   ratios.size()));
  }
  std::vector<int32_t> counts;
  for (const double ratio : ratios) {
    if (!(ratio > 0 && ratio <= 1)) {
      return absl::InvalidArgumentError(
          absl::StrCat("atp.ratio: expected more than 0 and at most 1, found ", ratio));
    }
    counts.push_back(std::clamp(static_cast<int>(std::lround(ratio * settings.segment_tokens)), least,
                                settings.segment_tokens));
  }
  std::vector<int> bits = settings.head_bits;
  if (bits.empty()) bits.assign(heads, settings.bits);
  if (bits.size() != heads) {
    return absl::InvalidArgumentError(absl::StrCat("atp.budgets: expected bits for each of ", heads,
                                                   " kv heads of ", shape.layers, " layers, found ",
                                                   bits.size()));
  }
  for (const int b : bits) {
    if (b != 16 && b != 8 && b != 4)
      return absl::InvalidArgumentError(absl::StrCat("atp.bits: expected 16, 8 or 4, found ", b));
    if (!PageOf(shape, b)) {
      return absl::InvalidArgumentError(
          absl::StrCat("atp.bits: the server's KV blocks of ", shape.block_bytes,
                       " bytes are made for exact entries and have no room for compressed ones of ", b,
                       " bits; take fewer bits"));
    }
  }
  const bool compresses = settings.max_principal_keys > 0 || HasIntegers(settings) ||
                          std::any_of(counts.begin(), counts.end(),
                                      [&](int32_t count) { return count < settings.segment_tokens; });
  if (!compresses) return std::shared_ptr<const CompressionPlan>();
  return std::shared_ptr<const CompressionPlan>(
      new CompressionPlan(settings, shape, std::move(counts), bits));
}

}  // namespace atp
