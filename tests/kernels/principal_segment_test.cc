// FitPrincipalKeys through pages: on every backend, the principal blocks must answer held-out queries as the
// segment's own entries do, and agree with the reference backend.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/host_memory.h"
#include "kernels/principal_fit.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/test_backends.h"

namespace atp {
namespace {

constexpr int kHeads = 4, kKvHeads = 2, kGroup = kHeads / kKvHeads, kDim = 32, kSegment = 64, kSamples = 16;

std::vector<std::string> Backends() {
  std::vector<std::string> all = TestBackendNames();
  all.push_back("reference");
  return all;
}

// A pool with one segment of tokens in every kv head, its query samples, and room for the answer.
class Segment {
 public:
  Segment(Backend* backend, KvFormat format, uint32_t seed) : Segment(backend, format, format, seed) {}
  Segment(Backend* backend, KvFormat format, KvFormat principal_format, uint32_t seed)
      : backend_(backend),
        exact_(format, 16, kDim, false),
        principal_(principal_format, 16, kDim, true),
        block_bytes_(KvPage(format, 16, kDim, true).bytes()),
        queries_(block_bytes_, kSamples, kDim),
        memory_(*AllocateHostMemory(400 * block_bytes_)) {
    for (float& f : inverse_frequency_)
      f = std::pow(10000.0f, -static_cast<float>(&f - inverse_frequency_) / (kDim / 2));
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& v, size_t size, float scale) {
      v.resize(size);
      for (float& x : v) x = normal(rng) * scale;
    };
    fill(key_, kSegment * kKvHeads * kDim, 0.7f), fill(value_, kSegment * kKvHeads * kDim, 1.0f);
    fill(query_, kSegment * kHeads * kDim, 1.0f);
    for (auto* table : {&exact_blocks_, &out_blocks_, &out2_blocks_})
      for (int h = 0; h < kKvHeads; ++h) table->push_back(Take(table == &exact_blocks_ ? kSegment / 16 : 3));
    query_blocks_ = Take(kHeads * queries_.blocks_per_head());
    for (int i = 0; i < kGroup * kSamples; ++i)
      positions_.push_back(kSegment + static_cast<int>(rng() % 1024));
  }

  KvPool pool() const { return {memory_.data(), block_bytes_, &exact_}; }

  void Store() {
    std::vector<KvHeadBlocks> heads(kKvHeads);
    for (int h = 0; h < kKvHeads; ++h) heads[h].exact = exact_blocks_[h].data();
    const KvSequence sequence{0, kSegment, kSegment, heads.data()};
    backend_->StoreKv({key_.data(), value_.data(), {&sequence, 1}, pool(), kKvHeads});
    std::vector<QuerySampleRow> rows;
    for (int s = 0; s < kSamples; ++s) rows.push_back({s * (kSegment / kSamples), s, query_blocks_.data()});
    backend_->StoreQueries({query_.data(), rows, pool(), &queries_, kHeads});
  }

  // An entry's value is not a number any more.
  void SpoilValue() {
    std::byte* block = memory_.data() + exact_blocks_[0][0] * block_bytes_;
    std::vector<float> key(kDim), value(kDim);
    float log_mass;
    exact_.Load(block, 3, key.data(), value.data(), &log_mass);
    value[1] = INFINITY;
    exact_.Store(block, 3, key.data(), value.data());
  }

  // The blocks of one kv head's answer; masses: with the log masses of its entries.
  std::vector<std::byte> Answer(int kv_head, bool masses = true) const {
    const size_t size = masses ? principal_.bytes() : principal_.log_mass_offset();
    std::vector<std::byte> bytes;
    for (const BlockId id : out_blocks_[kv_head]) {
      const std::byte* block = memory_.data() + id * block_bytes_;
      bytes.insert(bytes.end(), block, block + size);
    }
    return bytes;
  }

