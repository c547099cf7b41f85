// How much compressed history saves: decode attention over 8k tokens of context, exact and at several (ratio,
// format), and what one fit costs. All cases of a round run one after the other, so their ratios hold on a
// noisy machine. JSON.
//   principal_bench [isa] [threads]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend_factory.h"

namespace atp {
namespace {

constexpr int kHeads = 32, kKvHeads = 4, kDim = 64;  // TinyLlama-1.1B
constexpr int kContext = 8192, kWindow = 256, kSegment = 256, kRounds = 25;
constexpr int kCaches = 16;  // as many sequences, so that the bytes do not come from the second-level cache

// Of the calling thread's CPU, so that other programs on the machine count less; with several threads the
// wall's.
double Now(bool one_thread) {
  timespec now;
  clock_gettime(one_thread ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Sequences that hold `principal` entries in one format and `exact` tokens in every kv head.
class Context {
 public:
  // Blocks are of one size: beside 16 entries of bf16, 32 of int8 or 64 of int4. Without compression (ratio
  // 0) `format` is that of exact entries.
  Context(Backend* backend, std::string name, double ratio, KvFormat format, bool zero_mass = false)
      : name_(std::move(name)),
        backend_(backend),
        exact_page_(ratio > 0 ? KvFormat::kBF16 : format, 16, kDim, false),
        page_(format, 16 * 16 / BitsOf(format), kDim, true) {
    const int compressed = ratio > 0 ? (kContext - kWindow) / kSegment * kSegment : 0;
    principal_ = static_cast<int>(compressed * ratio);
    exact_ = kContext - compressed;
    block_bytes_ = std::max(exact_page_.bytes(), page_.bytes());
    const int entries = page_.entries(), blocks = (principal_ + entries - 1) / entries;
    const int per_head = blocks + exact_ / 16;
    pool_ = *backend->Allocate(static_cast<size_t>(kCaches) * kKvHeads * per_head * block_bytes_);
    kv_bytes_ = static_cast<double>(blocks * page_.bytes() + exact_ / 16 * exact_page_.bytes()) * kKvHeads;
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> key(kDim), value(kDim);
    BlockId next = 0;
    for (int s = 0; s < kCaches; ++s) {
      for (int h = 0; h < kKvHeads; ++h) {
        auto& ids = tables_.emplace_back(per_head);
        for (BlockId& id : ids) id = next++;
        for (int i = 0; i < principal_ + exact_; ++i) {
          for (float& x : key) x = normal(rng);
          for (float& x : value) x = normal(rng);
          const bool principal = i < principal_;
          const int at = principal ? i : i - principal_;
          const KvPage& page = principal ? page_ : exact_page_;
          std::byte* block =
              pool_.data() + ids[(principal ? 0 : blocks) + at / page.entries()] * block_bytes_;
          page.Store(block, at % page.entries(), key.data(), value.data(), zero_mass ? 0.0f : 1.0f);
        }
      }
    }
    for (int s = 0; s < kCaches; ++s) {
      auto& heads = heads_.emplace_back(kKvHeads);
      for (int h = 0; h < kKvHeads; ++h) {
        const std::vector<BlockId>& ids = tables_[s * kKvHeads + h];
        heads[h] = {ids.data() + (principal_ + page_.entries() - 1) / page_.entries(), ids.data(), principal_,
                    &page_};
      }
      sequences_.push_back({s, 1, exact_, heads.data()});
    }
    query_.assign(kCaches * kHeads * kDim, 0.1f);
    out_.resize(query_.size());
  }

  double Attend(bool one_thread) {
    const double begin = Now(one_thread);
    backend_->Attention({query_.data(),
                         out_.data(),
                         sequences_,
                         {pool_.data(), block_bytes_, &exact_page_},
                         kHeads,
                         kKvHeads,
                         1 / std::sqrt(float{kDim})});
    return Now(one_thread) - begin;
  }

  const std::string name_;
  double kv_bytes_;
  std::vector<double> seconds_;

 private:
  Backend* backend_;
  KvPage exact_page_, page_;
  int principal_, exact_;
  size_t block_bytes_;
  Buffer pool_;
  std::vector<std::vector<BlockId>> tables_;
  std::vector<std::vector<KvHeadBlocks>> heads_;
  std::vector<KvSequence> sequences_;
  std::vector<float> query_, out_;
};

// The fits of one segment in one layer: 256 tokens and 64 references per query head in every kv head.
class SegmentFit {
 public:
  static constexpr int kSamples = 64;

  SegmentFit(Backend* backend, int count, int history = 0)
      : count_(count),
        history_(history),
        backend_(backend),
        exact_page_(KvFormat::kBF16, 16, kDim, false),
        page_(KvFormat::kBF16, 16, kDim, true),
        query_page_(page_.bytes(), kSamples, kDim) {
    constexpr int kGroup = kHeads / kKvHeads;
    const int queries = kGroup * query_page_.blocks_per_head();
    const int blocks = (kSegment + history + count) / 16 + queries;
    memory_ = *backend->Allocate(static_cast<size_t>(kKvHeads) * blocks * page_.bytes());
    ids_.resize(static_cast<size_t>(kKvHeads) * blocks);
    for (size_t i = 0; i < ids_.size(); ++i) ids_[i] = static_cast<BlockId>(i);
    for (int i = 0; i < kDim / 2; ++i)
      inverse_frequency_.push_back(std::pow(10000.0f, -2.0f * static_cast<float>(i) / kDim));
    std::mt19937 rng(2);
    std::normal_distribution<float> normal;
    for (int i = 0; i < kGroup * kSamples; ++i)
      positions_.push_back(kSegment + static_cast<int>(rng() % 1024));
    std::vector<float> key(kDim), value(kDim), query(static_cast<size_t>(kHeads) * kDim);
    std::vector<BlockId> query_blocks;
    for (int h = 0; h < kKvHeads; ++h) {
      const BlockId* exact = ids_.data() + h * blocks;
      const BlockId* principal = exact + kSegment / 16;
      const BlockId* own_queries = principal + (history + count) / 16;
      query_blocks.insert(query_blocks.end(), own_queries, own_queries + queries);
      for (int i = 0; i < kSegment + history; ++i) {
        for (float& x : key) x = normal(rng);
        for (float& x : value) x = normal(rng);
        std::byte* block = memory_.data() + exact[i / 16] * page_.bytes();
        (i < kSegment ? exact_page_ : page_).Store(block, i % 16, key.data(), value.data(), 1.0f);
      }
      PrincipalFitJob job;
      job.principal = principal, job.principal_entries = history;
      job.exact = exact, job.exact_entries = kSegment;
      job.queries = own_queries, job.positions = positions_.data(), job.samples = kSamples;
      job.forced = 4, job.count = count, job.out = principal + history / 16, job.page = &page_;
      jobs_.push_back(job);
    }
    for (int sample = 0; sample < kSamples; ++sample) {
      for (float& x : query) x = normal(rng);
      const QuerySampleRow row{0, sample, query_blocks.data()};
      backend->StoreQueries({query.data(), {&row, 1}, Pool(), &query_page_, kHeads});
    }
    reports_.resize(jobs_.size());
  }

  void Run() {
    backend_->FitPrincipalKeys(
        {jobs_, reports_, Pool(), &query_page_, inverse_frequency_.data(), kHeads / kKvHeads});
  }

  const int count_, history_;
  std::vector<double> seconds_;

 private:
  KvPool Pool() { return {memory_.data(), page_.bytes(), &exact_page_}; }

  Backend* backend_;
  KvPage exact_page_, page_;
  QueryPage query_page_;
  Buffer memory_;
  std::vector<BlockId> ids_;
  std::vector<int32_t> positions_;
  std::vector<float> inverse_frequency_;
  std::vector<PrincipalFitJob> jobs_;
  std::vector<PrincipalFitReport> reports_;
};

// The machine is shared: what disturbs a round only ever adds.
double Least(const std::vector<double>& x) { return *std::min_element(x.begin(), x.end()); }

int Main(int argc, char** argv) {
  BackendOptions options;
  if (argc > 1) options.cpu_isa = argv[1];
  if (argc > 2) options.threads = std::atoi(argv[2]);
  const auto backend = MakeBackend(options);
  if (!backend.ok()) {
    std::fprintf(stderr, "%s\n", backend.status().ToString().c_str());
    return 2;
  }
  std::vector<std::unique_ptr<Context>> cases;
  const auto add = [&](const char* name, double ratio, KvFormat format, bool zero = false) {
    cases.push_back(std::make_unique<Context>(backend->get(), name, ratio, format, zero));
  };
  add("exact bf16", 0, KvFormat::kBF16);
  add("all principal bf16, log_mass 0", 1, KvFormat::kBF16, true);
  add("1/2 bf16", 0.5, KvFormat::kBF16);
  add("1/4 bf16", 0.25, KvFormat::kBF16);
  add("1/8 bf16", 0.125, KvFormat::kBF16);
  add("1/2 int8", 0.5, KvFormat::kInt8);
  add("1/2 int4", 0.5, KvFormat::kInt4);
  add("1/4 int8", 0.25, KvFormat::kInt8);
  add("1/4 int4", 0.25, KvFormat::kInt4);
  add("exact int8", 0, KvFormat::kInt8);
  add("exact int4", 0, KvFormat::kInt4);
  for (int round = 0; round <= kRounds; ++round) {
    for (auto& c : cases) {
      const double seconds = c->Attend(options.threads == 1);
      if (round > 0) c->seconds_.push_back(seconds);  // the first warms up
    }
  }
  std::vector<std::unique_ptr<SegmentFit>> fits;
  for (const int count : {128, 64, 32}) fits.push_back(std::make_unique<SegmentFit>(backend->get(), count));
  fits.push_back(std::make_unique<SegmentFit>(backend->get(), 512, 512));  // a capped history fitted again
  for (int round = 0; round <= kRounds; ++round) {
    for (auto& fit : fits) {
      const double begin = Now(options.threads == 1);
      fit->Run();
      if (round > 0) fit->seconds_.push_back(Now(options.threads == 1) - begin);
    }
  }
  std::printf(
      "{\"backend\": \"%s\", \"context\": %d, \"window\": %d, \"heads\": %d, \"kv_heads\": %d, \"head_dim\": "
      "%d, \"rows\": [",
      (*backend)->Description().c_str(), kContext, kWindow, kHeads, kKvHeads, kDim);
  const double exact = Least(cases[0]->seconds_);
  for (size_t i = 0; i < cases.size(); ++i) {
    const double seconds = Least(cases[i]->seconds_);
    std::printf(
        "%s\n  {\"case\": \"%s\", \"microseconds_per_sequence\": %.1f, \"time_ratio\": %.3f, "
        "\"kv_bytes_ratio\": %.3f}",
        i ? "," : "", cases[i]->name_.c_str(), seconds * 1e6 / kCaches, seconds / exact,
        cases[i]->kv_bytes_ / cases[0]->kv_bytes_);
  }
  std::printf("\n], \"fits\": [");
  for (size_t i = 0; i < fits.size(); ++i) {
    std::printf(
        "%s\n  {\"tokens\": %d, \"history\": %d, \"entries\": %d, \"references\": %d, \"microseconds\": "
        "%.0f}",
        i ? "," : "", kSegment, fits[i]->history_, fits[i]->count_, SegmentFit::kSamples * kHeads / kKvHeads,
        Least(fits[i]->seconds_) * 1e6 / kKvHeads);
  }
  std::printf("\n]}\n");
  return 0;
}

}  // namespace
}  // namespace atp

int main(int argc, char** argv) { return atp::Main(argc, argv); }
