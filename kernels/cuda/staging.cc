#include "kernels/cuda/staging.h"

#include <algorithm>
#include <bit>

namespace atp::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kSmallest = 1 << 20;

size_t RoundUp(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

size_t SizeClass(size_t bytes) {
  if (bytes <= kAlignment) return kAlignment;
  return RoundUp(bytes, std::max(kAlignment, std::bit_floor(bytes) / 4));
}

Workspace::~Workspace() { Release(); }

void* Workspace::Reserve(size_t bytes, cudaError_t* error) {
  *error = cudaSuccess;
  if (bytes <= bytes_) return data_;
  void* data = nullptr;
  const size_t wanted = RoundUp(std::max(bytes, kSmallest), kAlignment);
  *error = cudaMalloc(&data, wanted);
  if (*error != cudaSuccess) {
    cudaGetLastError();  // this op's, not a later one's
    return nullptr;
  }
  outgrown_.push_back(data_);  // kernels before this op may be at it
  data_ = data, bytes_ = wanted;
  return data_;
}

void Workspace::Reset() {
  for (void* data : outgrown_) cudaFree(data);
  outgrown_.clear();
}

void Workspace::Release() {
  Reset();
  cudaFree(data_);
  data_ = nullptr, bytes_ = 0;
}

void Staging::Area::Free() {
  for (const Chunk& chunk : chunks_) {
    cudaFreeHost(chunk.host);
    cudaFree(chunk.device);
  }
  chunks_.clear();
}

cudaError_t Staging::Area::Grow(size_t bytes) {
  void *host = nullptr, *device = nullptr;
  cudaError_t error = cudaHostAlloc(&host, bytes, cudaHostAllocDefault);
  if (error == cudaSuccess) error = cudaMalloc(&device, bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();
    cudaFreeHost(host);
    return error;
  }
  chunks_.push_back({static_cast<std::byte*>(host), static_cast<std::byte*>(device), bytes, 0});
  return cudaSuccess;
}

Staging::Table Staging::Area::Take(size_t bytes, cudaError_t* error) {
  *error = cudaSuccess;
  const size_t wanted = SizeClass(bytes);
  if (chunks_.empty() || chunks_.back().used + wanted > chunks_.back().bytes) {
    *error = Grow(std::max(wanted, chunks_.empty() ? kSmallest : 2 * chunks_.back().bytes));
    if (*error == cudaErrorMemoryAllocation) *error = Grow(wanted);
    if (*error != cudaSuccess) return {};
  }
  Chunk& chunk = chunks_.back();
  const Table table{chunk.host + chunk.used, chunk.device + chunk.used, bytes};
  chunk.used += wanted;
  return table;
}

cudaError_t Staging::Area::Copy(cudaMemcpyKind kind, cudaStream_t stream) const {
  for (const Chunk& chunk : chunks_) {
    if (chunk.used == 0) continue;
    const bool down = kind == cudaMemcpyHostToDevice;
    const cudaError_t error = cudaMemcpyAsync(down ? chunk.device : chunk.host,
                                              down ? chunk.host : chunk.device, chunk.used, kind, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

void Staging::Area::Reset() {
  size_t bytes = 0;
  for (Chunk& chunk : chunks_) bytes += chunk.bytes, chunk.used = 0;
  if (chunks_.size() > 1) {
    Free();
    Grow(bytes);  // a failure is the next Take()'s to report
  }
}

cudaError_t Staging::Area::Reserve(size_t bytes) {
  size_t there = 0;
  for (const Chunk& chunk : chunks_) there += chunk.bytes;
  if (bytes <= there) return cudaSuccess;
  Free();
  return Grow(std::max(bytes, kSmallest));
}

Staging::~Staging() = default;

cudaError_t Staging::Reserve(size_t sent, size_t received) {
  const cudaError_t error = sent_.Reserve(sent);
  return error != cudaSuccess ? error : results_.Reserve(received);
}

Staging::Table Staging::Take(size_t bytes, cudaError_t* error) { return sent_.Take(bytes, error); }

cudaError_t Staging::Send(const Table& table, cudaStream_t stream) const {
  if (deferred_) return cudaSuccess;
  return cudaMemcpyAsync(table.device, table.host, table.bytes, cudaMemcpyHostToDevice, stream);
}

cudaError_t Staging::SendAll(cudaStream_t stream) {
  deferred_ = false;
  return sent_.Copy(cudaMemcpyHostToDevice, stream);
}

void* Staging::Receive(void* to, size_t bytes, cudaError_t* error) {
  const Table table = results_.Take(bytes, error);
  if (table.host == nullptr) return nullptr;
  std::memset(table.host, 0, bytes);
  received_.push_back({to, table.host, bytes});
  return table.device;
}

cudaError_t Staging::Fetch(cudaStream_t stream) const {
  return results_.Copy(cudaMemcpyDeviceToHost, stream);
}

void Staging::Reset() {
  for (const Received& back : received_) std::memcpy(back.to, back.pinned, back.bytes);
  received_.clear();
  sent_.Reset();
  results_.Reset();
  deferred_ = false;
}

}  // namespace atp::cuda
