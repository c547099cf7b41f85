#include "engine/compression_plan.h"

#include <cmath>
#include <limits>
#include <numeric>
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
constexpr uint64_t kFormatVersion = 3;

// How much a history may exceed its cap, and how much less it has when it was fitted again: this share of it.
constexpr int kCapRoom = 4;

// Backends work on this many entries at once, so pages hold multiples of it.
constexpr int kSliceEntries = 16;
constexpr size_t kPageAlignment = 64;  // of KvPage::bytes()

// Set in the keys of low-rank segments, and in no plan's id.
constexpr uint64_t kLowRankKey = uint64_t{1} << 63;

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

bool HasIntegers(const CompressionSettings& settings) {
  if (settings.head_bits.empty()) return settings.bits < 16;
  return std::any_of(settings.head_bits.begin(), settings.head_bits.end(),
                     [](int bits) { return bits < 16; });
}

}  // namespace

KvPage PrincipalPage(KvFormat exact, int block_tokens, int head_dim, int bits, int parts) {
  const KvFormat wanted = bits == 8 ? KvFormat::kInt8 : bits == 4 ? KvFormat::kInt4 : exact;
  const KvFormat format = BitsOf(wanted) < BitsOf(exact) ? wanted : exact;
  const int entries = block_tokens * (BitsOf(exact) / BitsOf(format));
  return KvPage(format, entries * parts / kBlockParts, head_dim, /*with_log_mass=*/true);
}

std::optional<KvPage> PrincipalPageWithin(size_t block_bytes, KvFormat exact, int block_tokens, int head_dim,
                                          int bits, int parts) {
  const size_t room = block_bytes * static_cast<size_t>(parts) / kBlockParts;
  if (parts < kBlockParts && room % kPageAlignment != 0) return std::nullopt;
  const KvPage block = PrincipalPage(exact, block_tokens, head_dim, bits);
  if (parts == kBlockParts && block.bytes() <= room) return block;
  for (int entries = block.entries() * parts / kBlockParts / kSliceEntries * kSliceEntries; entries > 0;
       entries -= kSliceEntries) {
    const KvPage page(block.format(), entries, head_dim, /*with_log_mass=*/true);
    if (page.bytes() <= room) return page;
  }
  return std::nullopt;
}

size_t CompressedBlockBytes(const CompressionSettings& settings, KvFormat exact, int block_tokens,
                            int head_dim) {
  size_t bytes = PrincipalPage(exact, block_tokens, head_dim, 16).bytes();
  int least = kBlockParts;
  for (const int bits : settings.head_bits.empty() ? std::vector<int>{settings.bits} : settings.head_bits) {
    const int entries = PrincipalPage(exact, block_tokens, head_dim, bits).entries();
    for (int parts = kBlockParts;
         parts == kBlockParts || entries * parts % (kBlockParts * kSliceEntries) == 0; parts /= 2) {
      const size_t page = PrincipalPage(exact, block_tokens, head_dim, bits, parts).bytes();
      bytes = std::max(bytes, page * static_cast<size_t>(kBlockParts / parts));
      least = std::min(least, parts);
      if (parts == 1) break;
    }
  }
  // Every part that a page may begin at is as well aligned as a block.
  const size_t unit = kPageAlignment * static_cast<size_t>(kBlockParts / least);
  return (bytes + unit - 1) / unit * unit;
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
  if (settings.max_principal_keys > 0) {
    const int largest = *std::max_element(counts_.begin(), counts_.end());
    const int room = settings.max_principal_keys / kCapRoom / largest;
    replacing_period_ = 1 + 2 * room;
    first_replacing_ = settings.max_principal_keys / largest + room;
  }
  if (HasLowRank(settings)) {
    linear_rank_ = std::clamp(static_cast<int>(std::lround(settings.linear_rank * settings.segment_tokens)),
                              1, settings.segment_tokens - 1);
  }
  if (!counts_.empty()) ChoosePages(bits);
  id_ = Hash();
}

