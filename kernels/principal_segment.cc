#include "kernels/principal_segment.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/dtype.h"

namespace atp {
namespace {
constexpr int kFine = 64;  // positions of the fine table of angles
}

void StoreQuerySample(const StoreQueriesArgs& args, const QuerySampleRow& row) {
  const QueryPage& page = *args.page;
  const int per_head = page.blocks_per_head();
  for (int h = 0; h < args.heads; ++h) {
    const BlockId id = row.blocks[h * per_head + row.sample / page.per_block()];
    std::byte* out =
        args.pool.data + static_cast<size_t>(id) * args.pool.block_bytes + page.offset(row.sample);
    const float* query = args.query + (static_cast<size_t>(row.row) * args.heads + h) * page.head_dim();
    for (int i = 0; i < page.head_dim(); ++i) {
      const uint16_t bits = FloatToBF16(query[i]);
      std::memcpy(out + static_cast<size_t>(i) * sizeof(bits), &bits, sizeof(bits));
    }
  }
}

void PrincipalSegment::GatherEntries(const KvPool& pool, const KvPage& page, const BlockId* blocks,
                                     int count) {
  const size_t d = static_cast<size_t>(page.head_dim());
  for (int i = 0; i < count; ++i) {
    const std::byte* block = pool.data + static_cast<size_t>(blocks[i / page.entries()]) * pool.block_bytes;
    const size_t n = log_mass_.size();
    keys_.resize((n + 1) * d);
    values_.resize((n + 1) * d);
    float log_mass;
    page.Load(block, i % page.entries(), &keys_[n * d], &values_[n * d], &log_mass);
    if (log_mass == -std::numeric_limits<float>::infinity()) continue;  // padding
    log_mass_.push_back(log_mass);
  }
  keys_.resize(log_mass_.size() * d);
  values_.resize(log_mass_.size() * d);
}

// The references of a segment are asked from a short stretch of positions, each frequency at each of them:
// sums of two angles are much cheaper than as many sines.
void PrincipalSegment::PrepareAngles(const FitPrincipalKeysArgs& args, const PrincipalFitJob& job) {
  const size_t half = static_cast<size_t>(args.query_page->head_dim()) / 2;
  const auto fill = [&](std::vector<double>* table, int count, int first, int step) {
    table->resize(static_cast<size_t>(count) * 2 * half);
    for (int k = 0; k < count; ++k) {
      double* row = table->data() + static_cast<size_t>(k) * 2 * half;
      for (size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(first + k * step) * args.inverse_frequency[i];
        row[i] = std::cos(angle);
        row[half + i] = std::sin(angle);
      }
    }
  };
  if (!std::equal(frequencies_.begin(), frequencies_.end(), args.inverse_frequency,
                  args.inverse_frequency + half)) {
    frequencies_.assign(args.inverse_frequency, args.inverse_frequency + half);
    fill(&fine_, kFine, 0, 1);
    coarse_.clear();
  }
  const auto [least, most] =
      std::minmax_element(job.positions, job.positions + static_cast<ptrdiff_t>(args.group) * job.samples);
  const int begin = *least / kFine, end = *most / kFine + 1;
  const int known = static_cast<int>(coarse_.size() / (2 * half));
  if (begin >= coarse_begin_ && end <= coarse_begin_ + known) return;
  coarse_begin_ = begin;
  fill(&coarse_, end - begin, begin * kFine, kFine);
}

// Rotates each kept query to the position it is asked from, and scales it by 1/sqrt(d).
void PrincipalSegment::GatherQueries(const FitPrincipalKeysArgs& args, const PrincipalFitJob& job) {
  const QueryPage& page = *args.query_page;
  const int d = page.head_dim(), half = d / 2;
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  queries_.resize(static_cast<size_t>(args.group) * job.samples * d);
  bits_.resize(static_cast<size_t>(d));
  PrepareAngles(args, job);
  float* out = queries_.data();
  for (int g = 0; g < args.group; ++g) {
    for (int s = 0; s < job.samples; ++s, out += d) {
      const BlockId id = job.queries[g * page.blocks_per_head() + s / page.per_block()];
      const std::byte* in = args.pool.data + static_cast<size_t>(id) * args.pool.block_bytes + page.offset(s);
      const int position = job.positions[g * job.samples + s];
      const double* fine = fine_.data() + static_cast<size_t>(position % kFine) * d;
      const double* coarse = coarse_.data() + static_cast<size_t>(position / kFine - coarse_begin_) * d;
      std::memcpy(bits_.data(), in, static_cast<size_t>(d) * sizeof(uint16_t));
      for (int i = 0; i < half; ++i) {
        const double a = BF16ToFloat(bits_[i]), b = BF16ToFloat(bits_[i + half]);
        const double cosine = coarse[i] * fine[i] - coarse[half + i] * fine[half + i];
        const double sine = coarse[half + i] * fine[i] + coarse[i] * fine[half + i];
        out[i] = static_cast<float>((a * cosine - b * sine) * scale);
        out[i + half] = static_cast<float>((b * cosine + a * sine) * scale);
      }
    }
  }
}

void PrincipalSegment::Gather(const FitPrincipalKeysArgs& args, const PrincipalFitJob& job) {
  keys_.clear(), values_.clear(), log_mass_.clear();
  if (job.principal_entries > 0) {
    GatherEntries(args.pool, *job.page, job.principal, job.principal_entries);
  }
  GatherEntries(args.pool, *args.pool.exact, job.exact, job.exact_entries);
  GatherQueries(args, job);
  const int n = static_cast<int>(log_mass_.size()), d = args.query_page->head_dim();
  const size_t r = static_cast<size_t>(std::min(job.count, n));
  fitted_keys_.resize(r * d), fitted_values_.resize(r * d), fitted_log_mass_.resize(r), chosen_.resize(r);
  problem_ = {keys_.data(),
              values_.data(),
              log_mass_.data(),
              queries_.data(),
              n,
              args.group * job.samples,
              d,
              job.count,
              std::min(job.forced, job.count)};
  fit_ = {fitted_keys_.data(), fitted_values_.data(), fitted_log_mass_.data(), chosen_.data()};
}

void PrincipalSegment::Scatter(const FitPrincipalKeysArgs& args, const PrincipalFitJob& job) {
  const KvPage& page = *job.page;
  const bool rounds = RotatesKeys(page.format());
  if (rounds) rounding_.Prepare(problem_.queries, problem_.m, problem_.d);
  const size_t d = static_cast<size_t>(page.head_dim());
  const int r = static_cast<int>(fitted_log_mass_.size());
  const std::vector<float> nothing(d, 0.0f);
  const int padded = (job.count + page.entries() - 1) / page.entries() * page.entries();
  for (int j = 0; j < padded; ++j) {
    std::byte* block =
        args.pool.data + static_cast<size_t>(job.out[j / page.entries()]) * args.pool.block_bytes;
    if (j < r) {
      page.Store(block, j % page.entries(), &fitted_keys_[j * d], &fitted_values_[j * d], fitted_log_mass_[j],
                 rounds ? &rounding_ : nullptr);
    } else {
      page.Store(block, j % page.entries(), nothing.data(), nothing.data(),
                 -std::numeric_limits<float>::infinity());
    }
  }
}

}  // namespace atp
