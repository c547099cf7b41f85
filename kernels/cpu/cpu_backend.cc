// How each op is cut into parts for the thread pool. Where the cuts are affects speed only, never a result.
#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/base/macros.h"
#include "absl/strings/str_cat.h"
#include "kernels/available_memory.h"
#include "kernels/cpu/cores.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/panels.h"
#include "kernels/cpu/principal_fit.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/host_memory.h"
#include "kernels/low_rank.h"
#include "kernels/principal_segment.h"
#include "kernels/quantized.h"
#include "kernels/sample_tokens.h"

namespace atp::cpu {
namespace {

// An op on fewer elements than this is over before a second thread could help.
constexpr int64_t kElementsPerPart = 8192;
// Parts per thread of a matrix product: finer parts even out cores that others disturb.
constexpr int64_t kPartsPerThread = 4;
constexpr size_t kMostPartialFloats = 16 << 20;  // of attention that is cut; where more, there is work enough

// A part's x, of the second-level cache (1 MiB), where a kernel could use more rows than usual.
constexpr int64_t kPartWords = 256 << 10;

// From so many rows on, block-quantised weights are multiplied faster by AMX, to the same bits.
constexpr int64_t kAmxRows = 64;

// Products with many rows, as a multiple of the speed of fp32 ones.
constexpr double kVnniSpeed = 3.2, kBF16Speed = 2.1, kAmxInt8Speed = 5.5, kAmxBF16Speed = 8.8;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

class CpuBackend final : public Backend {
 public:
  CpuBackend(const Isa& isa, int threads, DType activation_dtype)
      : isa_(isa),
        pool_(threads),
        scratch_(threads),
        float_matmul_(FloatMatMulFor(isa)),
        int8_matmul_(Int8MatMulFor(isa)),
        kquant_matmul_(KQuantMatMulFor(isa)),
        amx_int8_matmul_(AmxInt8MatMulFor(isa)),
        rms_norm_(RmsNormFor(isa.target)),
        gather_rows_(GatherRowsFor(isa.target)),
        swiglu_(SwiGluFor(isa.target)),
        rope_(RopeFor(isa.target)),
        store_kv_(StoreKvFor(isa.target)),
        attention_(AttentionFor(isa.target)),
        merge_attention_(MergeAttentionFor(isa.target)),
        fit_principal_(PrincipalFitFor(isa.target)),
        low_rank_(LowRankLoopsFor(isa.target)),
        segments_(threads) {
    for (Scratch& scratch : scratch_) scratch.Reserve(kMatMulScratchBytes / sizeof(float));
    int8_matmul_speed_ = isa.amx ? kAmxInt8Speed : isa.dot8 ? kVnniSpeed : 1;
    bf16_matmul_ = activation_dtype == DType::kBF16 ? BF16MatMulFor(isa) : MatMulKernel{};
    if (bf16_matmul_.multiply == nullptr) bf16_matmul_ = float_matmul_;
    if (activation_dtype == DType::kBF16) amx_bf16_matmul_ = AmxBF16MatMulFor(isa);
  }

  std::string Description() const override {
    return absl::StrCat("cpu: ", isa_.name, ", ", pool_.threads(),
                        pool_.threads() == 1 ? " thread" : " threads");
  }

  bool Supports(const OpDesc& desc) const override {
    return desc.head_dim > 0 && desc.head_dim % 2 == 0 && desc.block_entries > 0 &&
           desc.block_entries % 16 == 0;
  }

  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return AllocateHostMemory(bytes); }
  absl::StatusOr<Weight> LoadWeight(const TensorView& host, DType dtype) override {
    return LoadPanels(host, dtype, pool_);
  }
  void CopyToDevice(void* device, const void* host, size_t bytes) override {
    CopyHostMemory(device, host, bytes);
  }
  void CopyToHost(void* host, const void* device, size_t bytes) override {
    CopyHostMemory(host, device, bytes);
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }

  void GatherRows(const GatherRowsArgs& args) override {
    const int64_t rows = static_cast<int64_t>(args.indices.size());
    ForRows(rows, args.table.cols, [&](int64_t begin, int64_t end) {
      if (!args.table.packed) return gather_rows_(args, begin, end);
      for (int64_t row = begin; row < end; ++row) {
        UnpackRow(args.table, args.indices[row], args.out + row * args.table.cols);
      }
    });
  }