CompressionPlan::FitSize CompressionPlan::LargestFit() const {
  FitSize largest;
  const int segments = FittedSegments(shape_.max_positions);
  for (int segment = 0; segment < segments; ++segment) {
    const std::span<const int32_t> counts = GroupEntries(segment);
    for (int head = 0; head < static_cast<int>(counts.size()); ++head) {
      const int state = Replaces(segment) ? StatePages(segment - 1, head) * Page(head)->entries() : 0;
      largest.entries = std::max(largest.entries, state + settings_.segment_tokens);
      largest.count = std::max<int>(largest.count, counts[head]);
    }
  }
  return largest;
}

std::vector<int32_t> CompressionPlan::LevelEntries(int32_t count) const {
  const int32_t least = settings_.sink_tokens;  // of a state
  std::vector<int32_t> entries = {std::max(count, least), count};
  const int cap = settings_.max_principal_keys;
  if (cap == 0) return entries;
  const int segments = shape_.max_positions / settings_.segment_tokens + 1;
  int32_t slowest = cap;
  for (const int32_t c : counts_) slowest = c > 0 ? std::min(slowest, c) : slowest;
  const int last =
      std::max(first_replacing_, std::min(CeilDiv(cap, slowest), segments) + replacing_period_ - 1);
  for (int k = first_replacing_; k <= last; k += replacing_period_) {
    const int32_t grown = std::min<int32_t>(cap - (replacing_period_ - 1) / 2 * count, (k + 1) * count);
    entries.push_back(std::max(grown, least));
  }
  return entries;
}

void CompressionPlan::ChoosePages(const std::vector<int>& bits) {
  std::vector<std::pair<int, int>> known;     // bits and parts of pages_
  std::vector<std::vector<int32_t>> entries;  // [heads][levels]
  for (size_t head = 0; head < counts_.size(); ++head) {
    entries.push_back(LevelEntries(counts_[head]));
    std::pair<int, int> best;
    std::optional<KvPage> page;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int parts = kBlockParts; parts > 0; parts /= 2) {
      const std::optional<KvPage> candidate = PrincipalPageWithin(
          shape_.block_bytes, shape_.format, shape_.block_tokens, shape_.head_dim, bits[head], parts);
      if (!candidate) continue;
      int64_t taken = 0;
      for (const int32_t e : entries.back()) taken += CeilDiv(e, candidate->entries()) * parts;
      if (taken < least) least = taken, best = {bits[head], parts}, page = candidate;
    }
    const auto found = std::find(known.begin(), known.end(), best);
    head_page_.push_back(static_cast<int>(found - known.begin()));
    if (found != known.end()) continue;
    known.push_back(best);
    pages_.push_back(*page);
    page_parts_.push_back(best.second);
  }
  for (size_t level = 0; level < entries.front().size(); ++level) {
    total_group_entries_.push_back(0);
    for (size_t head = 0; head < counts_.size(); ++head) {
      group_entries_.push_back(entries[head][level]);
      group_pages_.push_back(CeilDiv(entries[head][level], Page(static_cast<int>(head))->entries()));
      total_group_entries_.back() += entries[head][level];
    }
    PlacePages(level);
  }
}

// Largest pages first: sizes are powers of two, so each begins at a multiple of its own size, and only the
// last block has room left.
void CompressionPlan::PlacePages(size_t level) {
  const int32_t* const pages = group_pages_.data() + level * counts_.size();
  std::vector<int32_t> places(static_cast<size_t>(std::accumulate(pages, pages + counts_.size(), 0)));
  int next = 0;
  for (int parts = kBlockParts; parts > 0; parts /= 2) {
    size_t page = 0;
    for (size_t head = 0; head < counts_.size(); ++head) {
      const bool mine = page_parts_[head_page_[head]] == parts;
      for (int32_t i = 0; i < pages[head]; ++i, ++page) {
        if (mine) places[page] = next, next += parts;
      }
    }
  }
  group_places_.push_back(std::move(places));
  total_group_blocks_.push_back(CeilDiv(next, kBlockParts));
}

double CompressionPlan::MeanRatio() const {
  if (counts_.empty()) return 1;
  return std::accumulate(counts_.begin(), counts_.end(), 0.0) /
         static_cast<double>(counts_.size() * static_cast<size_t>(settings_.segment_tokens));
}

