// When and how far history is compressed into principal keys: constants of a server (or of a request), shared
// by everybody who must agree on them. Pure functions of positions; knows no sequence and no byte.
//
// Segment k is the tokens [k·S, (k+1)·S). A token at position p sees the segments 0 .. VisibleSegments(p) - 1
// as principal entries and everything behind them as exact tokens. A segment is fitted once, in the step that
// computes its last token ("closes" it), into one group of blocks, which adds its entries to those of the
// segments before it. With a cap, where they would be too many in some head, the segment's group is the whole
// new history of every head and replaces the groups before it. To fit a whole history again is dear, so it is
// done once for many segments: into three quarters of the cap, as nearly as whole segments come, and again
// when it would have more than five quarters.
//
// "State k" is the principal history that ends with segment k. No plan (a null pointer) is exact attention.
#ifndef ATP_ENGINE_COMPRESSION_PLAN_H_
#define ATP_ENGINE_COMPRESSION_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/block_table.h"
#include "kernels/kv_page.h"

namespace atp {

// Queries per query head that a segment keeps as references of its fit, at most.
inline constexpr int kPrincipalSamples = 64;
// References are asked from positions up to this far behind their segment.
inline constexpr int kPrincipalHorizon = 1024;

// Linear layers that share their input, and so one low-rank form of it: a set of bits.
enum LinearLayers : uint8_t { kQueryKeyValue = 1, kGateUp = 2, kDown = 4 };

struct CompressionSettings {
  double ratio = 1.0;  // principal entries per token of a closed segment, (0, 1]
  // [layers * kv_heads], layer-major, instead of `ratio`; empty: uniform. 0, but not of all heads: the head
  // keeps the sinks and nothing else of closed segments.
  std::vector<double> head_ratio;
  int bits = 16;               // per element of principal entries: 16 = as exact ones, 8 or 4
  std::vector<int> head_bits;  // [layers * kv_heads] instead of `bits`; empty: uniform
  int segment_tokens = 256;    // a multiple of the block size
  int window_tokens = 256;     // newest tokens that stay exact; a multiple of the block size, 0 too
  int sink_tokens = 4;         // first tokens that every fit keeps
  int max_principal_keys = 0;  // per kv head; 0 = as many as there are
  // Rank of the input of linear layers in whole segments of a prompt, as a share of segment_tokens; 1: exact.
  double linear_rank = 1;
  uint8_t linear_layers = 0;     // LinearLayers that take it: see ChooseLinearLayers (engine/low_rank.h)
  std::string preset = "ratio";  // where these come from, for people: "balanced" …, "ratio": set by hand
};

// Whether any history is compressed with these, and whether any linear layer has a low-rank input.
bool Compresses(const CompressionSettings& settings);
inline bool HasLowRank(const CompressionSettings& settings) {
  return settings.linear_rank < 1 && settings.linear_layers != 0;
}

// What a plan is made for: the model, the blocks, and the most tokens a sequence can have.
struct CompressionShape {
  int layers = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int block_tokens = 16;
  KvFormat format = KvFormat::kF32;  // of exact entries
  int query_blocks_per_head = 1;     // QueryPage::blocks_per_head()
  int max_positions = 0;
  size_t block_bytes =
      0;  // that a page must fit into; 0: blocks are made for the plan (CompressedBlockBytes)
};

// The page of principal entries with `bits` per element beside exact blocks of `block_tokens` entries, in
// `parts` of the kBlockParts that a block has: as many more entries as the elements are smaller. bits: 16 (as
// exact ones), 8 or 4, but never more than exact ones have; parts: a power of two that leaves whole slices of
// 16 entries.
KvPage PrincipalPage(KvFormat exact, int block_tokens, int head_dim, int bits, int parts = kBlockParts);
// The same with fewer entries, a multiple of 16, where `parts` of a block of `block_bytes` have no room for
// that many: an exact block leaves none for scales and log masses. None where not even 16 fit.
std::optional<KvPage> PrincipalPageWithin(size_t block_bytes, KvFormat exact, int block_tokens, int head_dim,
                                          int bits, int parts = kBlockParts);
// Bytes of a block that holds any page of a plan with these settings, and the exact one.
size_t CompressedBlockBytes(const CompressionSettings& settings, KvFormat exact, int block_tokens,
                            int head_dim);

class CompressionPlan {
 public:
  int segment_tokens() const { return settings_.segment_tokens; }
  int window_tokens() const { return settings_.window_tokens; }
  int block_tokens() const { return shape_.block_tokens; }
  int blocks_per_segment() const { return settings_.segment_tokens / shape_.block_tokens; }
  const CompressionSettings& settings() const { return settings_; }
  // Of the blocks that the plan's pages are made for: at least this.
  size_t block_bytes() const { return shape_.block_bytes; }
  // False: it is only about linear layers. No history is compressed, and there are no groups and pages.
  bool compresses() const { return !pages_.empty(); }