  // Each thread takes a fit's scratch when it runs one; that it cannot is better said before there are
  // answers.
  absl::Status Reserve(const StepLimits& limits) override {
    head_dim_ = std::max(head_dim_, limits.head_dim);
    if (limits.fit_entries == 0) return absl::OkStatus();
    const size_t fit =
        PrincipalFitScratch(limits.fit_entries, limits.fit_references, head_dim_, limits.fit_count);
    const size_t wanted = fit * sizeof(float) * pool_.threads(), left = AvailableMemoryBytes();
    if (wanted <= left) return absl::OkStatus();
    return absl::ResourceExhaustedError(absl::StrCat(pool_.threads(), " threads need ", wanted,
                                                     " bytes of scratch memory, ", left, " are left"));
  }

  void MatMul(const MatMulArgs& args) override { MatMuls({&args, 1}); }

  void MatMuls(std::span<const MatMulArgs> products) override {
    Multiply(products, [](int64_t, int64_t) {});
  }

  void RmsNormAndMatMuls(const RmsNormArgs& norm, std::span<const MatMulArgs> products) override {
    Multiply(products, [&](int64_t begin, int64_t end) { rms_norm_(norm, begin, end); });
  }

  void SwiGluAndMatMuls(const SwiGluArgs& swiglu, std::span<const MatMulArgs> products) override {
    Multiply(products,
             [&](int64_t begin, int64_t end) { swiglu_(swiglu, begin * swiglu.dim, end * swiglu.dim); });
  }

  void RmsNorm(const RmsNormArgs& args) override {
    ForRows(args.rows, args.dim, [&](int64_t begin, int64_t end) { rms_norm_(args, begin, end); });
  }

  void Rope(const RopeArgs& args) override {
    PrepareAngles(args);
    const int64_t rows = static_cast<int64_t>(args.positions.size());
    ForRows(rows, static_cast<int64_t>(args.heads) * args.head_dim,
            [&](int64_t begin, int64_t end) { rope_(args, angles_.data(), begin, end); });
  }

  void SwiGlu(const SwiGluArgs& args) override {
    ForRows(args.rows * args.dim, 1, [&](int64_t begin, int64_t end) { swiglu_(args, begin, end); });
  }

  void SampleTokens(const SampleTokensArgs& args) override { sampler_.Sample(args); }

  void StoreKv(const StoreKvArgs& args) override {
    for (const KvSequence& sequence : args.sequences) {
      for (int kv_head = 0; kv_head < args.kv_heads; ++kv_head) store_kv_(args, sequence, kv_head);
    }
  }