  // history: entries already principal, in `from`. heads: of the kv heads, the first so many.
  std::vector<PrincipalFitReport> Fit(int count, int forced, const std::vector<std::vector<BlockId>>* from,
                                      int history, const std::vector<std::vector<BlockId>>& to,
                                      int heads = kKvHeads) {
    std::vector<PrincipalFitJob> jobs;
    for (int h = 0; h < heads; ++h) {
      jobs.push_back({from ? (*from)[h].data() : nullptr, history, exact_blocks_[h].data(), kSegment,
                      &query_blocks_[h * kGroup * queries_.blocks_per_head()], positions_.data(), kSamples,
                      forced, count, to[h].data(), &principal_});
    }
    std::vector<PrincipalFitReport> reports(jobs.size());
    backend_->FitPrincipalKeys({jobs, reports, pool(), &queries_, inverse_frequency_, kGroup});
    return reports;
  }

  // Attention of one far query per head over exact or principal blocks alone plus nothing else.
  std::vector<float> Attend(bool use_principal, const std::vector<std::vector<BlockId>>& table, int entries,
                            uint32_t seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> query(kHeads * kDim), out(kHeads * kDim, NAN);
    for (float& x : query) x = normal(rng);
    // One more exact entry is the asking token's own; a key that is far away from the query keeps it out of
    // the sum.
    std::vector<KvHeadBlocks> heads(kKvHeads);
    if (own_.empty()) own_ = Take(1);
    std::vector<float> key(kDim), zero(kDim, 0.0f);
    std::vector<float> one(kKvHeads * kDim);
    for (int h = 0; h < kKvHeads; ++h) {
      for (int i = 0; i < kDim; ++i) {
        float mean = 0;
        for (int g = 0; g < kGroup; ++g) mean += query[(h * kGroup + g) * kDim + i];
        key[i] = -20.0f * mean;
      }
      if (use_principal) {
        heads[h] = {own_.data(), table[h].data(), entries, &principal_};
        exact_.Store(memory_.data() + own_[0] * block_bytes_, 0, key.data(), zero.data());
      } else {
        heads[h] = {table[h].data(), nullptr, 0};
      }
      // One kv head at a time, because the own block is shared.
      std::vector<KvHeadBlocks> only(kKvHeads, heads[h]);
      const KvSequence sequence{0, 1, use_principal ? 1 : entries, only.data()};
      std::vector<float> all(kHeads * kDim);
      backend_->Attention(
          {query.data(), all.data(), {&sequence, 1}, pool(), kHeads, kKvHeads, 1 / std::sqrt(float{kDim})});
      std::copy_n(&all[h * kGroup * kDim], kGroup * kDim, &out[h * kGroup * kDim]);
    }
    return out;
  }

  std::vector<std::vector<BlockId>> exact_blocks_, out_blocks_, out2_blocks_;

 private:
  std::vector<BlockId> Take(int count) {
    std::vector<BlockId> ids(count);
    for (BlockId& id : ids) id = next_++;
    return ids;
  }

  Backend* backend_;
  KvPage exact_, principal_;
  size_t block_bytes_;
  QueryPage queries_;
  Buffer memory_;
  BlockId next_ = 1;
  float inverse_frequency_[kDim / 2] = {};
  std::vector<float> key_, value_, query_;
  std::vector<BlockId> query_blocks_, own_;
  std::vector<int32_t> positions_;
};

double Distance(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) error += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return std::sqrt(error / norm);
}

class FitPrincipalKeys : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    reference_ = MakeReferenceBackend();
    std::string missing;
    backend_ = GetParam() == "reference" ? MakeReferenceBackend() : TestBackend(GetParam(), 2, &missing);
    if (backend_ == nullptr) GTEST_SKIP() << missing;
  }
  std::unique_ptr<Backend> backend_, reference_;
};