  // --- linear layers ---
  int linear_rank() const { return linear_rank_; }  // of a segment's rows, less than these; 0: exact
  uint8_t linear_layers() const { return settings_.linear_layers; }
  // How many whole segments so many tokens have, if linear layers take low-rank inputs there.
  int LowRankSegments(int tokens) const { return linear_rank_ > 0 ? tokens / settings_.segment_tokens : 0; }
  // Such a segment's keys and values depend on all of its tokens, in every block. Not the key of anything
  // else.
  uint64_t LowRankKey(std::span<const int32_t> segment) const;

  // Not 0. Plans with the same id compress in the same way, so their blocks may be shared.
  uint64_t id() const { return id_; }

  // --- positions ---
  // c(p) = max(0, ⌊(S·⌊p/S⌋ − W) / S⌋), constant inside a segment.
  int VisibleSegments(int position) const {
    const int s = settings_.segment_tokens;
    if (!compresses()) return 0;
    return std::max(0, position / s * s - settings_.window_tokens) / s;
  }
  // How many segments a sequence has to fit when it computes `tokens` tokens: those that one of them sees.
  int FittedSegments(int tokens) const { return tokens > 0 ? VisibleSegments(tokens - 1) : 0; }
  // The first tokens, whose keys and values do not depend on the plan: everything that they see is exact.
  int UntouchedTokens() const {
    if (!compresses()) return std::numeric_limits<int>::max();
    const int s = settings_.segment_tokens;
    return s * (1 + (settings_.window_tokens + s - 1) / s);
  }

  // --- entries and blocks of principal history, per head = layer * kv_heads + kv head ---
  bool Replaces(int segment) const {
    return segment >= first_replacing_ && (segment - first_replacing_) % replacing_period_ == 0;
  }
  // First segment whose group belongs to state `segment`.
  int StateBegin(int segment) const {
    if (segment < first_replacing_) return 0;
    return segment - (segment - first_replacing_) % replacing_period_;
  }
  // Entries and pages of segment `segment`'s group (padding is not counted as entries). [heads]
  std::span<const int32_t> GroupEntries(int segment) const { return Row(group_entries_, segment); }
  std::span<const int32_t> GroupPages(int segment) const { return Row(group_pages_, segment); }
  // Where the group's pages lie in its blocks, layer-major: in parts of a block, from the group's first one.
  // A head with few entries takes a part of a block, and shares it with other heads.
  std::span<const int32_t> GroupPlaces(int segment) const { return group_places_[Level(segment)]; }
  int TotalGroupBlocks(int segment) const { return total_group_blocks_[Level(segment)]; }
  int64_t TotalGroupEntries(int segment) const { return total_group_entries_[Level(segment)]; }
  // Means over heads: entries per token of a segment, and bits per element.
  double MeanRatio() const;
  double MeanBits() const;
  // How the principal entries of a head are laid out; lives as long as the plan. Of all pages of the head's
  // format that one in which its groups take the least room, and of those the largest.
  const KvPage* Page(int head) const { return &pages_[head_page_[head]]; }
  std::span<const KvPage> pages() const { return pages_; }
  // Pages of state `segment` in one head; 0 for segment -1, before the first.
  int StatePages(int segment, int head) const {
    if (segment < 0) return 0;
    const int begin = StateBegin(segment);
    const int added = segment > begin ? (segment - begin) * GroupPages(segment)[head] : 0;
    return GroupPages(begin)[head] + added;
  }
  // Entries that a fit always keeps: the sinks, which lead the first segment and every state.
  int ForcedEntries(int segment) const {
    return segment == 0 || Replaces(segment) ? settings_.sink_tokens : 0;
  }