double CompressionPlan::MeanBits() const {
  if (head_page_.empty()) return BitsOf(shape_.format);
  double sum = 0;
  for (const int page : head_page_) sum += BitsOf(pages_[page].format());
  return sum / static_cast<double>(head_page_.size());
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
  for (const int page : head_page_) {
    add(static_cast<int64_t>(pages_[page].format()));
    add(pages_[page].entries());
  }
  if (linear_rank_ > 0) add(linear_rank_ * 8 + settings_.linear_layers);
  return std::max<uint64_t>(1, hash & ~kLowRankKey);
}

uint64_t CompressionPlan::LowRankKey(std::span<const int32_t> segment) const {
  uint64_t hash = id_;
  for (const int32_t token : segment) hash = Mix(hash ^ static_cast<uint32_t>(token));
  return hash | kLowRankKey;
}

int CompressionPlan::ReferencePosition(int layer, int head, int segment, int sample) const {
  const int64_t token = static_cast<int64_t>(segment) * settings_.segment_tokens + SampleOffset(sample);
  const uint64_t hash = Mix(Mix(Mix(static_cast<uint64_t>(layer)) ^ static_cast<uint64_t>(head)) ^
                            static_cast<uint64_t>(token));
  return (segment + 1) * settings_.segment_tokens + static_cast<int>(hash % kPrincipalHorizon);
}

int64_t CompressionPlan::PeakBlocks(int from, int to, int fitted) const {
  const int s = settings_.segment_tokens;
  const int64_t exact_group = static_cast<int64_t>(shape_.layers) * shape_.kv_heads;
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
  if (!(settings.linear_rank > 0 && settings.linear_rank <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("atp.linear_rank: expected more than 0 and at most 1, found ", settings.linear_rank));
  }
  if (!Compresses(settings) && !HasLowRank(settings)) return std::shared_ptr<const CompressionPlan>();
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
  const auto only_low_rank = [&] {  // without heads: nothing is fitted
    return HasLowRank(settings)
               ? std::shared_ptr<const CompressionPlan>(new CompressionPlan(settings, shape, {}, {}))
               : nullptr;
  };
  if (!Compresses(settings)) return only_low_rank();
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
    const bool sinks_only = ratio == 0 && !settings.head_ratio.empty();
    if (!sinks_only && !(ratio > 0 && ratio <= 1)) {
      return absl::InvalidArgumentError(
          absl::StrCat("atp.ratio: expected more than 0 and at most 1, found ", ratio));
    }
    const auto count = static_cast<int>(std::lround(ratio * settings.segment_tokens));
    counts.push_back(sinks_only ? 0 : std::clamp(count, least, settings.segment_tokens));
  }
  if (std::all_of(counts.begin(), counts.end(), [](int32_t count) { return count == 0; }))
    return absl::InvalidArgumentError("atp.budgets: no head keeps anything of closed segments");
  std::vector<int> bits = settings.head_bits;
  if (bits.empty()) bits.assign(heads, settings.bits);
  if (bits.size() != heads) {
    return absl::InvalidArgumentError(absl::StrCat("atp.budgets: expected bits for each of ", heads,
                                                   " kv heads of ", shape.layers, " layers, found ",
                                                   bits.size()));
  }
  const size_t block_bytes = shape.block_bytes > 0 ? shape.block_bytes
                                                   : CompressedBlockBytes(settings, shape.format,
                                                                          shape.block_tokens, shape.head_dim);
  for (const int b : bits) {
    if (b != 16 && b != 8 && b != 4)
      return absl::InvalidArgumentError(absl::StrCat("atp.bits: expected 16, 8 or 4, found ", b));
    if (!PrincipalPageWithin(block_bytes, shape.format, shape.block_tokens, shape.head_dim, b)) {
      return absl::InvalidArgumentError(
          absl::StrCat("atp.bits: the server's KV blocks of ", block_bytes,
                       " bytes are made for exact entries and have no room for compressed ones of ", b,
                       " bits; take fewer bits"));
    }
  }
  const bool compresses = settings.max_principal_keys > 0 || HasIntegers(settings) ||
                          std::any_of(counts.begin(), counts.end(),
                                      [&](int32_t count) { return count < settings.segment_tokens; });
  if (!compresses) return only_low_rank();
  CompressionShape sized = shape;
  sized.block_bytes = block_bytes;
  return std::shared_ptr<const CompressionPlan>(
      new CompressionPlan(settings, sized, std::move(counts), bits));
}

}  // namespace atp
