#include "tests/kernels/host_facing_backend.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace atp {
namespace {

// Device copies of one op's host memory. Two ranges that begin at the same address are one (ops in place).
class Mirror {
 public:
  explicit Mirror(Backend* device) : device_(device) {}

  template <class T>
  const T* In(const T* host, size_t count) {
    return host == nullptr ? nullptr : static_cast<const T*>(Copy(host, count * sizeof(T), false));
  }
  template <class T>
  T* InOut(T* host, size_t count) {
    return host == nullptr ? nullptr : static_cast<T*>(Copy(host, count * sizeof(T), true));
  }
  TensorView In(TensorView view) {
    if (view.packed) {  // LoadWeight's: it is there
      view.packed = false;
      return view;
    }
    view.data = Copy(view.data, view.bytes(), false);
    return view;
  }

  // The op has been issued: wait for it, and bring back what it wrote.
  void Finish() {
    const absl::Status status = device_->Synchronize();
    EXPECT_TRUE(status.ok()) << status;
    for (const Range& range : ranges_) {
      if (range.written) device_->CopyToHost(const_cast<void*>(range.host), range.memory.data(), range.bytes);
    }
  }

 private:
  struct Range {
    const void* host;
    size_t bytes;
    bool written;
    Buffer memory;
  };

  void* Copy(const void* host, size_t bytes, bool written) {
    for (Range& range : ranges_) {
      if (range.host != host) continue;
      EXPECT_LE(bytes, range.bytes);
      range.written |= written;
      return range.memory.data();
    }
    absl::StatusOr<Buffer> memory = device_->Allocate(bytes);
    EXPECT_TRUE(memory.ok()) << memory.status();
    device_->CopyToDevice(memory->data(), host, bytes);
    ranges_.push_back({host, bytes, written, *std::move(memory)});
    return ranges_.back().memory.data();
  }

  Backend* device_;
  std::vector<Range> ranges_;
};

// How many blocks of the pool a list of ids reaches into.
BlockId Reach(const BlockId* ids, int64_t count) {
  return count > 0 ? *std::max_element(ids, ids + count) + 1 : 0;
}

int64_t Blocks(int64_t entries, const KvPage* page) {
  return entries > 0 ? (entries + page->entries() - 1) / page->entries() : 0;
}

KvPool MirrorPool(Mirror& mirror, KvPool pool, BlockId blocks) {
  pool.data = mirror.InOut(pool.data, static_cast<size_t>(blocks) * pool.block_bytes);
  return pool;
}

BlockId Reach(std::span<const KvSequence> sequences, const KvPool& pool, int kv_heads) {
  BlockId reach = 0;
  for (const KvSequence& sequence : sequences) {
    for (int h = 0; h < kv_heads; ++h) {
      const KvHeadBlocks& head = sequence.heads[h];
      reach = std::max(reach, Reach(head.exact, Blocks(sequence.exact_entries, pool.exact)));
      reach = std::max(reach, Reach(head.principal, Blocks(head.principal_entries, head.principal_page)));
    }
  }
  return reach;
}

size_t RowsOf(std::span<const KvSequence> sequences) {
  int32_t rows = 0;
  for (const KvSequence& sequence : sequences) rows = std::max(rows, sequence.first_row + sequence.rows);
  return static_cast<size_t>(rows);
}

class HostFacingBackend final : public Backend {
 public:
  explicit HostFacingBackend(std::unique_ptr<Backend> device) : device_(std::move(device)) {}

  std::string Description() const override { return device_->Description(); }
  bool Supports(const OpDesc& desc) const override { return device_->Supports(desc); }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return device_->Allocate(bytes); }
  absl::StatusOr<Weight> LoadWeight(const TensorView& host, DType dtype) override {
    absl::StatusOr<Weight> weight = device_->LoadWeight(host, dtype);
    if (weight.ok()) weight->view.packed = true;  // only the device can read it
    return weight;
  }
  void CopyToDevice(void* device, const void* host, size_t bytes) override {
    device_->CopyToDevice(device, host, bytes);
  }
  void CopyToHost(void* host, const void* device, size_t bytes) override {
    device_->CopyToHost(host, device, bytes);
  }
  absl::Status Synchronize() override { return device_->Synchronize(); }

  void GatherRows(const GatherRowsArgs& args) override {
    Mirror mirror(device_.get());
    device_->GatherRows({mirror.In(args.table), args.indices,
                         mirror.InOut(args.out, args.indices.size() * static_cast<size_t>(args.table.cols))});
    mirror.Finish();
  }

  void MatMul(const MatMulArgs& args) override {
    Mirror mirror(device_.get());
    const size_t rows = static_cast<size_t>(args.rows), out = static_cast<size_t>(args.weight.rows);
    device_->MatMul({mirror.In(args.x, rows * static_cast<size_t>(args.weight.cols)), mirror.In(args.weight),
                     mirror.In(args.bias, out), mirror.InOut(args.y, rows * out), args.rows,
                     args.accumulate});
    mirror.Finish();
  }

  void MatMuls(std::span<const MatMulArgs> products) override {
    Mirror mirror(device_.get());
    std::vector<MatMulArgs> on_device(products.begin(), products.end());
    for (MatMulArgs& args : on_device) {
      const size_t rows = static_cast<size_t>(args.rows), out = static_cast<size_t>(args.weight.rows);
      args.x = mirror.In(args.x, rows * static_cast<size_t>(args.weight.cols));
      args.weight = mirror.In(args.weight);
      args.bias = mirror.In(args.bias, out);
      args.y = mirror.InOut(args.y, rows * out);
    }
    device_->MatMuls(on_device);
    mirror.Finish();
  }