  // --- fits ---
  // The largest of up to max_positions tokens: entries of one head that go into it (padding included), and
  // that come out.
  struct FitSize {
    int entries = 0, count = 0;
  };
  FitSize LargestFit() const;

  // --- references ---
  int samples() const { return samples_; }  // per query head and segment
  // Which sample the token at `offset` in its segment is, or -1. The last token is always one.
  int SampleAt(int offset) const {
    const int sample = offset * samples_ / settings_.segment_tokens;
    return (offset + 1) * samples_ / settings_.segment_tokens > sample ? sample : -1;
  }
  int SampleOffset(int sample) const {
    return ((sample + 1) * settings_.segment_tokens + samples_ - 1) / samples_ - 1;
  }
  // Where a kept query is asked from when its segment is fitted: a place behind the segment, by a hash of
  // what it is, so that it is the same whoever computes it.
  int ReferencePosition(int layer, int head, int segment, int sample) const;
  // Blocks for all samples of an open segment: [layers][heads * query_blocks_per_head].
  int query_blocks() const { return shape_.layers * shape_.heads * shape_.query_blocks_per_head; }
  int query_blocks_per_layer() const { return shape_.heads * shape_.query_blocks_per_head; }

  // The most blocks that a sequence holds at once while it computes the tokens [from, to), when it fits
  // `fitted` segments. Chunks end where segments end.
  int64_t PeakBlocks(int from, int to, int fitted) const;

 private:
  friend absl::StatusOr<std::shared_ptr<const CompressionPlan>> MakeCompressionPlan(
      const CompressionSettings&, const CompressionShape&);
  CompressionPlan(const CompressionSettings& settings, const CompressionShape& shape,
                  std::vector<int32_t> counts, const std::vector<int>& bits);

  // The first segment's group has the sinks, those of later ones are all alike, and replacing ones grow head
  // by head, up to a number.
  size_t Level(int segment) const {
    // Not a comparison with 0, from which GCC 12's loop splitting makes a loop that adds nothing up.
    if (!Replaces(segment)) return static_cast<size_t>(std::min(segment, 1));
    return std::min(static_cast<size_t>((segment - first_replacing_) / replacing_period_ + 2),
                    total_group_blocks_.size() - 1);
  }
  std::span<const int32_t> Row(const std::vector<int32_t>& table, int segment) const {
    return {table.data() + Level(segment) * counts_.size(), counts_.size()};
  }
  // Entries in the groups of all levels of a head to which a segment adds `count`.
  std::vector<int32_t> LevelEntries(int32_t count) const;
  void ChoosePages(const std::vector<int>& bits);
  void PlacePages(size_t level);
  uint64_t Hash() const;

  CompressionSettings settings_;
  CompressionShape shape_;
  int linear_rank_ = 0;
  std::vector<int32_t> counts_;  // [heads], principal entries that a segment behind the first one adds
  std::vector<KvPage> pages_;    // of the formats and sizes in use
  std::vector<int> page_parts_;  // of a block, for each of them
  std::vector<int> head_page_;   // [heads], index into pages_
  int samples_;
  int first_replacing_;                             // segment; beyond every position without a cap
  int replacing_period_ = 1;                        // every so many segments after that
  std::vector<int32_t> group_entries_;              // [levels, heads]
  std::vector<int32_t> group_pages_;                // [levels, heads]
  std::vector<std::vector<int32_t>> group_places_;  // [levels][pages]
  std::vector<int> total_group_blocks_;             // [levels]
  std::vector<int64_t> total_group_entries_;
  uint64_t id_;
};

// InvalidArgument naming the setting. Null where the settings change nothing: no linear layer, and no history
// because Compresses() is false or every head keeps all keys of a segment as short as this.
absl::StatusOr<std::shared_ptr<const CompressionPlan>> MakeCompressionPlan(
    const CompressionSettings& settings, const CompressionShape& shape);

}  // namespace atp

#endif  // ATP_ENGINE_COMPRESSION_PLAN_H_