TEST_P(FitPrincipalKeys, AgreesWithTheReferenceThroughPages) {
  for (const KvFormat format : {KvFormat::kF32, KvFormat::kBF16}) {
    Segment a(backend_.get(), format, 11), b(reference_.get(), format, 11);
    std::vector<PrincipalFitReport> ra, rb;
    for (Segment* s : {&a, &b}) s->Store();
    ra = a.Fit(24, 4, nullptr, 0, a.out_blocks_), rb = b.Fit(24, 4, nullptr, 0, b.out_blocks_);
    for (size_t i = 0; i < ra.size(); ++i) {
      EXPECT_TRUE(ra[i].fitted);
      EXPECT_NEAR(ra[i].mass_residual, rb[i].mass_residual, 1e-5);
      EXPECT_NEAR(ra[i].output_residual, rb[i].output_residual, 1e-5);
    }
    // 24 entries in blocks of 16: the padding of the second block must not be seen.
    const double tolerance =
        format == KvFormat::kF32 ? 1e-4 : 1e-2;  // bf16: one rounding of entries may fall either way
    EXPECT_LT(Distance(a.Attend(true, a.out_blocks_, 32, 5), b.Attend(true, b.out_blocks_, 32, 5)),
              tolerance);
  }
}

TEST_P(FitPrincipalKeys, AnswersLikeTheWholeSegment) {
  Segment s(backend_.get(), KvFormat::kF32, 3);
  s.Store();
  double last = 10;
  for (const int count : {16, 48}) {
    s.Fit(count, 0, nullptr, 0, s.out_blocks_);
    const double error =
        Distance(s.Attend(true, s.out_blocks_, count, 9), s.Attend(false, s.exact_blocks_, kSegment, 9));
    EXPECT_LT(error, last);
    last = error;
  }
  EXPECT_LT(last, 0.5);  // random keys have no low rank: the real figures are measured on real models
}

TEST_P(FitPrincipalKeys, CompressesPrincipalEntriesAgain) {
  Segment a(backend_.get(), KvFormat::kF32, 17), b(reference_.get(), KvFormat::kF32, 17);
  for (Segment* s : {&a, &b}) {
    s->Store();
    s->Fit(24, 4, nullptr, 0, s->out_blocks_);
    for (const PrincipalFitReport& report : s->Fit(28, 4, &s->out_blocks_, 32, s->out2_blocks_))
      EXPECT_TRUE(report.fitted);
  }
  EXPECT_LT(Distance(a.Attend(true, a.out2_blocks_, 32, 5), b.Attend(true, b.out2_blocks_, 32, 5)), 1e-4);
}

TEST_P(FitPrincipalKeys, AgreesWithTheReferenceInPagesOfFewBits) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4}) {
    Segment a(backend_.get(), KvFormat::kF32, format, 23), b(reference_.get(), KvFormat::kF32, format, 23);
    for (Segment* s : {&a, &b}) s->Store(), s->Fit(24, 4, nullptr, 0, s->out_blocks_);
    // A rounding to a step of the scale may fall either way, for few elements.
    const double step = format == KvFormat::kFp8 ? 1.0 / 16 : 1.0 / TopOf(format);
    EXPECT_LT(Distance(a.Attend(true, a.out_blocks_, 32, 5), b.Attend(true, b.out_blocks_, 32, 5)), step);
    const std::vector<std::byte> answer = a.Answer(1, false), expected = b.Answer(1, false);
    size_t differing = 0;
    for (size_t i = 0; i < answer.size(); ++i) differing += answer[i] != expected[i];
    EXPECT_LT(differing, answer.size() / 100) << Name(format);
  }
}

TEST_P(FitPrincipalKeys, IsTheSameBitsAloneAndBesideOthers) {
  Segment a(backend_.get(), KvFormat::kBF16, 29), b(backend_.get(), KvFormat::kBF16, 29);
  for (Segment* s : {&a, &b}) s->Store();
  a.Fit(24, 4, nullptr, 0, a.out_blocks_, 1);
  b.Fit(24, 4, nullptr, 0, b.out_blocks_);
  EXPECT_TRUE(a.Answer(0) == b.Answer(0));
}

TEST_P(FitPrincipalKeys, DegenerateInputIsKeptAsItIs) {
  Segment s(backend_.get(), KvFormat::kF32, 31);
  s.Store();
  s.SpoilValue();
  const std::vector<PrincipalFitReport> reports = s.Fit(24, 4, nullptr, 0, s.out_blocks_);
  EXPECT_FALSE(reports[0].fitted);
  EXPECT_TRUE(reports[1].fitted);
}

INSTANTIATE_TEST_SUITE_P(Backends, FitPrincipalKeys, testing::ValuesIn(Backends()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace atp
