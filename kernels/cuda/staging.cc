#include "kernels/cuda/staging.h"

#include <algorithm>

namespace atp::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kSmallest = 1 << 20;

size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Workspace::~Workspace() { cudaFree(data_); }

void* Workspace::Reserve(size_t bytes, cudaStream_t stream, cudaError_t* error) {
  *error = cudaSuccess;
  if (bytes <= bytes_) return data_;
  *error = cudaStreamSynchronize(stream);  // who is still at the old one
  if (*error != cudaSuccess) return nullptr;
  cudaFree(data_);
  data_ = nullptr, bytes_ = 0;
  const size_t wanted = RoundUp(std::max(bytes + bytes / 4, kSmallest));
  *error = cudaMalloc(&data_, wanted);
  if (*error != cudaSuccess) return nullptr;
  bytes_ = wanted;
  return data_;
}

Staging::~Staging() { Free(); }

void Staging::Free() {
  for (const Chunk& chunk : chunks_) {
    cudaFreeHost(chunk.host);
    cudaFree(chunk.device);
  }
  chunks_.clear();
  used_ = 0;
}

cudaError_t Staging::Grow(size_t bytes) {
  void *host = nullptr, *device = nullptr;
  cudaError_t error = cudaHostAlloc(&host, bytes, cudaHostAllocDefault);
  if (error == cudaSuccess) error = cudaMalloc(&device, bytes);
  if (error != cudaSuccess) {
    cudaFreeHost(host);
    return error;
  }
  chunks_.push_back({static_cast<std::byte*>(host), static_cast<std::byte*>(device), bytes});
  used_ = 0;
  return cudaSuccess;
}

Staging::Table Staging::Take(size_t bytes, cudaError_t* error) {
  *error = cudaSuccess;
  const size_t wanted = RoundUp(std::max<size_t>(bytes, 1));
  if (chunks_.empty() || used_ + wanted > chunks_.back().bytes) {
    *error = Grow(std::max(wanted, chunks_.empty() ? kSmallest : 2 * chunks_.back().bytes));
    if (*error != cudaSuccess) return {};
  }
  const Table table{chunks_.back().host + used_, chunks_.back().device + used_, bytes};
  used_ += wanted;
  return table;
}

void Staging::Reset() {
  for (const Received& back : received_) std::memcpy(back.to, back.pinned, back.bytes);
  received_.clear();
  if (chunks_.size() > 1) {
    size_t bytes = 0;
    for (const Chunk& chunk : chunks_) bytes += chunk.bytes;
    Free();
    Grow(bytes);  // a failure is the next Take()'s to report
  }
  used_ = 0;
}

cudaError_t Staging::Send(const Table& table, cudaStream_t stream) const {
  return cudaMemcpyAsync(table.device, table.host, table.bytes, cudaMemcpyHostToDevice, stream);
}

cudaError_t Staging::Receive(void* to, const void* device, size_t bytes, cudaStream_t stream) {
  cudaError_t error;
  const Table table = Take(bytes, &error);
  if (table.host == nullptr) return error;
  std::memset(table.host, 0, bytes);  // what the host gets if the device fails
  received_.push_back({to, table.host, bytes});
  return cudaMemcpyAsync(table.host, device, bytes, cudaMemcpyDeviceToHost, stream);
}

}  // namespace atp::cuda
