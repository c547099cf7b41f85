#include "engine/block_allocator.h"

#include <algorithm>
#include <utility>

#include "absl/base/macros.h"
#include "absl/strings/str_cat.h"

namespace atp {

BlockGroup::BlockGroup(BlockGroup&& other) noexcept
    : allocator_(std::exchange(other.allocator_, nullptr)), record_(std::exchange(other.record_, -1)) {}

BlockGroup& BlockGroup::operator=(BlockGroup&& other) noexcept {
  if (this != &other) {
    Reset();
    allocator_ = std::exchange(other.allocator_, nullptr);
    record_ = std::exchange(other.record_, -1);
  }
  return *this;
}

BlockGroup BlockGroup::Share() const {
  ABSL_ASSERT(!empty());
  BlockAllocator::Record& record = allocator_->records_[record_];
  if (allocator_->Idle(record)) allocator_->idle_blocks_ -= static_cast<int64_t>(record.ids.size());
  ++record.owners;
  return BlockGroup(allocator_, record_);
}

void BlockGroup::Reset() {
  if (empty()) return;
  allocator_->Release(record_);
  allocator_ = nullptr;
  record_ = -1;
}

std::span<const BlockId> BlockGroup::ids() const {
  if (empty()) return {};
  return allocator_->records_[record_].ids;
}

int BlockGroup::owners() const { return empty() ? 0 : allocator_->records_[record_].owners; }

void BlockGroup::SetRetained(bool retained) {
  ABSL_ASSERT(!empty());
  BlockAllocator::Record& record = allocator_->records_[record_];
  const int64_t blocks = static_cast<int64_t>(record.ids.size());
  if (allocator_->Idle(record)) allocator_->idle_blocks_ -= blocks;
  record.retained = retained;
  if (allocator_->Idle(record)) allocator_->idle_blocks_ += blocks;
}

BlockAllocator::BlockAllocator(int64_t num_blocks) : total_blocks_(num_blocks) {
  free_ids_.reserve(num_blocks);
}

BlockAllocator::~BlockAllocator() { ABSL_ASSERT(free_blocks() == total_blocks_); }

std::optional<BlockGroup> BlockAllocator::Allocate(int count) {
  ABSL_ASSERT(count > 0);
  if (count > free_blocks()) return std::nullopt;
  if (free_records_.empty()) {
    free_records_.push_back(static_cast<int32_t>(records_.size()));
    records_.emplace_back();
  }
  const int32_t index = free_records_.back();
  free_records_.pop_back();
  Record& record = records_[index];
  record.owners = 1;
  record.retained = false;
  const auto lent = static_cast<ptrdiff_t>(std::min(free_ids_.size(), static_cast<size_t>(count)));
  record.ids.assign(free_ids_.rbegin(), free_ids_.rbegin() + lent);
  free_ids_.resize(free_ids_.size() - static_cast<size_t>(lent));
  while (record.ids.size() < static_cast<size_t>(count)) record.ids.push_back(next_id_++);
  return BlockGroup(this, index);
}

void BlockAllocator::Release(int32_t index) {
  Record& record = records_[index];
  ABSL_ASSERT(record.owners > 0);
  ABSL_ASSERT(!Idle(record));  // who retains a group must say that it stops
  if (--record.owners > 0) {
    if (Idle(record)) idle_blocks_ += static_cast<int64_t>(record.ids.size());
    return;
  }
  free_ids_.insert(free_ids_.end(), record.ids.rbegin(), record.ids.rend());
  record.ids.clear();
  record.retained = false;
  free_records_.push_back(index);
}

absl::Status BlockAllocator::Check(std::span<const BlockGroup* const> handles) const {
  std::vector<int> owners(records_.size(), 0);
  for (const BlockGroup* handle : handles) {
    if (handle->allocator_ != this)
      return absl::InternalError("a handle without a group, or of another allocator");
    ++owners[handle->record_];
  }
  std::vector<int> seen(total_blocks_, 0);
  for (BlockId id : free_ids_) ++seen[id];
  for (BlockId id = next_id_; id < total_blocks_; ++id) ++seen[id];
  int64_t idle = 0;
  for (size_t i = 0; i < records_.size(); ++i) {
    const Record& record = records_[i];
    if (record.owners != owners[i]) {
      return absl::InternalError(
          absl::StrCat("group ", i, " counts ", record.owners, " owners and has ", owners[i]));
    }
    if ((record.owners == 0) != record.ids.empty()) {
      return absl::InternalError(
          absl::StrCat("group ", i, " has ", record.ids.size(), " blocks and ", record.owners, " owners"));
    }
    for (BlockId id : record.ids) ++seen[id];
    if (Idle(record)) idle += static_cast<int64_t>(record.ids.size());
  }
  const auto bad = std::find_if(seen.begin(), seen.end(), [](int times) { return times != 1; });
  if (bad != seen.end()) {
    return absl::InternalError(
        absl::StrCat("block ", bad - seen.begin(), " is in ", *bad, " places (free list and groups)"));
  }
  if (idle != idle_blocks_) {
    return absl::InternalError(absl::StrCat("idle blocks counted ", idle_blocks_, ", found ", idle));
  }
  return absl::OkStatus();
}

}  // namespace atp