  void RotateAndStore(const RotateAndStoreArgs& args) override {
    const int head_dim = args.pool.exact->head_dim(), page = args.pool.exact->entries();
    const RopeArgs query{args.query, args.positions, args.inverse_frequency, args.heads, head_dim};
    const RopeArgs key{args.key, args.positions, args.inverse_frequency, args.kv_heads, head_dim};
    const StoreKvArgs store{args.key, args.value, args.sequences, args.pool, args.kv_heads};
    PrepareAngles(query);
    // Cut where pages end: entries of one may share bytes.
    store_parts_.clear();
    for (const KvSequence& sequence : args.sequences) {
      KvSequence part = sequence;
      for (int left = sequence.rows; left > 0; left -= part.rows, part.first_row += part.rows) {
        const int begin = sequence.exact_entries - left;
        part.rows = std::min(left, page - begin % page);
        part.exact_entries = begin + part.rows;
        store_parts_.push_back(part);
      }
    }
    const int64_t parts = static_cast<int64_t>(store_parts_.size()), rows = args.positions.size();
    const int64_t elements = rows * (args.heads + 2 * args.kv_heads) * head_dim;
    ForRows(parts, elements / std::max<int64_t>(1, parts), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const KvSequence& part = store_parts_[static_cast<size_t>(i)];
        rope_(query, angles_.data(), part.first_row, part.first_row + part.rows);
        rope_(key, angles_.data(), part.first_row, part.first_row + part.rows);
        for (int kv_head = 0; kv_head < args.kv_heads; ++kv_head) store_kv_(store, part, kv_head);
      }
    });
  }

  void Attention(const AttentionArgs& args) override {
    const size_t scratch_floats =
        AttentionScratchFloats(args.heads / args.kv_heads, args.pool.exact->head_dim());
    CutAttention(args);
    pool_.ParallelFor(static_cast<int64_t>(attention_parts_.size()), [&](int64_t index, int thread) {
      const size_t next = static_cast<size_t>(index + pool_.threads());
      attention_(args, attention_parts_[index],
                 next < attention_parts_.size() ? &attention_parts_[next] : nullptr,
                 scratch_[thread].Reserve(scratch_floats));
    });
    pool_.ParallelFor(static_cast<int64_t>(attention_merges_.size()), [&](int64_t index, int thread) {
      merge_attention_(args, attention_merges_[index], scratch_[thread].Reserve(scratch_floats));
    });
  }

  void StoreQueries(const StoreQueriesArgs& args) override {
    for (const QuerySampleRow& row : args.rows) StoreQuerySample(args, row);
  }

  double LowRankMatMulSpeed(DType weight) const override {
    // Measured: docs/principal_keys.md, low-rank linear layers.
    if (IsQuantized(weight)) return int8_matmul_speed_;
    const bool bf16 = weight == DType::kBF16 && bf16_matmul_.multiply != float_matmul_.multiply;
    return !bf16 ? 1 : isa_.amx ? kAmxBF16Speed : kBF16Speed;
  }

  void LowRankInput(const LowRankInputArgs& args) override {
    const int64_t n = args.rows, r = args.rank, d = args.dim;
    float* const centred = low_rank_room_.Reserve(static_cast<size_t>(n * d + r * n));
    float* const basis = centred + n * d;
    constexpr int64_t kColumns = 512;
    pool_.ParallelFor(CeilDiv(d, kColumns), [&](int64_t part, int) {
      low_rank_.centre(args, part * kColumns, std::min(d, (part + 1) * kColumns), centred);
    });
    for (size_t i = test_matrix_.size(); i < static_cast<size_t>(r * d); ++i)
      test_matrix_.push_back(LowRankTestMatrix(static_cast<int64_t>(i)));
    MultiplyActivations({test_matrix_.data(), r, d}, centred, /*transposed=*/false, n, nullptr, basis, false);
    low_rank_.orthonormalize(basis, r, n);
    MultiplyActivations({basis, r, n}, centred, /*transposed=*/true, d, nullptr, args.right, false);
    MultiplyActivations({args.right, r, d}, centred, /*transposed=*/false, n, nullptr, basis, false);
    low_rank_.orthonormalize(basis, r, n);
    MultiplyActivations({basis, r, n}, centred, /*transposed=*/true, d, nullptr, args.right, false);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < r; ++j) args.left[i * (r + 1) + j] = basis[j * n + i];
      args.left[i * (r + 1) + r] = 1;
    }
  }

  void LowRankOutput(const LowRankOutputArgs& args) override {
    MultiplyActivations({args.left, args.rows, args.inner}, args.product, /*transposed=*/true, args.out,
                        args.bias, args.y, args.accumulate);
  }

  void FitPrincipalKeys(const FitPrincipalKeysArgs& args) override {
    // Long fits first, so that no thread is left alone with one.
    const auto cost = [&](int32_t i) {
      const PrincipalFitJob& job = args.jobs[i];
      return int64_t{job.principal_entries + job.exact_entries} * (job.samples * args.group + job.count);
    };
    fit_order_.resize(args.jobs.size());
    std::iota(fit_order_.begin(), fit_order_.end(), 0);
    std::sort(fit_order_.begin(), fit_order_.end(),
              [&](int32_t a, int32_t b) { return cost(a) != cost(b) ? cost(a) > cost(b) : a < b; });
    pool_.ParallelFor(static_cast<int64_t>(args.jobs.size()), [&](int64_t part, int thread) {
      const int32_t index = fit_order_[part];
      PrincipalSegment& segment = segments_[thread];
      segment.Gather(args, args.jobs[index]);
      const PrincipalFitProblem& p = segment.problem();
      fit_principal_(p, scratch_[thread].Reserve(PrincipalFitScratch(p.n, p.m, p.d, p.count)), segment.fit());
      segment.Scatter(args, args.jobs[index]);
      args.reports[index] = segment.report();
    });
  }

 private:
  struct Rows {
    const float* data;
    int64_t rows, cols;
  };

  // y = x·Mᵀ + bias by MatMul, for an M of activations: [outs, cols], or its transpose.
  void MultiplyActivations(const Rows& x, const float* m, bool transposed, int64_t outs, const float* bias,
                           float* y, bool accumulate) {
    const PanelLayout layout(DType::kF32, x.cols);
    const int64_t panels = PanelCount(outs);
    const size_t floats = layout.bytes / sizeof(float);
    float* const memory = activation_panels_.Reserve(static_cast<size_t>(panels) * floats);
    pool_.ParallelFor(panels, [&](int64_t panel, int) {
      float* const to = memory + static_cast<size_t>(panel) * floats;
      const int64_t first = panel * kPanelOuts, count = std::clamp<int64_t>(outs - first, 0, kPanelOuts);
      if (count < kPanelOuts) std::fill_n(to, floats, 0.0f);
      if (count == 0) return;
      if (!transposed) {
        const auto* from = reinterpret_cast<const std::byte*>(m + first * x.cols);
        return PackPanel(layout, from, static_cast<size_t>(x.cols) * sizeof(float), static_cast<int>(count),
                         reinterpret_cast<std::byte*>(to));
      }
      for (int64_t k = 0; k < x.cols; ++k) std::copy_n(m + k * outs + first, count, to + k * kPanelOuts);
    });
    const TensorView weight{memory, DType::kF32, outs, x.cols, /*packed=*/true};
    MatMul({x.data, weight, bias, y, x.rows, accumulate});
  }

  // Long parts first, so that a head with many entries is not the last to begin. Parts that would leave
  // threads idle are cut into their chunks.
  void CutAttention(const AttentionArgs& args) {
    const int group = args.heads / args.kv_heads, rows_per_part = AttentionRowsPerPart(group);
    attention_parts_.clear();
    attention_merges_.clear();
    int64_t chunks = 0;
    for (const KvSequence& sequence : args.sequences) {
      for (int row = 0; row < sequence.rows; row += rows_per_part) {
        const int row_end = std::min<int>(row + rows_per_part, sequence.rows);
        for (int kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
          AttentionPart part{&sequence, kv_head, row, row_end, 0, 0, nullptr};
          part.chunk_end = AttentionChunks(part);
          chunks += part.chunk_end;
          attention_parts_.push_back(part);
        }
      }
    }
    const int64_t parts = static_cast<int64_t>(attention_parts_.size());
    if (pool_.threads() > 1 && parts < pool_.threads() * kPartsPerThread && chunks > parts) SplitChunks(args);
    const auto work = [](const AttentionPart& part) {
      return static_cast<int64_t>(part.chunk_end - part.chunk_begin) * (part.row_end - part.row_begin);
    };
    std::sort(attention_parts_.begin(), attention_parts_.end(),
              [&](const AttentionPart& a, const AttentionPart& b) { return work(a) > work(b); });
  }

  void SplitChunks(const AttentionArgs& args) {
    attention_merges_.swap(attention_parts_);
    const auto floats = [&](const AttentionPart& part) {
      return AttentionPartialFloats((part.row_end - part.row_begin) * (args.heads / args.kv_heads),
                                    args.pool.exact->head_dim());
    };
    size_t total = 0;
    for (const AttentionPart& merge : attention_merges_) {
      total += floats(merge) * static_cast<size_t>(merge.chunk_end);
    }
    if (total > kMostPartialFloats) return attention_merges_.swap(attention_parts_);
    // By doubling: each 512 tokens of a context make another chunk.
    float* partial = attention_partials_.Reserve(std::bit_ceil(total));
    for (AttentionPart& merge : attention_merges_) {
      merge.partial = partial;
      for (int chunk = 0; chunk < merge.chunk_end; ++chunk, partial += floats(merge)) {
        AttentionPart part = merge;
        part.chunk_begin = chunk, part.chunk_end = chunk + 1, part.partial = partial;
        attention_parts_.push_back(part);
      }
    }
  }

  const MatMulKernel& KernelFor(const MatMulArgs& args) const {
    const DType dtype = args.weight.dtype;
    if (IsQuantized(dtype)) {
      const MatMulKernel& streaming = IsKQuant(dtype) ? kquant_matmul_ : int8_matmul_;
      const bool many = args.rows >= kAmxRows && amx_int8_matmul_.multiply != nullptr;
      return many ? amx_int8_matmul_ : streaming;
    }
    if (dtype != DType::kBF16) return float_matmul_;
    const bool tiles = amx_bf16_matmul_.multiply != nullptr && args.weight.cols % kQuantBlock == 0;
    return tiles ? amx_bf16_matmul_ : bf16_matmul_;
  }

  // make_x(begin, end) makes rows [begin, end) of x, by the thread that reads them next.
  template <class MakeX>
  void Multiply(std::span<const MatMulArgs> products, const MakeX& make_x) {
    bool made = false;
    while (!products.empty()) {
      const MatMulKernel& kernel = KernelFor(products[0]);
      size_t count = 1;
      while (count < products.size() && &KernelFor(products[count]) == &kernel) ++count;
      const PackedRows rows = made ? PackRows(products[0], kernel, [](int64_t, int64_t) {})
                                   : PackRows(products[0], kernel, make_x);
      MultiplyPacked(products.first(count), kernel, rows);
      made = true;
      products = products.subspan(count);
    }
  }

  void MultiplyPacked(std::span<const MatMulArgs> products, const MatMulKernel& kernel,
                      const PackedRows& rows) {
    const int64_t all_rows = products[0].rows;
    const int64_t part_rows =
        std::clamp<int64_t>(kPartWords / rows.words_per_row, kMatMulRowsPerPart, kernel.rows_per_part);
    const int64_t row_width = CeilDiv(part_rows, rows.tile_rows) * rows.tile_rows;
    const int64_t row_blocks = CeilDiv(all_rows, row_width);
    int64_t weights = 0;
    for (const MatMulArgs& args : products) weights += args.weight.rows * args.weight.cols;
    // A part is worth at least ~64K multiply-adds (a few microseconds).
    const int64_t wanted =
        std::clamp<int64_t>(all_rows * weights / 65536, 1, pool_.threads() * kPartsPerThread);
    matmul_parts_.clear();
    for (const MatMulArgs& args : products) {
      ABSL_ASSERT(args.weight.packed && args.x == products[0].x && args.rows == all_rows);
      const int64_t pairs = PanelCount(args.weight.rows) / 2;
      const int64_t share = CeilDiv(wanted * args.weight.rows * args.weight.cols, weights * row_blocks);
      const int64_t columns = std::clamp<int64_t>(share, 1, pairs);
      for (int64_t row = 0; row < all_rows; row += row_width) {
        for (int64_t column = 0; column < columns; ++column) {
          matmul_parts_.push_back({&args,
                                   {row, std::min(row + row_width, all_rows), 2 * (column * pairs / columns),
                                    2 * ((column + 1) * pairs / columns)}});
        }
      }
    }
    pool_.ParallelFor(static_cast<int64_t>(matmul_parts_.size()), [&](int64_t index, int thread) {
      float* const scratch = scratch_[thread].Reserve(kMatMulScratchBytes / sizeof(float));
      const auto& [args, part] = matmul_parts_[index];
      kernel.multiply(*args, rows, part, reinterpret_cast<std::byte*>(scratch));
    });
  }

  // x in the form that the kernel reads.
  template <class MakeX>
  PackedRows PackRows(const MatMulArgs& args, const MatMulKernel& kernel, const MakeX& make_x) {
    const int64_t cols = args.weight.cols;
    PackedRows rows{};
    // As many tiles as the largest would make, all about as large.
    const int64_t tiles =
        args.rows <= kernel.few_rows ? 1 : std::max<int64_t>(1, CeilDiv(args.rows, kernel.tile_rows));
    rows.tile_rows = static_cast<int>(std::max<int64_t>(1, CeilDiv(args.rows, tiles)));
    rows.words_per_row = CeilDiv(cols, 4) * kernel.words_per_4;
    const int64_t words = args.rows * rows.words_per_row;
    rows.words = reinterpret_cast<uint32_t*>(row_words_.Reserve(static_cast<size_t>(words) + kReadPast));
    if (kernel.form == RowForm::kInt8) {
      rows.block_words_per_row = CeilDiv(cols, kQuantBlock) * kRowWords;
      const int64_t block_words = args.rows * rows.block_words_per_row;
      rows.block_words =
          reinterpret_cast<uint32_t*>(row_block_words_.Reserve(static_cast<size_t>(block_words) + kReadPast));
    }
    // Too few tiles for all threads: rows are made one by one, and then packed.
    const bool by_rows = tiles < pool_.threads();
    if (by_rows) ForRows(args.rows, cols, make_x);
    ForRows(tiles, rows.tile_rows * cols, [&](int64_t begin, int64_t end) {
      if (!by_rows) make_x(begin * rows.tile_rows, std::min(end * rows.tile_rows, args.rows));
      kernel.pack_rows(args, rows, begin, end);
    });
    return rows;
  }

  // body(begin, end) over [0, rows) in parts of about kElementsPerPart elements.
  template <class Body>
  void ForRows(int64_t rows, int64_t elements_per_row, const Body& body) {
    const int64_t rows_per_part =
        std::max<int64_t>(1, kElementsPerPart / std::max<int64_t>(1, elements_per_row));
    pool_.ParallelFor(CeilDiv(rows, rows_per_part), [&](int64_t part, int) {
      body(part * rows_per_part, std::min(rows, (part + 1) * rows_per_part));
    });
  }

  // Every layer rotates queries and keys of the same rows: the angles of a step are computed once.
  void PrepareAngles(const RopeArgs& args) {
    const size_t half = static_cast<size_t>(args.head_dim / 2);
    const std::span<const float> frequencies(args.inverse_frequency, half);
    if (std::ranges::equal(args.positions, angle_positions_) &&
        std::ranges::equal(frequencies, angle_frequencies_)) {
      return;
    }
    angle_positions_.assign(args.positions.begin(), args.positions.end());
    angle_frequencies_.assign(frequencies.begin(), frequencies.end());
    angles_.resize(angle_positions_.size() * 2 * half);
    ForRows(static_cast<int64_t>(angle_positions_.size()), args.head_dim * 8,
            [&](int64_t begin, int64_t end) {
              for (int64_t row = begin; row < end; ++row) {
                float* cosine = angles_.data() + row * 2 * half;
                for (size_t i = 0; i < half; ++i) {
                  const double angle = static_cast<double>(angle_positions_[row]) * angle_frequencies_[i];
                  cosine[i] = static_cast<float>(std::cos(angle));
                  cosine[half + i] = static_cast<float>(std::sin(angle));
                }
              }
            });
  }

  Isa isa_;
  int head_dim_ = 0;  // the largest that Reserve() was told
  ThreadPool pool_;
  std::vector<Scratch> scratch_;  // [threads]
  const MatMulKernel float_matmul_, int8_matmul_, kquant_matmul_, amx_int8_matmul_;
  MatMulKernel bf16_matmul_, amx_bf16_matmul_;
  double int8_matmul_speed_;
  Scratch row_words_, row_block_words_;  // x of the product in progress
  const RmsNormFn rms_norm_;
  const GatherRowsFn gather_rows_;
  const SwiGluFn swiglu_;
  const RopeFn rope_;
  const StoreKvFn store_kv_;
  const AttentionFn attention_;
  const MergeAttentionFn merge_attention_;
  const PrincipalFitFn fit_principal_;
  const LowRankLoops low_rank_;
  TokenSampler sampler_;
  Scratch low_rank_room_, activation_panels_;
  std::vector<float> test_matrix_;          // as much of it as was needed; the same for all
  std::vector<PrincipalSegment> segments_;  // [threads]
  // Of the op or step in progress; they keep their capacity, so that later steps allocate nothing.
  std::vector<std::pair<const MatMulArgs*, MatMulPart>> matmul_parts_;
  std::vector<KvSequence> store_parts_;
  std::vector<AttentionPart> attention_parts_, attention_merges_;
  Scratch attention_partials_;
  std::vector<int32_t> fit_order_;
  std::vector<int32_t> angle_positions_;
  std::vector<float> angle_frequencies_;
  std::vector<float> angles_;  // [rows, 2, head_dim / 2]
};

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(const Isa& isa, int threads, DType activation_dtype) {
  return std::make_unique<CpuBackend>(isa, threads > 0 ? threads : GrantedCores(), activation_dtype);
}

}  // namespace atp::cpu