  void RmsNorm(const RmsNormArgs& args) override {
    Mirror mirror(device_.get());
    const size_t count = static_cast<size_t>(args.rows * args.dim);
    device_->RmsNorm({mirror.In(args.x, count), mirror.In(args.weight, static_cast<size_t>(args.dim)),
                      mirror.InOut(args.y, count), args.rows, args.dim, args.epsilon});
    mirror.Finish();
  }

  void Rope(const RopeArgs& args) override {
    Mirror mirror(device_.get());
    const size_t head_dim = static_cast<size_t>(args.head_dim);
    const size_t count = args.positions.size() * static_cast<size_t>(args.heads) * head_dim;
    device_->Rope({mirror.InOut(args.x, count), args.positions,
                   mirror.In(args.inverse_frequency, head_dim / 2), args.heads, args.head_dim});
    mirror.Finish();
  }

  void SwiGlu(const SwiGluArgs& args) override {
    Mirror mirror(device_.get());
    const size_t count = static_cast<size_t>(args.rows * args.dim);
    device_->SwiGlu({mirror.In(args.gate, count), mirror.In(args.up, count), mirror.InOut(args.out, count),
                     args.rows, args.dim});
    mirror.Finish();
  }

  void StoreKv(const StoreKvArgs& args) override {
    Mirror mirror(device_.get());
    const size_t count = RowsOf(args.sequences) * static_cast<size_t>(args.kv_heads) *
                         static_cast<size_t>(args.pool.exact->head_dim());
    device_->StoreKv({mirror.In(args.key, count), mirror.In(args.value, count), args.sequences,
                      MirrorPool(mirror, args.pool, Reach(args.sequences, args.pool, args.kv_heads)),
                      args.kv_heads});
    mirror.Finish();
  }

  void RotateAndStore(const RotateAndStoreArgs& args) override {
    Mirror mirror(device_.get());
    const auto head_dim = static_cast<size_t>(args.pool.exact->head_dim());
    const size_t rows = args.positions.size(),
                 kv_count = rows * static_cast<size_t>(args.kv_heads) * head_dim;
    RotateAndStoreArgs on_device = args;
    on_device.query = mirror.InOut(args.query, rows * static_cast<size_t>(args.heads) * head_dim);
    on_device.key = mirror.InOut(args.key, kv_count);
    on_device.value = mirror.In(args.value, kv_count);
    on_device.inverse_frequency = mirror.In(args.inverse_frequency, head_dim / 2);
    on_device.pool = MirrorPool(mirror, args.pool, Reach(args.sequences, args.pool, args.kv_heads));
    device_->RotateAndStore(on_device);
    mirror.Finish();
  }

  void Attention(const AttentionArgs& args) override {
    Mirror mirror(device_.get());
    const size_t count = RowsOf(args.sequences) * static_cast<size_t>(args.heads) *
                         static_cast<size_t>(args.pool.exact->head_dim());
    device_->Attention({mirror.In(args.query, count), mirror.InOut(args.out, count), args.sequences,
                        MirrorPool(mirror, args.pool, Reach(args.sequences, args.pool, args.kv_heads)),
                        args.heads, args.kv_heads, args.scale});
    mirror.Finish();
  }

  void StoreQueries(const StoreQueriesArgs& args) override {
    Mirror mirror(device_.get());
    BlockId reach = 0;
    int32_t rows = 0;
    for (const QuerySampleRow& row : args.rows) {
      reach = std::max(reach, Reach(row.blocks, args.heads * args.page->blocks_per_head()));
      rows = std::max(rows, row.row + 1);
    }
    const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(args.heads) *
                         static_cast<size_t>(args.page->head_dim());
    device_->StoreQueries({mirror.In(args.query, count), args.rows, MirrorPool(mirror, args.pool, reach),
                           args.page, args.heads});
    mirror.Finish();
  }

  void FitPrincipalKeys(const FitPrincipalKeysArgs& args) override {
    Mirror mirror(device_.get());
    BlockId reach = 0;
    for (const PrincipalFitJob& job : args.jobs) {
      reach = std::max(reach, Reach(job.principal, Blocks(job.principal_entries, job.page)));
      reach = std::max(reach, Reach(job.exact, Blocks(job.exact_entries, args.pool.exact)));
      reach = std::max(reach, Reach(job.queries, args.group * args.query_page->blocks_per_head()));
      reach = std::max(reach, Reach(job.out, Blocks(job.count, job.page)));
    }
    FitPrincipalKeysArgs on_device = args;
    on_device.pool = MirrorPool(mirror, args.pool, reach);
    on_device.inverse_frequency =
        mirror.In(args.inverse_frequency, static_cast<size_t>(args.query_page->head_dim() / 2));
    device_->FitPrincipalKeys(on_device);
    mirror.Finish();
  }

  void SampleTokens(const SampleTokensArgs& args) override {
    Mirror mirror(device_.get());
    int64_t rows = 0;
    for (const SampleRow& row : args.rows) rows = std::max<int64_t>(rows, row.row + 1);
    SampleTokensArgs on_device = args;
    on_device.logits = mirror.In(args.logits, static_cast<size_t>(rows * args.vocab));
    device_->SampleTokens(on_device);
    mirror.Finish();
  }

 private:
  std::unique_ptr<Backend> device_;
};

}  // namespace

std::unique_ptr<Backend> HostFacing(std::unique_ptr<Backend> device) {
  return std::make_unique<HostFacingBackend>(std::move(device));
}

}  // namespace atp
